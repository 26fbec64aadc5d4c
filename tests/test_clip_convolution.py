"""Convolutions over time and space as convolutions of frames: the same values as XLA's and Flax's own."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ivideo.evaluation.networks import clip_convolution

# Frames, height and width; window; stride. With and without the blocks of four pixels, and where 'SAME' pads unevenly
CASES = [
    ((16, 12, 20), (7, 7, 7), 2),
    ((9, 12, 14), (7, 7, 7), 2),
    ((5, 7, 10), (7, 7, 7), 2),
    ((4, 8, 8), (3, 3, 3), 2),
    ((5, 7, 9), (3, 3, 3), 1),
    ((4, 8, 6), (2, 4, 4), 2),
]


@pytest.mark.parametrize(("size", "window", "stride"), CASES, ids=str)
def test_small_convolution_of_a_clip_is_xlas_own(size, window, stride):
    """In float64, also its gradient by the kernel."""
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(0), 2)
        x = jax.random.normal(keys[0], (2, *size, 3), jnp.float64)
        kernel = jax.random.normal(keys[1], (*window, 3, 4), jnp.float64)

        def theirs(kernel):
            numbers = ("NDHWC", "DHWIO", "NDHWC")
            return jax.lax.conv_general_dilated(x, kernel, (stride,) * 3, "SAME", dimension_numbers=numbers)

        def ours(kernel):
            return clip_convolution.convolve(x, kernel, (stride,) * 3, "SAME")

        np.testing.assert_allclose(ours(kernel), theirs(kernel), rtol=0, atol=1e-11)
        gradients = [jax.grad(lambda kernel: (f(kernel) ** 2).sum())(kernel) for f in (ours, theirs)]  # noqa: B023
        np.testing.assert_allclose(*gradients, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("window", "strides"), [((3, 3, 3), (1, 1, 1)), ((1, 3, 3), (1, 2, 2)), ((2, 2, 2), (2, 2, 2))], ids=str
)
def test_small_pool_along_one_axis_after_the_other_is_flaxs_own(window, strides):
    x = jax.random.normal(jax.random.key(1), (2, 5, 7, 8, 3))
    np.testing.assert_array_equal(
        clip_convolution.max_pool(x, window, strides), nn.max_pool(x, window, strides, "SAME")
    )


@pytest.mark.parametrize(
    "options", [{"padding": "VALID"}, {"strides": (1, 2, 2)}, {"rhs_dilation": (1, 2, 2)}, {"feature_group_count": 3}]
)
def test_small_other_convolutions_of_clips_are_refused(options):
    x, kernel = jnp.zeros((1, 4, 4, 4, 3)), jnp.zeros((3, 3, 3, 3, 2))
    with pytest.raises(ValueError, match="expected"):
        clip_convolution.convolve(x, kernel, **{"strides": (1, 1, 1), "padding": "SAME"} | options)
