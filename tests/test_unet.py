"""VideoUNet: identity in time at initialisation, exact bypass of packed images, counts, inputs."""

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from ivideo import stages
from ivideo.diffusion.schedules import alpha_sigma
from ivideo.models import blocks
from ivideo.models.attention import TemporalAttention
from ivideo.models.unet import VideoUNet, estimate_scale, skip_scale

B, T, H, W, L, D = 2, 4, 8, 8, 6, 12


def unet(**changes):
    fields = dict(
        channels=(8, 16), blocks=(1, 2), strides=(1, 2), spatial_attention=(False, True), cross_attention=(True, True),
        temporal=("convolution", "attention"), head_dim=8, max_distance=8,
    )  # fmt: skip
    return VideoUNet(**{**fields, **changes})


def inputs(frames=T, texts=None, seed=0, height=H, width=W):
    rng = np.random.default_rng(seed)
    shape = (B, L, D) if texts is None else (B, texts, L, D)
    text = rng.normal(size=shape).astype(np.float32)
    mask = np.arange(L) < rng.integers(1, L + 1, shape[:-2])[..., None]
    z = rng.normal(size=(B, frames, height, width, 3)).astype(np.float32)
    return z, np.array([0.5, -2.0], np.float32), text, mask


def drawn(shapes, seed=1):
    """Parameters of the shapes with every layer awake, those that start at zero too."""
    rng = np.random.default_rng(seed)

    def draw(path, p):
        return (("scale" in str(path[-1])) + 0.15 * rng.normal(size=p.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def shapes_of(model, *args, num_images=0, **given):
    """The shapes of a network's parameters."""
    args, given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (args, given))
    return dict(traced_shapes(model, args, tuple(given.items()), num_images))


@functools.cache  # most tests have the same network
def traced_shapes(model, args, given, num_images):
    def init(args, given):
        return model.init(jax.random.key(0), *args, **given, num_images=num_images)

    return jax.eval_shape(init, args, dict(given))["params"]


def awake(model, *args, **kwargs):
    return drawn(shapes_of(model, *args, **kwargs))


def spatially_awake(model, *args):
    """Parameters drawn at random everywhere but in temporal layers, which are as they are initialised."""

    @jax.jit
    def temporal(*args):  # of the other layers nothing is compiled
        found = flax.traverse_util.flatten_dict(model.init(jax.random.key(0), *args)["params"])
        return {path: value for path, value in found.items() if any("temporal" in name for name in path)}

    flat = flax.traverse_util.flatten_dict(awake(model, *args))
    return flax.traverse_util.unflatten_dict({**flat, **temporal(*args)})


@pytest.mark.parametrize("temporal", ["attention", "convolution"])
def test_network_is_an_image_model_at_initialisation(temporal):
    """Each frame's output is the one it has alone, before any training of the temporal layers."""
    model = unet(temporal=(temporal, temporal))
    z, logsnr, text, mask = inputs()
    params = spatially_awake(model, z, logsnr, text, mask)
    apply = jax.jit(lambda z: model.apply({"params": params}, z, logsnr, text, mask))
    whole = apply(z)
    alone = jnp.concatenate([apply(z[:, i : i + 1]) for i in range(T)], axis=1)
    assert np.abs(whole).max() > 0.1
    np.testing.assert_allclose(whole, alone, atol=2e-5)


@pytest.mark.parametrize("temporal", ["attention", "convolution"])
def test_awake_temporal_layers_mix_frames(temporal):
    """The counterpart: with the temporal layers trained, a frame does depend on its neighbours."""
    model = unet(temporal=(temporal, temporal))
    z, logsnr, text, mask = inputs()
    params = awake(model, z, logsnr, text, mask)
    apply = jax.jit(lambda z: model.apply({"params": params}, z, logsnr, text, mask))
    changed = z.copy()
    changed[:, 0] += 1
    assert np.abs(apply(z)[:, 1] - apply(changed)[:, 1]).max() > 1e-3


@pytest.mark.parametrize("temporal", ["attention", "convolution"])
def test_packed_images_equal_images_alone(temporal):
    """Section 2.6: video and packed images give what they give by themselves, with every layer awake."""
    images = 3
    model = unet(temporal=(temporal, temporal))
    z, logsnr, text, mask = inputs(frames=T + images, texts=1 + images)
    mask[0, 1] = False  # an image without a text
    params = awake(model, z, logsnr, text, mask, num_images=images)

    @jax.jit
    def packed(z):
        return model.apply({"params": params}, z, logsnr, text, mask, num_images=images)

    out = packed(z)
    video = jax.jit(lambda z: model.apply({"params": params}, z, logsnr, text[:, 0], mask[:, 0]))(z[:, :T])
    np.testing.assert_allclose(out[:, :T], video, atol=2e-5)

    # an image alone: one packed image behind a video that is not looked at
    @jax.jit
    def alone(image, image_text, image_mask):
        frames = jnp.concatenate([jnp.zeros_like(image), image], axis=1)
        both, both_mask = jnp.stack([text[:, 0], image_text], 1), jnp.stack([mask[:, 0], image_mask], 1)
        return model.apply({"params": params}, frames, logsnr, both, both_mask, num_images=1)[:, 1:]

    for i in range(images):
        image = alone(z[:, T + i : T + i + 1], text[:, 1 + i], mask[:, 1 + i])
        np.testing.assert_allclose(out[:, T + i : T + i + 1], image, atol=2e-5)


def test_no_gradient_flows_between_packed_images():
    images = 2
    model = unet(temporal=("attention", "convolution"))
    z, logsnr, text, mask = inputs(frames=T + images, texts=1 + images)
    params = awake(model, z, logsnr, text, mask, num_images=images)

    @jax.jit
    def gradient(z, frame):
        def one(z):
            return jnp.take(model.apply({"params": params}, z, logsnr, text, mask, num_images=images), frame, 1).sum()

        return jnp.abs(jax.grad(one)(z)).max((0, 2, 3, 4))

    for frame in (T, T + 1):
        per_frame = gradient(z, frame)
        assert per_frame[frame] > 0.01
        np.testing.assert_array_equal(np.delete(per_frame, frame), 0)
    video = gradient(z, 0)
    assert (video[:T] > 1e-4).all()
    np.testing.assert_array_equal(video[T:], 0)


def test_scan_is_the_loop_over_its_blocks():
    """Rolled, unrolled and rematerialised levels are the same function of the same parameters, gradients too."""
    level = dict(channels=(8,), blocks=(3,), strides=(1,), spatial_attention=(False,), cross_attention=(True,))
    level["temporal"] = ("convolution",)
    args = inputs()
    params = awake(unet(**level), *args)
    results = []
    for changes in ({}, {"scan_unroll": 0}, {"remat": "full"}, {"remat": "dots"}):
        model = unet(**level, **changes)
        loss = jax.jit(jax.value_and_grad(lambda p, model=model: (model.apply({"params": p}, *args) ** 2).mean()))
        results.append(loss(params))
    for value, grads in results[1:]:
        np.testing.assert_allclose(value, results[0][0], rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, results[0][1])


def test_small_text_that_is_masked_has_no_influence():
    model = unet()
    z, logsnr, text, mask = inputs()
    mask[0] = False
    params = awake(model, z, logsnr, text, mask)
    apply = jax.jit(lambda text: model.apply({"params": params}, z, logsnr, text, mask))
    other = np.where(mask[..., None], text, 100.0 * np.arange(D, dtype=np.float32))
    out, changed = apply(text), apply(other)
    np.testing.assert_array_equal(out, changed)
    assert np.abs(apply(text[::-1]) - out)[1].max() > 1e-3  # what is not masked counts


def test_small_every_input_is_read():
    """Each conditioning changes the output of a network that has it, and is refused by one that does not."""
    given = {
        "cond": np.random.default_rng(3).normal(size=(B, T, H, W, 3)).astype(np.float32),
        "aug_logsnr": np.array([1.0, 2.0], np.float32),
        "guidance_weight": np.array([1.0, 6.0], np.float32),
    }
    model = unet(conditioned=True, guidance_input=True)
    args = inputs()
    params = awake(model, *args, **given)
    apply = jax.jit(lambda args, given: model.apply({"params": params}, *args, **given))
    out = apply(args, given)
    for name in given:
        assert np.abs(apply(args, {**given, name: given[name] + 1}) - out).max() > 1e-4, name
        with pytest.raises(ValueError, match=f"{name} was not given"):
            apply(args, {k: v for k, v in given.items() if k != name})
        with pytest.raises(ValueError, match=f"{name} was given"):
            unet().apply({"params": params}, *args, **{name: given[name]})
    assert np.abs(apply((args[0], args[1] + 1, *args[2:]), given) - out).max() > 1e-4


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 8, 8), (3, 4, 12), (7, 16, 2)])
def test_small_any_size_the_strides_divide(frames, height, width):
    model = unet()
    params = awake(model, *inputs())
    z, *rest = inputs(frames=frames, height=height, width=width)
    out = jax.eval_shape(lambda p: model.apply({"params": p}, z, *rest), params)
    assert out.shape == (B, frames, height, width, 3)


