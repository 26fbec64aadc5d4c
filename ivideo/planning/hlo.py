"""What a compiled program does, read off its text (`compiled.as_text()`): FLOPs, memory traffic, communication.

The compiler's own `cost_analysis` counts the body of a loop once, whatever the number of its runs, and the blocks of a
level are a loop. Here a loop counts as often as it runs. FLOPs are those of products and convolutions, as in
`ivideo.devices.flops`; bytes are those that operations read from and write to a chip's main memory (HBM), by the sizes
of their arrays without the padding of their layouts.
"""

import collections
import dataclasses
import functools
import math
import re

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# They name, pick or order arrays that others make; loops and calls count what is in them
_FREE = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id",
    "opt-barrier", "while", "call", "conditional", "async-start", "async-update", "async-done", "copy-done",
    *(f"{kind}-done" for kind in COLLECTIVES), "send-done", "recv-done", "iota", "domain",
}  # fmt: skip
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d+\w*|pred)\[([\d,]*)\](\{[^}]*\})?")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array in a program: its type and sizes, and whether it lies in on-chip memory."""

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
    """A line of a computation: what it makes, of which operands, and the rest of the line."""

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
    """A compiled program's computations, by name; `entry` is the one that runs."""

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
        """Every instruction outside of fusions as (its computation, instruction, how often it runs)."""
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
        """How often a loop runs: the one number that its condition compares with. ValueError where there is none."""
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
        """FLOPs of products and convolutions on one device."""
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
        made = sum(array.traffic for array in instruction.results)
        if instruction.op in ("dynamic-slice", "gather", "slice"):
            return 2 * made
        if instruction.op == "dynamic-update-slice":
            return 2 * operands[1].traffic
        if instruction.op == "fusion":
            return self._fusion_bytes(instruction, operands)
        if instruction.op.endswith("-start"):  # results hold the operands too
            return made
        return made + sum(array.traffic for array in operands)

    def _fusion_bytes(self, instruction, operands) -> int:
        """Of an operand that is only sliced, the slices; of a result that is updated in place, the update."""
        inner = self.computations[instruction.attribute("calls")]
        parameters = _parameters(inner)

        def written(name):
            i = inner[name]
            if i.op in ("bitcast", "tuple"):
                return sum(written(operand) for operand in i.operands)
            if i.op == "dynamic-update-slice":
                return sum(array.bytes for array in inner[i.operands[1]].results)
            return sum(array.bytes for array in i.results)

        total = sum(self._read(inner, parameters[n], array) for n, array in enumerate(operands) if not array.on_chip)
        if not all(array.on_chip for array in instruction.results):
            total += min(
                written(next(i.name for i in inner.values() if i.root)),
                sum(array.traffic for array in instruction.results),
            )
        return total

    def _read(self, inner, name, array) -> int:
        """Bytes of an array that a fusion reads, which calls it `name`."""
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
        """The arrays an instruction is given; a tuple counts as its first."""
        table = self.computations[where]
        return [table[name].results[0] for name in instruction.operands if name in table and table[name].results]

    def _everything(self):
        """As `run`, with what is in fusions, where the compiler puts communication beside arithmetic."""

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
        """Whether an array is a device's part put into a larger one: a sum of such over the devices gathers them."""
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
        """Communication by kind and what it is of: `count` in the text, `runs`, `bytes` of a device's results.

        A gather that the compiler writes as an all-reduce, of parts among zeros, counts as a gather.

        Parameters, whose gathers fully sharded training is made of, are told from activations by their shapes: those
        of `params`, a tree, or one layer's of them, in any order of the dimensions.
        """
        import jax

        known = set()
        for leaf in jax.tree.leaves(params):
            known |= {_dimensions(leaf.shape), _dimensions(leaf.shape[1:])}
        found = collections.defaultdict(lambda: {"count": 0, "runs": 0, "bytes": 0, "largest": "", "largest_bytes": 0})
        for where, instruction, times in self._everything():
            kind = instruction.op.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            arrays = instruction.results
            if kind != instruction.op and kind in ("all-gather", "collective-permute"):
                arrays = [a for a in arrays if a.shape][len(instruction.operands) :]
            names = [_named(kind, array, known) for array in arrays]
            if kind == "all-reduce":
                padded = [self._padded(where, operand) for operand in instruction.operands]
                names = [
                    name.replace(kind, "all-gather") if is_padded else name
                    for name, is_padded in zip(names, padded, strict=True)
                ]
            for name in set(names):  # several arrays may travel together
                found[name]["count"] += 1
                found[name]["runs"] += times
            for name, array in zip(names, arrays, strict=True):
                entry = found[name]
                entry["bytes"] += times * array.bytes
                if array.bytes > entry["largest_bytes"]:
                    entry["largest_bytes"] = array.bytes
                    entry["largest"] = f"{array.dtype}[{','.join(map(str, array.shape))}]"
        return dict(sorted(found.items()))


def _named(kind: str, array: Array, known) -> str:
    if array.size <= 8:
        return f"{kind} of scalars"
    return f"{kind} of {'parameters' if _dimensions(array.shape) in known else 'activations'}"


def _parameters(computation) -> dict[int, str]:
    """The names of a computation's parameters by their numbers."""
    return {int(re.match(r"\d+", i.rest)[0]): i.name for i in computation.values() if i.op == "parameter"}


def _instruction(found) -> Instruction:
    root, name, results, op, rest = found.groups()
    arrays = tuple(
        Array(dtype, tuple(int(n) for n in sizes.split(",") if n), bool(re.search(r"S\([1-9]", layout or "")))
        for dtype, sizes, layout in _ARRAY.findall(results)
    )
    return Instruction(name, op, arrays, tuple(re.findall(r"%([\w.\-]+)", _arguments(rest))), rest, bool(root))


def _arguments(rest: str) -> str:
    """What stands before the parenthesis that closes an instruction's operands."""
    depth = 1
    for end, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return rest[:end]
    return rest


def _convolution(instruction, image: Array, kernel: Array) -> int:
    """Without products by the padding's zeros: the compiler writes products of matrices as convolutions of them."""
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
    """Pairs of a place in the result and one in the kernel that meet a number of the image, along one axis."""
    places = np.arange(result)[:, None] * stride + np.arange(kernel) * spread - padding
    return int(((places >= 0) & (places % holes == 0) & (places < (image - 1) * holes + 1)).sum())


def _dimensions(shape) -> tuple[int, ...]:
    """A shape but for the order of its dimensions, which the compiler is free to choose."""
    return tuple(sorted(size for size in shape if size > 1))
