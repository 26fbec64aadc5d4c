import jax.numpy as jnp
import numpy as np
import pytest

from ivideo.diffusion import joint, process


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return {
        "video": rng.standard_normal((2, 4, 3, 3, 3)).astype(np.float32),
        "images": rng.standard_normal((2, 3, 3, 3, 3)).astype(np.float32),
        "text": rng.standard_normal((2, 5, 6)).astype(np.float32),
        "text_mask": rng.uniform(size=(2, 5)) < 0.5,
        "image_text": rng.standard_normal((2, 3, 5, 6)).astype(np.float32),
        "image_text_mask": rng.uniform(size=(2, 3, 5)) < 0.5,
    }


def test_small_pack_puts_the_images_last(batch):
    frames = joint.pack(batch["video"], batch["images"])
    np.testing.assert_array_equal(frames[:, :4], batch["video"])
    for k in range(3):
        np.testing.assert_array_equal(frames[:, 4 + k], batch["images"][:, k])
    assert frames.shape[1] == 7


def test_small_no_images_is_the_video_alone(batch):
    np.testing.assert_array_equal(joint.pack(batch["video"], batch["images"][:, :0]), batch["video"])


def test_small_each_frame_finds_its_own_text(batch):
    text, mask = joint.pack_text(batch["text"], batch["text_mask"], batch["image_text"], batch["image_text_mask"])
    assert text.shape == (2, 4, 5, 6)
    for frame, segment in enumerate([0, 0, 0, 0, 1, 2, 3]):
        own_text = batch["text"] if frame < 4 else batch["image_text"][:, frame - 4]
        own_mask = batch["text_mask"] if frame < 4 else batch["image_text_mask"][:, frame - 4]
        np.testing.assert_array_equal(text[:, segment], own_text)
        np.testing.assert_array_equal(mask[:, segment], own_mask)


def test_small_frame_weights_in_the_loss(batch):
    """Loss of a packed sequence = (sum over frames + w sum over images) / (T + w K), of what each has alone."""
    weights = joint.frame_weights(4, 3, 0.25)
    np.testing.assert_array_equal(weights, [1, 1, 1, 1, 0.25, 0.25, 0.25])
    x = joint.pack(batch["video"], batch["images"])
    eps, logsnr = jnp.flip(x, 2), jnp.array([0.5, -1.0])

    def loss(x, eps, weights=None):
        return process.training_loss(lambda z, l: jnp.sin(z), x, eps, logsnr, weights=weights)

    video, images = loss(x[:, :4], eps[:, :4]), loss(x[:, 4:], eps[:, 4:])
    np.testing.assert_allclose(loss(x, eps, weights), (4 * video + 0.75 * images) / 4.75, rtol=1e-5)
    np.testing.assert_allclose(loss(x, eps, joint.frame_weights(4, 3, 0.0)), video, rtol=1e-5)


def test_small_shapes_that_do_not_agree_are_refused(batch):
    with pytest.raises(ValueError, match=r"\(2, 3, 2, 3, 3\).*\(2, 4, 3, 3, 3\)"):
        joint.pack(batch["video"], batch["images"][:, :, :2])

    with pytest.raises(ValueError, match=r"\(2, 3, 4, 6\)"):
        joint.pack_text(batch["text"], batch["text_mask"], batch["image_text"][:, :, :4], batch["image_text_mask"])
    with pytest.raises(ValueError, match="Masks"):
        joint.pack_text(batch["text"], batch["text_mask"][:, :4], batch["image_text"], batch["image_text_mask"])
    with pytest.raises(ValueError, match=r"image_weight=-1"):
        joint.frame_weights(4, 3, -1.0)
