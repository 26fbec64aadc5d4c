"""Trains the demo cascade's small byte encoder, which replaces T5-XXL (Section 2.2), before any stage is trained.

In the first part, a linear map of a caption's mean embedding predicts its shape, colour, background and motion. An
attribute that is linear in the embedding is easy for a stage to attend to. But the embedding of "blue" may still depend
on the shape that is blue, and stages then fail at combinations that they were not trained on. The second part reduces
that dependence: the encoder is fitted to its own embeddings, averaged over the shapes, and for the shape's word over
the colours. The held-out captions are never used for training.
"""

import functools
import string
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ivideo.data import shapes
from ivideo.files import refuse_existing
from ivideo.text import encode, encoder_module
from ivideo.text.tokenizers import byte_tokens
from ivideo.weights import config_metadata, save_params

CHOICES = (shapes.SHAPES, tuple(shapes.COLOURS), tuple(shapes.BACKGROUNDS), shapes.MOTIONS)
ABSENT = -1  # label of an attribute that a caption does not mention
# Chances of the ways in which a training caption is varied
NO_BACKGROUND = 0.15
NO_MOTION = 0.15
NO_ARTICLES = 0.2
CAPITALS = 0.2  # of which this share is all capitals, the rest begins with one
ALL_CAPITALS = 0.3
FULL_STOP = 0.1
RANDOM_WORD = 0.5  # chance that a random word of 4 to 8 letters replaces the shape
# Training
CLIP_NORM = 1.0  # of the gradient
WARMUP_STEPS = 100
COMPOSITION_WARMUP_STEPS = 50
LOG_EVERY = 100  # steps


class Probe(nn.Module):
    """The encoder and a linear map to the attributes: tokens, mask [B, L] -> a list of logits [B, choices]."""

    encoder: nn.Module

    @nn.compact
    def __call__(self, tokens, mask):
        x = self.encoder(tokens, mask)
        mean = x.sum(1) / mask.sum(1, keepdims=True)
        return [nn.Dense(len(choices))(mean) for choices in CHOICES]


def labels(attributes: shapes.Attributes) -> np.ndarray:
    """The index of each of the four attributes among its choices: [4] int32."""
    return np.array([choices.index(value) for choices, value in zip(CHOICES, attributes, strict=True)], np.int32)


def phrase(rng: np.random.Generator, attributes: shapes.Attributes) -> tuple[str, np.ndarray]:
    """A varied caption and its labels. Variations leave out parts or articles, or change capitals."""
    text, wanted = shapes.caption(attributes), labels(attributes)
    subject, background = text.split(" on ")
    if rng.random() < NO_BACKGROUND:
        background, wanted[2] = "", ABSENT
    if rng.random() < NO_MOTION:
        subject, wanted[3] = " ".join(subject.split(" ")[:3]), ABSENT
    text = f"{subject} on {background}" if background else subject
    if rng.random() < NO_ARTICLES:
        text = text.removeprefix("a ").replace(" a ", " ")
    if rng.random() < CAPITALS:
        text = text.upper() if rng.random() < ALL_CAPITALS else text.capitalize()
    return text + "." * (rng.random() < FULL_STOP), wanted


def batch_of(rng: np.random.Generator, size: int, length: int):
    """Varied training captions: tokens, mask [B, L] and labels [B, 4], ABSENT if the text lacks the attribute."""
    chosen = [shapes.TRAIN[i] for i in rng.integers(len(shapes.TRAIN), size=size)]
    texts, wanted = zip(*(phrase(rng, a) for a in chosen), strict=True)
    return *byte_tokens(list(texts), length), np.stack(wanted)


def shape_span(attributes: shapes.Attributes) -> tuple[int, int, int]:
    """The tokens (begin, end) of a caption's word for the shape, and the end of the caption."""
    text = shapes.caption(attributes)
    start = text.index(attributes.shape)
    return start, start + len(attributes.shape), len(text) + 1


def composed(embed) -> dict[shapes.Attributes, np.ndarray]:
    """Embeddings of the training captions in which colour and shape are independent, [tokens, D] per caption.

    `embed(texts) -> [N, L, D]`. The tokens of the shape's word get their mean over the colours, all other tokens their
    mean over the shapes, both with the same background and motion.
    """
    known = dict(zip(shapes.TRAIN, embed([shapes.caption(a) for a in shapes.TRAIN]), strict=True))
    targets = {}
    for a in shapes.TRAIN:
        other_shapes = [b for b in (a._replace(shape=s) for s in shapes.SHAPES) if b in known]
        other_colours = [b for b in (a._replace(colour=c) for c in shapes.COLOURS) if b in known]
        spans = {b: shape_span(b) for b in (*other_shapes, *other_colours)}
        before = np.mean([known[b][: spans[b][0]] for b in other_shapes], axis=0)
        name = np.mean([known[b][slice(*spans[b][:2])] for b in other_colours], axis=0)
        after = np.mean([known[b][slice(*spans[b][1:])] for b in other_shapes], axis=0)
        targets[a] = np.concatenate([before, name, after])
    return targets


