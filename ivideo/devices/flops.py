"""Counts the floating-point operations of a function on its jaxpr, without allocating or compiling anything.

These are model FLOPs, as utilisation is defined by: matrix products and convolutions alone, where a multiply and an add
are two. Operations that the compiler adds, fuses or removes do not show. Those that a rematerialised backward pass
repeats do.
"""

import math

import jax
from jax.extend.core import jaxprs_in_params


def count(fn, *args, **kwargs) -> int:
    """FLOPs of `fn(*args, **kwargs)`; the arguments may be `jax.ShapeDtypeStruct`s.

    The body of a scan counts once per iteration; a conditional (`lax.cond`, `switch`, `platform_dependent`) counts as
    its most expensive branch. ValueError for products in a `while_loop`, whose number of iterations is unknown, and in
    a `shard_map` or a kernel, whose shapes are those of one device or block.
    """
    return _of_jaxpr(jax.make_jaxpr(fn)(*args, **kwargs).jaxpr)


def _of_jaxpr(jaxpr) -> int:
    return sum(_of_equation(eqn) for eqn in jaxpr.eqns)


def _of_equation(eqn) -> int:
    name = eqn.primitive.name
    if name == "dot_general":
        return _dot(eqn)
    if name == "conv_general_dilated":
        return _convolution(eqn)
    inner = [_of_jaxpr(jaxpr) for jaxpr in jaxprs_in_params(eqn.params)]
    if name == "scan":
        return eqn.params["length"] * sum(inner)
    if name == "cond":
        return max(inner)
    if name in ("while", "shard_map", "pallas_call") and any(inner):
        raise ValueError(f"FLOPs inside of a {name} cannot be counted: count the body, or use lax.scan for a loop")
    return sum(inner)


def _dot(eqn) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    shape = eqn.invars[0].aval.shape
    return 2 * eqn.outvars[0].aval.size * math.prod(shape[i] for i in contracted)


def _convolution(eqn) -> int:
    """Products with padding count, by convention; those with the zeros of a dilated input (a gradient's) do not."""
    kernel = eqn.invars[1].aval
    per_output = kernel.size // kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2 * eqn.outvars[0].aval.size * per_output // math.prod(eqn.params["lhs_dilation"])
