import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from ivideo.diffusion import resize

SIZES = [(12, 20, 6, 10), (12, 20, 5, 7), (6, 10, 24, 40), (6, 10, 13, 11), (12, 20, 12, 10), (8, 8, 1, 1)]


def triangle_f64(length, new):
    """Weights [new, length] of a triangle filter widened by the shrinkage, normalised; half-pixel centres."""
    scale = length / new
    centre = (np.arange(new)[:, None] + 0.5) * scale - 0.5
    weights = np.maximum(0, 1 - np.abs(np.arange(length) - centre) / max(scale, 1))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.fixture
def video():
    return lambda h, w: np.random.default_rng(0).uniform(-1, 1, (2, 3, h, w, 3)).astype(np.float32)


@pytest.mark.parametrize(("h", "w", "new_h", "new_w"), SIZES)
def test_small_resize_is_a_triangle_filter(video, h, w, new_h, new_w):
    x = video(h, w)
    expected = np.einsum("hH,wW,btHWc->bthwc", triangle_f64(h, new_h), triangle_f64(w, new_w), x.astype(np.float64))
    ours = resize.resize_space(x, new_h, new_w)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, atol=2e-6)


@pytest.mark.parametrize(("h", "w", "new_h", "new_w"), SIZES)
def test_small_resize_agrees_with_pillow(video, h, w, new_h, new_w):
    x = video(h, w)
    ours = np.asarray(resize.resize_space(x, new_h, new_w))
    theirs = PIL.Image.fromarray(x[1, 2, :, :, 0], mode="F").resize((new_w, new_h), PIL.Image.Resampling.BILINEAR)
    np.testing.assert_allclose(ours[1, 2, :, :, 0], np.asarray(theirs), atol=5e-6)


@pytest.mark.parametrize(("h", "w", "new_h", "new_w"), SIZES)
@pytest.mark.parametrize("value", [1.0, -1.0, 0.3])
def test_small_constants_are_preserved(h, w, new_h, new_w, value):
    ours = resize.resize_space(np.full((1, 1, h, w, 1), value, np.float32), new_h, new_w)
    np.testing.assert_allclose(ours, np.float32(value), rtol=3e-7)


def test_small_halving_removes_what_it_cannot_show():
    """Stripes one pixel wide become grey; taking every second pixel would make them black or white."""
    stripes = np.tile(np.array([1.0, -1.0], np.float32), 8).reshape(1, 1, 1, 16, 1).repeat(4, axis=2)
    np.testing.assert_allclose(resize.resize_space(stripes, 2, 8)[0, 0, :, 1:-1], 0, atol=1e-6)


def test_small_same_size_changes_nothing(video):
    x = video(6, 10)
    np.testing.assert_array_equal(resize.resize_space(x, 6, 10), x)


def test_small_frames_are_resized_alone(video):
    x = video(6, 10)
    changed = x.copy()
    changed[:, 1] = 0
    ours = resize.resize_space(x, 3, 5)
    np.testing.assert_array_equal(ours[:, [0, 2]], resize.resize_space(changed, 3, 5)[:, [0, 2]])
    np.testing.assert_array_equal(ours[0], resize.resize_space(x[0], 3, 5))


def test_small_frames_in_time():
    frames = np.arange(1, 7, dtype=np.float32)
    x = np.tile(frames.reshape(1, 6, 1, 1, 1), (2, 1, 2, 2, 1))

    def shown(video):
        video = np.asarray(video)
        np.testing.assert_array_equal(video, np.broadcast_to(video[:1, :, :1, :1], video.shape))
        return video[0, :, 0, 0, 0].tolist()

    assert shown(resize.skip_frames(x, 2)) == [1, 3, 5]
    assert shown(resize.skip_frames(x, 1)) == frames.tolist()
    assert shown(resize.repeat_frames(x, 2)) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    blank, mask = resize.blank_frames(x, 3)
    assert shown(blank) == [v for f in frames for v in (f, 0, 0)]
    np.testing.assert_array_equal(mask, np.tile([1.0, 0, 0], (2, 6)))


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_small_skipping_undoes_repeating_and_blanking(video, factor):
    x = video(3, 4)
    np.testing.assert_array_equal(resize.skip_frames(resize.repeat_frames(x, factor), factor), x)
    np.testing.assert_array_equal(resize.skip_frames(resize.blank_frames(x, factor)[0], factor), x)


def test_small_wrong_sizes_are_refused(video):
    x = video(3, 4)
    with pytest.raises(ValueError, match=r"factor=2 must divide the number of frames, 3"):
        resize.skip_frames(x, 2)
    for function in (resize.skip_frames, resize.repeat_frames, resize.blank_frames):
        with pytest.raises(ValueError, match="factor=0"):
            function(x, 0)
    with pytest.raises(ValueError, match="height=0"):
        resize.resize_space(x, 0, 4)