def composed_batch(rng: np.random.Generator, targets, size: int, length: int):
    """Training captions with their `composed` embeddings: tokens, mask [B, L], embeddings [B, L, D], weights [B, L].

    In half of the captions a random word replaces the shape, with weight zero: the other tokens must not depend on it.
    """
    texts, wanted, weights = [], [], []
    for i in rng.integers(len(shapes.TRAIN), size=size):
        a = shapes.TRAIN[i]
        text, target = shapes.caption(a), targets[a]
        weight = np.ones(len(target), np.float32)
        if rng.random() < RANDOM_WORD:
            start, stop, _ = shape_span(a)
            word = "".join(rng.choice(list(string.ascii_lowercase), rng.integers(4, 9)))
            text = text[:start] + word + text[stop:]
            gap = np.zeros((len(word), target.shape[1]), np.float32)
            target = np.concatenate([target[:start], gap, target[stop:]])
            weight = np.concatenate([weight[:start], gap[:, 0], weight[stop:]])
        texts.append(text)
        wanted.append(np.pad(target, ((0, length - len(target)), (0, 0))))
        weights.append(np.pad(weight, (0, length - len(weight))))
    return *byte_tokens(texts, length), np.stack(wanted), np.stack(weights)


def fit(name: str, loss_fn, params, next_batch, learning_rate: optax.Schedule, steps: int):
    """The parameters after `steps` steps of Adam on `loss_fn(params, *next_batch())`."""
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP_NORM), optax.adam(learning_rate))
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, *batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    for i in range(1, steps + 1):
        params, opt_state, loss = step(params, opt_state, *next_batch())
        if i % LOG_EVERY == 0:
            print(f"{name} step {i}/{steps}  loss {float(loss):.4f}", file=sys.stderr, flush=True)
    return params


def compose(config, module, params, *, steps=600, batch_size=64, learning_rate=1e-3):
    """Trains the second part, composition. Returns the encoder's parameters."""

    def embed(texts):
        return np.asarray(jax.jit(functools.partial(encode, module))(params, *byte_tokens(texts, config.text.length)))

    rng = np.random.default_rng(config.seed + 1)
    targets = composed(embed)
    scale = np.mean(np.concatenate(list(targets.values())) ** 2)

    def loss_fn(params, tokens, mask, wanted, weights):
        error = ((module.apply({"params": params}, tokens, mask) - wanted) ** 2).mean(-1)
        return (error * weights).sum() / weights.sum() / scale

    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, COMPOSITION_WARMUP_STEPS, steps)
    next_batch = functools.partial(composed_batch, rng, targets, batch_size, config.text.length)
    return fit("text composition", loss_fn, params, next_batch, schedule, steps)


def train_text(config, out: str, *, steps=600, batch_size=64, learning_rate=1e-3, overwrite=False) -> float:
    """Trains the encoder of `config.text` and writes it to `out`, a safetensors file.

    Prints and returns the share of held-out captions of which all four attributes are predicted correctly.
    """
    refuse_existing([out], overwrite=overwrite)
    rng = np.random.default_rng(config.seed)
    probe = Probe(encoder_module(config.text))
    tokens, mask, _ = batch_of(rng, 2, config.text.length)
    params = probe.init(jax.random.key(config.seed), tokens, mask)["params"]

    def loss_fn(params, tokens, mask, wanted):
        logits = probe.apply({"params": params}, tokens, mask)
        losses = [
            optax.softmax_cross_entropy_with_integer_labels(l, jnp.maximum(w, 0)) * (w != ABSENT)
            for l, w in zip(logits, wanted.T, strict=True)
        ]
        return sum(losses).mean()

    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, WARMUP_STEPS, steps)
    next_batch = functools.partial(batch_of, rng, batch_size, config.text.length)
    params = fit("text", loss_fn, params, next_batch, schedule, steps)
    params = {**params, "encoder": compose(config, probe.encoder, params["encoder"], steps=steps)}
    tokens, mask = byte_tokens([shapes.caption(a) for a in shapes.HELD_OUT], config.text.length)
    predicted = np.stack([l.argmax(-1) for l in probe.apply({"params": params}, tokens, mask)], axis=-1)
    correct = (predicted == np.stack([labels(a) for a in shapes.HELD_OUT])).all(-1).mean()
    save_params(out, params["encoder"], metadata=config_metadata(config), overwrite=overwrite)
    print(f"{out}: all attributes of {correct:.1%} of the held-out captions are predicted correctly")
    return float(correct)
