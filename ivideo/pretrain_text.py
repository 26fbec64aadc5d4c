"""Trains the small byte encoder that the demo cascade ships in place of T5-XXL (Section 2.2), before any stage.

The task is to name a caption's shape, colour, background and motion from the mean of its embeddings, by one linear map:
what is linear there is easy for a stage to attend to. Captions of the held-out combinations are never shown.
"""

import os
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ivideo.data import shapes
from ivideo.errors import UserError
from ivideo.export import config_metadata, save_params
from ivideo.text import encoder_module
from ivideo.text.tokenizers import byte_tokens

CHOICES = (shapes.SHAPES, tuple(shapes.COLOURS), tuple(shapes.BACKGROUNDS), shapes.MOTIONS)
ABSENT = -1


class Probe(nn.Module):
    """The encoder and the linear map it is trained through: tokens, mask [B, L] -> a list of logits [B, choices]."""

    encoder: nn.Module

    @nn.compact
    def __call__(self, tokens, mask):
        x = self.encoder(tokens, mask)
        mean = x.sum(1) / mask.sum(1, keepdims=True)
        return [nn.Dense(len(choices))(mean) for choices in CHOICES]


def labels(attributes: shapes.Attributes) -> np.ndarray:
    """An attribute's place among its choices, for each of the four: [4] int32."""
    return np.array([choices.index(value) for choices, value in zip(CHOICES, attributes, strict=True)], np.int32)


def phrase(rng: np.random.Generator, attributes: shapes.Attributes) -> tuple[str, np.ndarray]:
    """A caption as people vary it, and the labels it still tells: parts left out, no article, capitals."""
    text, wanted = shapes.caption(attributes), labels(attributes)
    subject, background = text.split(" on ")
    if rng.random() < 0.15:
        background, wanted[2] = "", ABSENT
    if rng.random() < 0.15:
        subject, wanted[3] = " ".join(subject.split(" ")[:3]), ABSENT
    text = f"{subject} on {background}" if background else subject
    if rng.random() < 0.2:
        text = text.removeprefix("a ").replace(" a ", " ")
    if rng.random() < 0.2:
        text = text.upper() if rng.random() < 0.3 else text.capitalize()
    return text + "." * (rng.random() < 0.1), wanted


def batch_of(rng: np.random.Generator, size: int, length: int):
    """Varied training captions: tokens, mask [B, L] and labels [B, 4], ABSENT where the text does not tell."""
    chosen = [shapes.TRAIN[i] for i in rng.integers(len(shapes.TRAIN), size=size)]
    texts, wanted = zip(*(phrase(rng, a) for a in chosen), strict=True)
    return *byte_tokens(list(texts), length), np.stack(wanted)


def train_text(config, out: str, *, steps=600, batch_size=64, learning_rate=1e-3, overwrite=False) -> float:
    """Trains the encoder that `config.text` describes and writes it to `out`, a safetensors file.

    Prints and returns the share of the held-out captions whose four attributes are all named right.
    """
    if os.path.exists(out) and not overwrite:
        raise UserError(f"{out} exists: choose another --out, or pass --overwrite to replace it")
    rng = np.random.default_rng(config.seed)
    probe = Probe(encoder_module(config.text))
    tokens, mask, _ = batch_of(rng, 2, config.text.length)
    params = probe.init(jax.random.key(config.seed), tokens, mask)["params"]
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, 100, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    opt_state = optimizer.init(params)

    def loss_fn(params, tokens, mask, wanted):
        logits = probe.apply({"params": params}, tokens, mask)
        losses = [
            optax.softmax_cross_entropy_with_integer_labels(l, jnp.maximum(w, 0)) * (w != ABSENT)
            for l, w in zip(logits, wanted.T, strict=True)
        ]
        return sum(losses).mean()

    @jax.jit
    def step(params, opt_state, *batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, loss

    for i in range(1, steps + 1):
        params, opt_state, loss = step(params, opt_state, *batch_of(rng, batch_size, config.text.length))
        if i % 100 == 0:
            print(f"text step {i}/{steps}  loss {float(loss):.4f}", file=sys.stderr, flush=True)

    tokens, mask = byte_tokens([shapes.caption(a) for a in shapes.HELD_OUT], config.text.length)
    named = np.stack([l.argmax(-1) for l in probe.apply({"params": params}, tokens, mask)], axis=-1)
    right = (named == np.stack([labels(a) for a in shapes.HELD_OUT])).all(-1).mean()
    save_params(out, params["encoder"], metadata=config_metadata(config), overwrite=overwrite)
    print(f"{out}: names all of {right:.1%} of the held-out captions")
    return float(right)