def test_small_other_sizes_are_refused_by_name():
    with pytest.raises(ValueError, match=r"9×8 .*strides \(1, 2\).*multiples of 2"):
        shapes_of(unet(), *inputs(height=9))
    with pytest.raises(ValueError, match=r"model.blocks = \(1,\) has 1 entries"):
        shapes_of(unet(blocks=(1,)), *inputs())
    with pytest.raises(ValueError, match="'conv'.*choose from"):
        shapes_of(unet(temporal=("conv", "none")), *inputs())


def test_bfloat16_activations_keep_float32_parameters():
    model = unet(dtype=jnp.bfloat16)
    args = inputs()
    params = awake(model, *args)
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    out = jax.jit(lambda p: model.apply({"params": p}, *args))(params)
    exact = jax.jit(lambda p: unet().apply({"params": p}, *args))(params)
    assert out.dtype == jnp.float32
    error = np.sqrt(np.mean((out - exact) ** 2)) / np.sqrt(np.mean(exact**2))
    assert 1e-5 < error < 0.05  # rounded, and no more than that


def test_small_temporal_convolution_both_forms():
    """The products that a CPU runs and the convolution that a TPU runs are one function: a float64 reference."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 5, 3, 4, 6)), rng.normal(size=(3, 6, 7))
    padded = np.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    wanted = sum(padded[:, i : i + 5] @ kernel[i] for i in range(3))
    x32, k32 = jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)
    np.testing.assert_allclose(blocks.convolve_frames(x32, k32), wanted, atol=1e-5)
    for form in (blocks.frames_as_products, blocks.frames_as_convolution):
        np.testing.assert_allclose(form(x32, k32), wanted, atol=1e-5)
        np.testing.assert_allclose(form(x32, k32, padding=(0, 0)), wanted[:, 1:-1], atol=1e-5)
        np.testing.assert_allclose(form(x32, k32, padding=(1, 0)), wanted[:, :-1], atol=1e-5)


def test_small_temporal_attention_against_float64():
    """Relative logits and values, written out for every pair of frames."""
    rng = np.random.default_rng(0)
    t, channels, head, reach = 5, 8, 4, 2
    layer = TemporalAttention(head, reach, jnp.float32)
    x = rng.normal(size=(1, t, 1, 1, channels)).astype(np.float32)
    params = drawn(layer.init(jax.random.key(0), x)["params"], seed=4)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    frames = x[0, :, 0, 0].astype(np.float64)
    y = (frames.reshape(t, channels, 1) - frames[..., None]).squeeze()  # groups of one channel: a single pixel is 0
    y = y * p["norm"]["groups"]["scale"] + p["norm"]["groups"]["bias"]
    q, k, v = (np.einsum("tc,cnd->tnd", y, p[name]["kernel"]) for name in "qkv")
    out = np.zeros((t, channels // head, head))
    for n in range(channels // head):
        for i in range(t):
            index = [int(np.clip(j - i, -reach, reach)) + reach for j in range(t)]
            logits = np.array([q[i, n] @ k[j, n] / head**0.5 + p["relative_bias"][index[j], n] for j in range(t)])
            weights = np.exp(logits) / np.exp(logits).sum()
            out[i, n] = sum(weights[j] * (v[j, n] + p["relative_value"][index[j], n]) for j in range(t))
    wanted = frames + np.einsum("tnd,ndc->tc", out, p["out"]["kernel"])
    np.testing.assert_allclose(layer.apply({"params": params}, x)[0, :, 0, 0], wanted, atol=1e-4)


def test_small_temporal_attention_tells_frames_apart_in_a_still_video():
    """Equal frames have equal values, so that only the relative values can say which frame is which."""
    layer = TemporalAttention(8, 8, jnp.float32)
    x = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (1, 1, 2, 2, 8)), (1, 6, 2, 2, 8))
    params = drawn(layer.init(jax.random.key(1), x)["params"])
    out = layer.apply({"params": params}, x)
    assert np.abs(out[:, 0] - out[:, -1]).max() > 0.01
    params["relative_value"] = jnp.zeros_like(params["relative_value"])
    out = layer.apply({"params": params}, x)
    np.testing.assert_allclose(out[:, 0], out[:, -1], atol=1e-5)


def test_small_pixels_fold_and_unfold():
    x = np.arange(2 * 3 * 4 * 6 * 2, dtype=np.float32).reshape(2, 3, 4, 6, 2)
    folded = blocks.space_to_depth(x, 2)
    assert folded.shape == (2, 3, 2, 3, 8)
    np.testing.assert_array_equal(np.sort(np.asarray(folded[0, 0, 0, 0])), np.sort(x[0, 0, :2, :2].ravel()))
    np.testing.assert_array_equal(blocks.depth_to_space(folded, 2), x)
    np.testing.assert_array_equal(blocks.upsample(x, 3), x.repeat(3, 2).repeat(3, 3))


def test_small_noise_fraction_and_sinusoid():
    """The angle of the cosine schedule, and sinusoids of its thousandfold, in float64."""
    logsnr = np.array([-25.0, -20.0, -3.0, 0.0, 4.0, 20.0])
    wanted = np.arctan(np.exp(-np.clip(logsnr, -20, 20) / 2)) / (np.pi / 2)
    np.testing.assert_allclose(blocks.noise_fraction(jnp.asarray(logsnr, jnp.float32)), wanted, atol=1e-6)
    position = np.array([0.0, 1.0, 250.0])
    frequency = np.exp(-np.log(1e4) * np.arange(4) / 3)
    angle = position[:, None] * frequency
    wanted = np.concatenate([np.sin(angle), np.cos(angle)], -1)
    np.testing.assert_allclose(blocks.sinusoid(jnp.asarray(position, jnp.float32), 8), wanted, atol=1e-4)


def test_small_parameter_count_by_hand():
    """One level, one block each way, every layer: counted on paper."""
    c, e, d, t = 8, 32, D, 8
    model = unet(channels=(c,), blocks=(1,), strides=(1,), spatial_attention=(True,), cross_attention=(True,),
                 temporal=("attention",))  # fmt: skip
    params = shapes_of(model, *inputs())

    def residual(inputs):
        shortcut = inputs * c + c if inputs != c else 0
        return 2 * inputs + 9 * inputs * c + c + e * 2 * c + 2 * c + 2 * c + 9 * c * c + c + shortcut

    attention = 2 * c + 4 * c * c
    cross = d + 2 * c + c * c + 2 * d * c + c * c
    temporal = attention + (2 * t + 1) * (1 + c)
    layers = attention + cross + temporal
    embeddings = (c * e + e + e * e + e) + (d + d + d * e + e + e * e + e)
    ends = 27 * c + c + 2 * c + 27 * c + 3 + 2 * d
    wanted = 2 * residual(c) + residual(2 * c) + 3 * layers + embeddings + ends
    assert sum(p.size for p in jax.tree.leaves(params)) == wanted


def test_small_paper_base_has_its_published_size():
    """5.6B parameters within 2%, counted without allocating one."""
    count = sum(p.size for p in jax.tree.leaves(stages.param_shapes(base.get_config("paper"))))
    assert abs(count / 5.6e9 - 1) < 0.02


@pytest.mark.parametrize("std", [0.1, 0.5, 1.0])
def test_small_skip_and_scale_leave_a_target_of_unit_variance(std):
    """Of Gaussian data: without the network's part v is that of E[x | z], and that part has variance 1."""
    logsnr = np.linspace(-12, 12, 9)
    alpha, sigma = (np.sqrt(1 / (1 + np.exp(s * logsnr))) for s in (-1, 1))
    skip, scale = (np.asarray(x, np.float64) for x in skip_scale(*alpha_sigma(logsnr), std))
    mean = alpha * std**2 / (alpha**2 * std**2 + sigma**2)  # E[x | z] / z
    np.testing.assert_allclose(alpha - sigma * skip, mean, rtol=1e-4)
    # v - skip z = (alpha - skip sigma) eps - (sigma + skip alpha) x
    variance = (alpha - skip * sigma) ** 2 + (sigma + skip * alpha) ** 2 * std**2
    np.testing.assert_allclose(variance / scale**2, 1, rtol=1e-3)
    np.testing.assert_allclose(estimate_scale(*alpha_sigma(logsnr), std), mean, rtol=1e-4)
    if std == 1:
        np.testing.assert_allclose([skip, scale], [np.zeros(9), np.ones(9)], rtol=1e-6)


