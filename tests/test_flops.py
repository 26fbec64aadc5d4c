"""FLOPs against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from configs import base
from ivideo import stages
from ivideo.devices import flops
from ivideo.models.blocks import ResBlock, convolve_frames


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_small_dense():
    assert flops.count(jnp.matmul, array(5, 7), array(7, 11)) == 2 * 5 * 7 * 11
    assert flops.count(lambda x: x, array(5)) == 0
    # a product and its two gradients cost the same
    gradients = jax.grad(lambda x, w: (x @ w).sum(), argnums=(0, 1))
    assert flops.count(gradients, array(5, 7), array(7, 11)) == 3 * 2 * 5 * 7 * 11


@pytest.mark.parametrize(
    ("stride", "padding", "groups", "size"),
    [(1, "SAME", 1, 8 * 6), (1, "VALID", 1, 6 * 4), (2, "SAME", 1, 4 * 3), (2, ((1, 1), (1, 1)), 2, 4 * 3)],
)
def test_small_convolution(stride, padding, groups, size):
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    x, kernel = array(2, 8, 6, 4), array(3, 3, 4 // groups, 10)
    forward = 2 * (2 * size * 10) * (9 * 4 // groups)
    assert flops.count(convolve, x, kernel) == forward
    for argument in (0, 1) if padding == "SAME" else ():
        gradient = jax.grad(lambda *a: convolve(*a).sum(), argnums=argument)
        assert flops.count(gradient, x, kernel) == 2 * forward


def test_small_attention():
    b, n, m, heads, d = 2, 6, 5, 3, 4

    def attend(q, k, v):
        return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(jnp.einsum("bnhd,bmhd->bhnm", q, k)), v)

    assert flops.count(attend, array(b, n, heads, d), *[array(b, m, heads, d)] * 2) == 2 * (2 * b * heads * n * m * d)


def test_small_loops_and_branches():
    x = array(4, 4)
    product = 2 * 4**3
    assert flops.count(lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, length=7)[0], x) == 7 * product
    assert flops.count(lambda x: jax.lax.fori_loop(0, 5, lambda _, c: c @ c, x), x) == 5 * product
    branches = [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x]
    assert flops.count(lambda i, x: jax.lax.switch(i, branches, x), array(dtype=jnp.int32), x) == 2 * product
    assert flops.count(jax.jit(lambda x: jax.nn.relu(x @ x)), x) == product
    assert flops.count(lambda x: jax.lax.while_loop(lambda c: c[0, 0] > 0, lambda c: c - 1, x), x) == 0
    with pytest.raises(ValueError, match="inside of a while"):
        flops.count(lambda x: jax.lax.while_loop(lambda c: c[0, 0] > 0, lambda c: c @ c, x), x)


def test_small_the_platform_does_not_matter():
    """The products that a CPU runs and the convolution that a TPU runs: one of them, and it is the same number."""
    assert flops.count(convolve_frames, array(2, 5, 3, 4, 6), array(3, 6, 7)) == 2 * (2 * 5 * 3 * 4 * 7) * (3 * 6)


def test_small_remat():
    def layer(x, w):
        return jnp.sin(x @ w)

    x, w = array(5, 7), array(7, 7)
    product = 2 * 5 * 7 * 7

    def loss(layer):
        return lambda x, w: layer(layer(x, w), w).sum()

    remat = jax.checkpoint(layer, policy=jax.checkpoint_policies.nothing_saveable)
    assert flops.count(remat, x, w) == product
    assert flops.count(jax.grad(loss(layer), (0, 1)), x, w) == (2 + 4) * product
    # each product once more, for the cosine that the forward pass did not keep
    assert flops.count(jax.grad(loss(remat), (0, 1)), x, w) == (2 + 4 + 2) * product


def test_small_residual_block():
    b, f, h, w, c, features, e = 2, 3, 4, 6, 8, 16, 32
    block = ResBlock(features, jnp.float32)
    args = array(b, f, h, w, c), array(b, 1, e)
    params = jax.eval_shape(block.init, jax.random.key(0), *args)
    pixels = b * f * h * w
    convolutions = pixels * features * (9 * c + 9 * features)
    dense = b * e * 2 * features + pixels * c * features
    assert flops.count(block.apply, params, *args) == 2 * (convolutions + dense)


def test_small_network_and_batch():
    config = base.get_config("small")
    model, params = stages.build_model(config), stages.param_shapes(config)

    def forward(batch):
        args, optional = stages.model_inputs(config, batch)
        return flops.count(lambda p, *a, **k: model.apply({"params": p}, *a, **k), params, *args, **optional)

    # the frames' places, 16 waves into an embedding of 32, are worked out once a batch
    once = 2 * config.video.frames * 16 * 32
    one = forward(1) - once
    assert one > 0
    assert forward(2) == 2 * one + once
    assert forward(6) == 6 * one + once
