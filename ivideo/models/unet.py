"""VideoUNet: the one network of all seven stages. Section 2.3.

B batch · F frames (T video frames, then K packed images) · H, W height, width · C channels · L text tokens
S texts per sample: 1, or 1 + K where K images, each with its own text, are packed behind the video (Section 2.6)
"""

import math

import flax.linen as nn
import jax.numpy as jnp

from ivideo.devices.sharding import VIDEO, constrain
from ivideo.diffusion.process import expand
from ivideo.diffusion.schedules import alpha_sigma
from ivideo.models.attention import Dtype, FrameNorm, TextPooling
from ivideo.models.blocks import (
    TEMPORAL,
    Block,
    FrameEmbedding,
    ScalarEmbedding,
    convolution,
    depth_to_space,
    noise_fraction,
    remat_policy,
    space_to_depth,
    upsample,
)

PREDICTIONS = ("v", "eps", "x")


class VideoUNet(nn.Module):
    """A space-time separable U-Net that predicts v from a noisy video, its noise level and a text.

    Each tuple has one entry per level, the finest first. A level first downsamples the frame by its stride and last
    upsamples it again (down-first, up-last, as Imagen's Efficient U-Net, arXiv 2205.11487). The first stride moves
    pixels into channels and back, so that with a stride of 2 there the whole network works at half size. A
    `conditioned` network takes a conditioning video and the level of the noise on it. With `frame_positions`, the
    embedding of a video's frame includes its position in the clip; temporal attention has relative positions either
    way. `prediction` says what the last layer predicts, 'v', 'eps' (Section 2.4) or 'x', the clean video; the network
    returns v in each case. A network whose levels have fewer channels than the pixels under them cannot copy noise to
    its output, as v and eps require, but it can draw a simple x (arXiv 2511.13720).
    `data_std` is the standard deviation of the data given its conditioning, set where it is far below 1: see
    `skip_scale` and `expected`.
    """

    channels: tuple[int, ...]
    blocks: tuple[int, ...]
    strides: tuple[int, ...]
    spatial_attention: tuple[bool, ...]
    cross_attention: tuple[bool, ...]
    temporal: tuple[str, ...]
    head_dim: int = 64
    max_distance: int = 64
    out_channels: int = 3
    conditioned: bool = False
    frame_positions: bool = False
    prediction: str = "v"
    data_std: float = 1.0
    guidance_input: bool = False
    max_guidance: float = 16.0
    remat: str = "none"
    scan_unroll: int = 1
    dtype: Dtype = jnp.float32

    def check(self, height: int, width: int):
        """ValueError, before anything is traced, where the levels disagree or do not divide height × width."""
        per_level = ("channels", "blocks", "strides", "spatial_attention", "cross_attention", "temporal")
        for name in per_level:
            if len(getattr(self, name)) != len(self.channels):
                raise ValueError(
                    f"model.{name} = {tuple(getattr(self, name))} has {len(getattr(self, name))} entries, but "
                    f"model.channels has {len(self.channels)}: give one entry per level"
                )
        for name in self.temporal:
            if name not in TEMPORAL:
                raise ValueError(f"model.temporal has {name!r}: choose from {', '.join(TEMPORAL)}")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"model.prediction = {self.prediction!r}: choose one of {', '.join(PREDICTIONS)}")
        if self.prediction == "eps" and self.data_std != 1:
            raise ValueError(
                f"model.data_std = {self.data_std} needs model.prediction 'v' or 'x': with 'eps' it must be 1"
            )
        stride = math.prod(self.strides)
        if height % stride or width % stride:
            raise ValueError(
                f"frames of {height}×{width} cannot be divided by the network's strides {tuple(self.strides)}: "
                f"height and width must be multiples of {stride}, such as "
                f"{max(1, round(height / stride)) * stride}×{max(1, round(width / stride)) * stride}"
            )

    @nn.compact
    def __call__(
        self, z, logsnr, text, text_mask, *, cond=None, aug_logsnr=None, guidance_weight=None, num_images: int = 0
    ):
        """Predicts v [B, F, H, W, out_channels], float32.

        z: [B, F, H, W, C] noisy video, its last `num_images` frames independent images. logsnr: [B].
        text: [B, L, Dt], or [B, 1 + num_images, L, Dt]; text_mask: the same without Dt, all False for no text.
        cond: [B, F, H, W, C'], the conditioning video at this size; aug_logsnr: [B], the noise put on it
        (Section 2.5); a `conditioned` network needs both. guidance_weight: [B], of a distilled model (Section 2.7).
        """
        self.check(*z.shape[2:4])
        text, text_mask = _per_segment(text, text_mask, num_images)
        inputs = {"cond": cond, "aug_logsnr": aug_logsnr, "guidance_weight": guidance_weight}
        needed = {
            "cond": self.conditioned,
            "aug_logsnr": self.conditioned,
            "guidance_weight": self.guidance_input,
        }
        for name, value in inputs.items():
            if (value is not None) != needed[name]:
                raise ValueError(
                    f"{name} was {'not ' * (value is None)}given, but this stage's network "
                    f"{'needs' if needed[name] else 'has no input for'} it: see its model config"
                )

        text = constrain(nn.LayerNorm(dtype=self.dtype, name="text_norm")(text), "batch")
        embedding = self._embedding(logsnr, text, text_mask, aug_logsnr, guidance_weight, num_images, z.shape[1])
        context = (constrain(embedding, "batch"), text, text_mask)

        z = constrain(z, *VIDEO)
        cond = cond if cond is None else constrain(cond, *VIDEO)
        x = z if cond is None else jnp.concatenate([self._noisy_input(z, logsnr, cond, aug_logsnr), cond], axis=-1)
        x = space_to_depth(x.astype(self.dtype), self.strides[0])
        x = constrain(convolution(self.channels[0], self.dtype, "stem")(x), *VIDEO)

        skips = []
        for level, channels in enumerate(self.channels):
            if level:
                stride = self.strides[level]
                x = constrain(convolution(channels, self.dtype, f"down_{level}_resize", stride=stride)(x), *VIDEO)
            x, skip = self._level(level, f"down_{level}", num_images)(x, None, *context)
            skips.append(skip)

        last = len(self.channels) - 1
        x, _ = self._body()(**self._layers(last, num_images), name="middle")(x, None, *context)

        for level in reversed(range(len(self.channels))):
            # The way up uses skips in reverse order; the factor keeps the sum's variance (arXiv 2205.11487)
            skip = skips.pop()[::-1] * jnp.asarray(2**-0.5, self.dtype)
            x, _ = self._level(level, f"up_{level}", num_images)(x, skip, *context)
            if level:
                x = constrain(upsample(x, self.strides[level]), *VIDEO)
                x = constrain(convolution(self.channels[level - 1], self.dtype, f"up_{level}_resize")(x), *VIDEO)

        x = nn.swish(FrameNorm(self.dtype, name="out_norm")(x))
        features = self.out_channels * self.strides[0] ** 2
        x = convolution(features, jnp.float32, "out", kernel_init=nn.initializers.zeros)(x)
        x = constrain(depth_to_space(x, self.strides[0]), *VIDEO)
        return self._as_v(x, z, logsnr, cond, aug_logsnr)

    def _noisy_input(self, z, logsnr, cond, aug_logsnr):
        """The stem's view of z. With `data_std` below 1: an estimate of the difference from the conditioning video."""
        if self.data_std == 1:
            return z
        alpha, sigma = alpha_sigma(expand(logsnr, z))
        difference = z - alpha * expected(cond[..., : self.out_channels], aug_logsnr)
        return difference * estimate_scale(alpha, sigma, self.data_std) / self.data_std

    def _as_v(self, x, z, logsnr, cond, aug_logsnr):
        """v from the last layer's output x: that is v, eps, the clean video, or what `skip_scale` leaves of v."""
        alpha, sigma = alpha_sigma(expand(logsnr, z))
        if self.prediction == "eps":
            return (x - sigma * z) / alpha  # eps = sigma z + alpha v
        if self.prediction == "x":
            return (alpha * z - x) / sigma  # x = alpha z - sigma v
        if self.data_std == 1:
            return x
        skip, scale = skip_scale(alpha, sigma, self.data_std)
        if cond is None:
            return skip * z + scale * x
        mean = expected(cond[..., : self.out_channels], aug_logsnr)
        return skip * (z - alpha * mean) + scale * x - sigma * mean

    def _embedding(self, logsnr, text, text_mask, aug_logsnr, guidance_weight, num_images, frames):
        """The sum of the embeddings that blocks take: noise levels, text, positions. [B, 1, E], or [B, F, E]."""
        width = self.channels[0]
        features = 4 * width

        def scalar(name, u, **options):
            return ScalarEmbedding(width, features, self.dtype, name=name, **options)(u)[:, None]

        embedding = scalar("noise_embedding", noise_fraction(logsnr))
        if aug_logsnr is not None:
            embedding += scalar("augmentation_embedding", noise_fraction(aug_logsnr))
        if guidance_weight is not None:
            # Zero at first: a student begins as the network whose weights it starts from
            zero = nn.initializers.zeros
            embedding += scalar("guidance_embedding", guidance_weight / self.max_guidance, kernel_init=zero)
        pooled = TextPooling(features, self.dtype, name="text_pooling")(text, text_mask)
        embedding += pooled
        if not (num_images or self.frame_positions):
            return embedding
        frames -= num_images
        video = jnp.broadcast_to(embedding[:, :1], (embedding.shape[0], frames, features))
        if self.frame_positions:
            video += FrameEmbedding(features, self.dtype, name="frame_embedding")(pooled[:, 0], frames)
        return jnp.concatenate([video, embedding[:, 1:]], axis=1)

    def _layers(self, level, num_images):
        """The fields of `Block` for a level."""
        return {
            "channels": self.channels[level],
            "spatial_attention": self.spatial_attention[level],
            "cross_attention": self.cross_attention[level],
            "temporal": self.temporal[level],
            "head_dim": self.head_dim,
            "max_distance": self.max_distance,
            "num_images": num_images,
            "dtype": self.dtype,
        }

    def _body(self):
        """The class of the block, with the rematerialisation that the config names."""
        if self.remat == "none":
            return Block
        return nn.remat(Block, policy=remat_policy(self.remat), prevent_cse=False)

    def _level(self, level, name, num_images):
        """All blocks of a level as one `nn.scan`: the compiler sees one block, however many there are."""
        scanned = nn.scan(
            self._body(),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=self.blocks[level],
            unroll=self.scan_unroll,
        )
        return scanned(**self._layers(level, num_images), name=name)


