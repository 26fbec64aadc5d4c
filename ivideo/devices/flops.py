"""How many floating-point operations a function asks for, counted on its jaxpr: nothing is allocated or compiled.

Model FLOPs, as a utilisation is reckoned in: products and convolutions alone, a multiply and an add being two. What the
compiler adds, fuses or leaves out does not show; what a rematerialised backward pass computes again does.
"""

import math

import jax
from jax.extend.core import jaxprs_in_params


def count(fn, *args, **kwargs) -> int:
    """FLOPs of `fn(*args, **kwargs)`; the arguments may be `jax.ShapeDtypeStruct`s.

    A scan counts as often as it runs, a conditional (`lax.cond`, `switch`, `platform_dependent`) as its dearest branch.
    ValueError for products in a `while_loop`, whose trips nobody knows, and in a `shard_map` or a kernel, whose sizes
    are a part's.
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
    """Zeros of the padding count, as is the custom; holes of a dilated input, from a strided one's gradient, do not."""
    kernel = eqn.invars[1].aval
    per_output = kernel.size // kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2 * eqn.outvars[0].aval.size * per_output // math.prod(eqn.params["lhs_dilation"])
