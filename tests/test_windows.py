"""Windows cover the clip, and their blend equals the result for the whole clip."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from configs import base, ssr1, ssr3, tsr1
from ivideo import checks
from ivideo.diffusion import windows
from ivideo.errors import UserError


@pytest.mark.parametrize(("length", "window", "overlap"), [(10, 4, 1), (10, 4, 0), (7, 7, 3), (128, 16, 4), (9, 20, 5)])
def test_small_windows_cover_and_overlap(length, window, overlap):
    starts = windows.window_starts(length, window, overlap)
    assert starts[0] == 0
    assert starts[-1] + window >= length
    assert (starts[1:] - starts[:-1] <= window - overlap).all()
    assert len(starts) == max(1, -(-(length - overlap) // (window - overlap)))  # and are no more than that takes
    assert starts[-1] == max(0, length - window)


def test_small_overlap_of_a_whole_window_is_refused():
    with pytest.raises(ValueError, match=r"overlap=4 must be in 0 .. window - 1 = 3"):
        windows.window_starts(10, 4, 4)


def arrays(shape=(2, 6, 12, 20)):
    rng = np.random.default_rng(0)
    z, cond = (rng.normal(size=(*shape, 3)).astype(np.float32) for _ in range(2))
    return z, cond, np.array([0.5, -1.0], np.float32)


def test_small_windows_of_a_pointwise_function_are_the_whole():
    def denoise(z, cond, logsnr):
        return z * cond + logsnr[:, None, None, None, None]

    whole = windows.windowed(denoise, window=(4, 8, 8), overlap=(1, 2, 3), multiple=(2, 2))(*arrays())
    np.testing.assert_allclose(whole, denoise(*arrays()), atol=1e-6)


def test_small_denoiser_sees_windows_alone():
    seen = []

    def denoise(z, cond, logsnr):
        seen.append(z.shape)
        return z

    windows.windowed(denoise, window=(4, 8, 0), overlap=(1, 2, 3))(*arrays())
    assert set(seen) == {(2, 4, 8, 20, 3)}
    seen.clear()
    windows.windowed(denoise, window=(0, 0, 40), overlap=(1, 2, 3))(*arrays())
    assert seen == [(2, 6, 12, 20, 3)]


def test_small_blend_has_no_seam():
    """Windows that disagree by one are joined by a slope over the overlap, not by a step."""

    def denoise(z, cond, logsnr):
        # 0 in the first window, 1 in the second, told by their first pixel
        return jnp.broadcast_to(cond[:, :1, :1, :1] > 0, z.shape).astype(jnp.float32)

    z = np.zeros((1, 1, 1, 20, 1), np.float32)
    cond = np.broadcast_to(np.arange(20.0)[:, None], z.shape)
    row = windows.windowed(denoise, window=(0, 0, 12), overlap=(0, 0, 4))(z, cond, np.zeros(1))[0, 0, 0, :, 0]
    np.testing.assert_allclose(row, [0] * 8 + [0.2, 0.4, 0.6, 0.8] + [1] * 8, atol=1e-6)


def test_small_local_function_is_exact_away_from_borders():
    """A blur over three pixels in windows that overlap by four differs from the whole in the overlaps alone."""
    kernel = np.ones((1, 3, 1, 1), np.float32) / 3

    def denoise(z, cond, logsnr):
        frames = z[:, 0]
        y = lax.conv_general_dilated(frames, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y[:, None]

    z = np.random.default_rng(0).normal(size=(1, 1, 1, 20, 1)).astype(np.float32)
    args = (z, z, np.zeros(1))
    whole = denoise(*args)
    parts = windows.windowed(denoise, window=(0, 0, 12), overlap=(0, 0, 4))(*args)
    far = np.r_[0:8, 12:20]
    np.testing.assert_allclose(parts[..., far, :], whole[..., far, :], atol=1e-6)


def test_small_windows_off_the_strides_are_refused():
    with pytest.raises(ValueError, match="A window of 6 in a clip of 12: both must be multiples of 4"):
        windows.windowed(lambda z, c, l: z, window=(0, 6, 8), overlap=(0, 0, 0), multiple=(1, 4))(*arrays())
    with pytest.raises(ValueError, match="A window of 3 in a clip of 6: both must be multiples of 2"):
        windows.windowed(lambda z, c, l: z, window=(3, 0, 0), overlap=(0, 0, 0), multiple=(2, 1))(*arrays())


@pytest.mark.parametrize("length", [8, 10, 14, 30])
@pytest.mark.parametrize("window", [4, 6])
def test_small_windows_begin_at_whole_frames_of_what_is_given(length, window):
    """Each window is told where it begins by its conditioning: at an even frame where the factor is 2."""
    starts = []

    def denoise(z, cond, logsnr):
        jax.debug.callback(lambda start: starts.append(int(start)), cond[0, 0, 0, 0, 0])
        return z

    z = np.zeros((1, length, 1, 1, 1), np.float32)
    cond = np.arange(length, dtype=np.float32).reshape(z.shape)
    options = {"window": (window, 0, 0), "overlap": (1, 0, 0), "multiple": (2, 1)}
    jax.block_until_ready(windows.windowed(denoise, **options)(z, cond, np.zeros(1)))
    jax.effects_barrier()
    assert len(starts) > 1 and all(start % 2 == 0 for start in starts)
    assert min(starts) == 0 and max(starts) == length - window


@pytest.mark.parametrize(
    ("stage", "window", "overlap", "message"),
    [
        (
            tsr1,
            (3, 0, 0),
            (0, 0, 0),
            r"window = \(3, 0, 0\): 3 is not a multiple of 2. Frames must be a multiple of 2, ",
        ),
        (ssr1, (0, 9, 0), (0, 0, 0), r"9 is not a multiple of 2"),
        (base, (2, 0, 0), (0, 0, 0), r"window = \(2, 0, 0\): stage base does not sample in windows, expected 0,0,0"),
        (ssr1, (4, 8, 8), (4, 0, 0), r"overlap = \(4, 0, 0\) of .*: expected less than the window"),
    ],
)
def test_small_windows_that_cannot_be_are_refused_with_the_config(stage, window, overlap, message):
    config = stage.get_config("small")
    config.sample.window, config.sample.overlap = window, overlap
    with pytest.raises(UserError, match=message):
        checks.check(config)


def test_small_windows_of_a_paper_sized_stage_are_taken():
    config = ssr3.get_config()
    config.sample.window, config.sample.overlap = (16, 256, 256), (4, 64, 64)
    checks.check(config)
    config.sample.window = (16, 256, 264)  # a multiple of its factor, 4, but not of its strides
    with pytest.raises(
        UserError, match="264 is not a multiple of 16. .* height and width of 16; 0 stands for the clip's size"
    ):
        checks.check(config)
