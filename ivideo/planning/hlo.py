"""Counts the FLOPs, memory traffic and communication of a compiled program from its text (`compiled.as_text()`).

The compiler's own `cost_analysis` counts the body of a loop once, but the blocks of a level are a loop. Here a loop's
body counts once per iteration. FLOPs are those of matrix products and convolutions, as in `ivideo.devices.flops`. Bytes
are those that operations read from and write to a chip's main memory (HBM), from the sizes of their arrays without the
padding of their layouts.
"""

import collections
import dataclasses
import functools
import math
import re

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
MAX_SCALARS = 8  # an array of so few numbers is a loss or a norm, neither a parameter nor an activation
# Operations without memory traffic: they name, select or order existing arrays. The contents of loops and calls are
# counted separately
_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "while", "call", "conditional", "async-start", "async-update", "async-done", "copy-done",
    *(f"{kind}-done" for kind in COLLECTIVES), "send-done", "recv-done", "iota", "domain",
}  # fmt: skip
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\](\{[^}]*\})?")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array in a program: its dtype and shape, and whether it is in on-chip memory."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        bits = 8 if self.dtype == "pred" else int(re.search(r"\d+", self.dtype)[0])
        return -(-self.size * bits // 8)

    @property
    def traffic(self) -> int:
        return 0 if self.on_chip else self.bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation: its results, its operands, and the rest of the line."""

    name: str
    op: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str
    root: bool

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found and found[1]


class Program:
    """The computations of a compiled program by name. The program starts with `entry`."""

    def __init__(self, text: str):
        self.computations, self.entry, current = {}, None, None
        for line in text.splitlines():
            if line.endswith("{") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
                current = self.computations[head[2]] = {}
                self.entry = head[2] if head[1] else self.entry
            elif current is not None and (found := _INSTRUCTION.match(line)):
                instruction = _instruction(found)
                current[instruction.name] = instruction
        if self.entry is None:
            raise ValueError("this is not the text of a compiled program: it has no ENTRY computation")

    def run(self, name: str | None = None, times: int = 1):
        """Yields every instruction outside fusions as (its computation, the instruction, how often it runs)."""
        name = name or self.entry
        for instruction in self.computations[name].values():
            yield name, instruction, times
            if instruction.op == "while":
                yield from self.run(instruction.attribute("body"), times * self.trips(instruction))
            elif instruction.op in ("call", "async-start"):
                yield from self.run(instruction.attribute("calls") or instruction.attribute("to_apply"), times)
            elif instruction.op == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
                names = re.findall(r"[\w.\-]+", branches[1]) if branches else []
                names = names or [instruction.attribute(f"{b}_computation") for b in ("true", "false")]
                for branch in names:
                    yield from self.run(branch, times)

    def trips(self, loop: Instruction) -> int:
        """A loop's number of iterations: the only constant in its condition. ValueError if that has none or several."""
        known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', loop.rest)
        if known:
            return int(known[1])
        condition = self.computations[loop.attribute("condition")]
        numbers = {
            int(value[1])
            for instruction in condition.values()
            if instruction.op == "constant" and (value := re.match(r"(\d+)\)", instruction.rest))
        }
        if len(numbers) != 1:
            raise ValueError(f"the loop {loop.name} runs an unknown number of times: write it as lax.scan")
        return numbers.pop()

    @functools.cached_property
    def flops(self) -> int:
        """FLOPs of matrix products and convolutions on one device."""
        return sum(times * self._flops(where, instruction) for where, instruction, times in self.run())

    def _flops(self, where, instruction) -> int:
        if instruction.op == "fusion":
            inner = instruction.attribute("calls")
            return sum(self._flops(inner, i) for i in self.computations[inner].values())
        if instruction.op == "convolution":
            return _convolution(instruction, *self._operands(where, instruction)[:2])
        if instruction.op == "dot":
            left = self._operands(where, instruction)[0]
            axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)[1]
            contracted = math.prod(left.shape[int(axis)] for axis in axes.split(",") if axis)
            return 2 * instruction.results[0].size * contracted
        return 0

    @functools.cached_property
    def bytes(self) -> int:
        """Bytes that one device reads from and writes to its main memory."""
        return sum(times * self._bytes(where, instruction) for where, instruction, times in self.run())

    def _bytes(self, where, instruction) -> int:
        if instruction.op in _FREE:
            return 0
        operands = self._operands(where, instruction)
        written = sum(array.traffic for array in instruction.results)
        if instruction.op in ("dynamic-slice", "gather", "slice"):
            return 2 * written
        if instruction.op == "dynamic-update-slice":
            return 2 * operands[1].traffic
        if instruction.op == "fusion":
            return self._fusion_bytes(instruction, operands)
        if instruction.op.endswith("-start"):  # its results include the operands
            return written
        return written + sum(array.traffic for array in operands)

    def _fusion_bytes(self, instruction, operands) -> int:
        """Bytes of a fusion. An operand that is only sliced counts its slices, a result updated in place its update."""
        inner = self.computations[instruction.attribute("calls")]
        parameters = _parameters(inner)

        def written_bytes(name):
            i = inner[name]
            if i.op in ("bitcast", "tuple"):
                return sum(written_bytes(operand) for operand in i.operands)
            if i.op == "dynamic-update-slice":
                return sum(array.bytes for array in inner[i.operands[1]].results)
            return sum(array.bytes for array in i.results)

        total = sum(self._read(inner, parameters[n], array) for n, array in enumerate(operands) if not array.on_chip)
        if not all(array.on_chip for array in instruction.results):
            total += min(
                written_bytes(next(i.name for i in inner.values() if i.root)),
                sum(array.traffic for array in instruction.results),
            )
        return total

    def _read(self, inner, name, array) -> int:
        """Bytes that a fusion reads of an operand, which the fusion calls `name`."""
        total = 0
        for user in inner.values():
            for position in (n for n, operand in enumerate(user.operands) if operand == name):
                if user.op == "bitcast":
                    total += self._read(inner, user.name, array)
                elif user.op == "fusion":
                    within = self.computations[user.attribute("calls")]
                    total += self._read(within, _parameters(within)[position], array)
                elif user.op in ("dynamic-slice", "gather", "slice") and position == 0:
                    total += user.results[0].bytes
                elif not (user.op == "dynamic-update-slice" and position == 0):
                    return array.bytes
        return min(total, array.bytes)

    def _operands(self, where, instruction) -> list[Array]:
        """The operands of an instruction; a tuple counts as its first array."""
        table = self.computations[where]
        return [table[name].results[0] for name in instruction.operands if name in table and table[name].results]

    def _run_with_fusions(self):
        """Like `run`, but with the instructions inside fusions: the compiler puts communication there too."""

        def fused(where, instruction):
            yield where, instruction
            if instruction.op == "fusion":
                within = instruction.attribute("calls")
                for inner in self.computations[within].values():
                    yield from fused(within, inner)

        for name, instruction, times in self.run():
            for where, inner in fused(name, instruction):
                yield where, inner, times

    def _padded(self, where, name) -> bool:
        """Whether an array is a device's part padded with zeros. Summing such arrays over devices gathers the parts."""
        instruction = self.computations[where].get(name)
        if instruction is None or instruction.op == "dynamic-update-slice":
            return instruction is not None
        if instruction.op == "bitcast":
            return self._padded(where, instruction.operands[0])
        if instruction.op == "fusion" and len(instruction.results) == 1:
            within = instruction.attribute("calls")
            return self._padded(within, next(i.name for i in self.computations[within].values() if i.root))
        return False

    def collectives(self, params=()) -> dict:
        """Communication per kind of operation and kind of array.

        Each entry has `count`, the number of operations in the text; `runs`, the number of executions; `bytes` of the
        results on one device; and the `largest` array. An all-reduce of parts padded with zeros is a gather and counts
        as one. An array counts as parameters, which fully sharded training gathers, if its shape is that of a leaf of
        the tree `params` or of one layer in it, with the dimensions in any order. Otherwise it counts as activations.
        """
        import jax

        parameter_shapes = set()
        for leaf in jax.tree.leaves(params):
            parameter_shapes |= {_dimensions(leaf.shape), _dimensions(leaf.shape[1:])}
        found = collections.defaultdict(lambda: {"count": 0, "runs": 0, "bytes": 0, "largest": "", "largest_bytes": 0})
        for where, instruction, times in self._run_with_fusions():
            kind = instruction.op.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            arrays = instruction.results
            if kind != instruction.op and kind in ("all-gather", "collective-permute"):
                arrays = [a for a in arrays if a.shape][len(instruction.operands) :]
            names = [_kind(kind, array, parameter_shapes) for array in arrays]
            if kind == "all-reduce":
                padded = [self._padded(where, operand) for operand in instruction.operands]
                names = [
                    name.replace(kind, "all-gather") if is_padded else name
                    for name, is_padded in zip(names, padded, strict=True)
                ]
            for name in set(names):  # one operation may move several arrays
                found[name]["count"] += 1
                found[name]["runs"] += times
            for name, array in zip(names, arrays, strict=True):
                entry = found[name]
                entry["bytes"] += times * array.bytes
                if array.bytes > entry["largest_bytes"]:
                    entry["largest_bytes"] = array.bytes
                    entry["largest"] = f"{array.dtype}[{','.join(map(str, array.shape))}]"
        return dict(sorted(found.items()))