def test_network_starts_from_what_it_is_given():
    """With its last layer at zero, as it is initialised: v of E[x | z], for x of deviation 1/2 about the conditioning.

    The conditioning is alpha' video + sigma' noise; of a video of unit variance it lets expect alpha' times itself.
    """
    model = unet(data_std=0.5, conditioned=True)
    z, logsnr, text, mask = inputs()
    cond, level = (1 - z) / 2, np.array([3.0, 1.0], np.float32)
    given = {"cond": cond, "aug_logsnr": level}
    params = drawn(shapes_of(model, z, logsnr, text, mask, **given))
    params["out"] = jax.tree.map(np.zeros_like, params["out"])
    v = jax.jit(lambda z, given: model.apply({"params": params}, z, logsnr, text, mask, **given))(z, given)
    alpha, sigma = (np.sqrt(1 / (1 + np.exp(s * logsnr)))[:, None, None, None, None] for s in (-1, 1))
    mean = cond * np.sqrt(1 / (1 + np.exp(-level)))[:, None, None, None, None]
    x = mean + alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * (z - alpha * mean)
    eps = (z - alpha * x) / sigma
    np.testing.assert_allclose(v, alpha * eps - sigma * x, atol=2e-5)


def test_network_that_knows_data_std_does_not_see_noise_that_drowns_the_difference():
    """At a log-SNR of -16 its x is the same whatever the noise, though no weight is zero."""
    model = unet(data_std=0.05, conditioned=True)
    z, _, text, mask = inputs()
    given = {"cond": (1 - z) / 2, "aug_logsnr": np.array([3.0, 1.0], np.float32)}
    logsnr = np.full(2, -16, np.float32)
    alpha, sigma = (np.sqrt(1 / (1 + np.exp(s * logsnr)))[:, None, None, None, None] for s in (-1, 1))
    params = drawn(shapes_of(model, z, logsnr, text, mask, **given))
    v_fn = jax.jit(lambda z: model.apply({"params": params}, z, logsnr, text, mask, **given))
    x, other = (alpha * y - sigma * v_fn(y) for y in (z, z[::-1] + 1))
    np.testing.assert_allclose(x, other, atol=1e-4)
    assert np.std(x - given["cond"]) > 0.01  # what the network adds, of deviation 0.05 or so


def test_eps_and_x_networks_return_their_v():
    """The same weights read as eps or x: v = (F - sigma z) / alpha or (alpha z - F) / sigma of their F, read as v."""
    z, logsnr, text, mask = inputs()
    light = dict(channels=(8,), blocks=(1,), strides=(1,), cross_attention=(False,), spatial_attention=(False,))
    light["temporal"] = ("none",)
    params = awake(unet(**light), z, logsnr, text, mask)
    out, v, from_x = (
        jax.jit(unet(prediction=kind, **light).apply)({"params": params}, z, logsnr, text, mask)
        for kind in ("v", "eps", "x")
    )
    alpha, sigma = (np.sqrt(1 / (1 + np.exp(s * logsnr)))[:, None, None, None, None] for s in (-1, 1))
    np.testing.assert_allclose(v, (out - sigma * z) / alpha, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(from_x, (alpha * z - out) / sigma, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="with 'eps' it must be 1"):
        unet(prediction="eps", data_std=0.5).check(H, W)
    with pytest.raises(ValueError, match="model.prediction = 'score': choose one of v, eps, x"):
        unet(prediction="score").check(H, W)