def skip_scale(alpha, sigma, data_std: float):
    """Factors (skip, scale) of v = skip z + scale F, so that the network's output F does not contain the noise of z.

    This is arXiv 2206.00364, Section 5, written for v and for Gaussian data of standard deviation `data_std` about its
    mean given the conditioning. skip z is the v of E[x | z], and F has unit variance at every noise level. A standard
    deviation of 1 gives v = F. Without the factors, a network for data far from unit variance has to copy the noise
    of z to its output, pixel by pixel. Arrays have the shape of alpha and sigma.
    """
    variance = alpha**2 * data_std**2 + sigma**2
    return alpha * sigma * (1 - data_std**2) / variance, data_std * variance**-0.5


def estimate_scale(alpha, sigma, data_std: float):
    """The factor k of the best linear estimate k z of data of standard deviation `data_std`.

    It falls to 0 where the noise is much larger than the data, so a network that sees k z need not learn to ignore the
    noise. The factor has the shape of alpha and sigma.
    """
    return alpha * data_std**2 / (alpha**2 * data_std**2 + sigma**2)


def expected(cond, aug_logsnr):
    """The expected video given a noisy conditioning video: the noisier it is, the closer to 0. [B, F, H, W, C].

    It is the mean of unit-variance data given alpha data + sigma noise. With `data_std` below 1 the network works on
    the difference from it, so that before any training it returns the conditioning video.
    """
    return cond if aug_logsnr is None else cond * expand(alpha_sigma(aug_logsnr)[0], cond)


def _per_segment(text, text_mask, num_images):
    """Text with an axis of segments: [B, L, D] -> [B, 1, L, D]. ValueError unless every packed image has a text."""
    if text.ndim == 3:
        text, text_mask = text[:, None], text_mask[:, None]
    if text.shape[1] != 1 + num_images:
        raise ValueError(
            f"text of shape {text.shape} has {text.shape[1]} texts per sample, but a video with {num_images} images "
            f"needs {1 + num_images}: see joint.pack_text"
        )
    return text, text_mask.astype(bool)