def _kind(kind: str, array: Array, parameter_shapes) -> str:
    """A collective's name with the kind of its array."""
    if array.size <= MAX_SCALARS:
        return f"{kind} of scalars"
    return f"{kind} of {'parameters' if _dimensions(array.shape) in parameter_shapes else 'activations'}"


def _parameters(computation) -> dict[int, str]:
    """The names of a computation's parameters by their position."""
    return {int(re.match(r"\d+", i.rest)[0]): i.name for i in computation.values() if i.op == "parameter"}


def _instruction(found) -> Instruction:
    root, name, results, op, rest = found.groups()
    arrays = tuple(
        Array(dtype, tuple(int(n) for n in sizes.split(",") if n), bool(re.search(r"S\([1-9]", layout or "")))
        for dtype, sizes, layout in _ARRAY.findall(results)
    )
    return Instruction(name, op, arrays, tuple(re.findall(r"%([\w.\-]+)", _arguments(rest))), rest, bool(root))


def _arguments(rest: str) -> str:
    """The text of an instruction's operands: up to the closing parenthesis."""
    depth = 1
    for end, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return rest[:end]
    return rest


def _convolution(instruction, image: Array, kernel: Array) -> int:
    """FLOPs without products by zeros of the padding: the compiler writes matrix products as padded convolutions."""
    image_axes, kernel_axes, result_axes = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest).groups()
    result = instruction.results[0]
    pairs = result.shape[result_axes.index("b")] * result.shape[result_axes.index("f")]
    pairs *= kernel.shape[kernel_axes.index("i")]
    window = dict(
        re.findall(r"(\w+)=([\dx_\-]+)", re.search(r"window=\{([^}]*)\}", f"{instruction.rest} window={{}}")[1])
    )
    for axis in range(len(image_axes) - 2):

        def value(name, default, axis=axis):
            return window[name].split("x")[axis] if name in window else default

        pairs *= _positions(
            image.shape[image_axes.index(str(axis))],
            kernel.shape[kernel_axes.index(str(axis))],
            result.shape[result_axes.index(str(axis))],
            padding=int(value("pad", "0_0").split("_")[0]),
            stride=int(value("stride", 1)),
            holes=int(value("lhs_dilate", 1)),
            spread=int(value("rhs_dilate", 1)),
        )
    return 2 * pairs


@functools.cache
def _positions(image, kernel, result, *, padding, stride, holes, spread) -> int:
    """Number of pairs (position in the result, position in the kernel) that touch the image along one axis."""
    positions = np.arange(result)[:, None] * stride + np.arange(kernel) * spread - padding
    return int(((positions >= 0) & (positions % holes == 0) & (positions < (image - 1) * holes + 1)).sum())


def _dimensions(shape) -> tuple[int, ...]:
    """A shape with its dimensions sorted, since the compiler may reorder them, and without those of size 1."""
    return tuple(sorted(size for size in shape if size > 1))
