"""Text: tokens, and the frozen encoder that turns them into what the stages are conditioned on. Section 2.2."""

import dataclasses
import functools
import importlib.resources
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ivideo.errors import UserError
from ivideo.export import load_params
from ivideo.text.t5 import T5Encoder
from ivideo.text.tokenizers import byte_tokens

SHIPPED = "demo/weights/text.safetensors"


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """A frozen encoder with its tokenizer."""

    module: T5Encoder
    params: Any
    length: int
    tokenize: Callable[[list[str]], tuple[np.ndarray, np.ndarray]]

    def encode(self, tokens, mask):
        """Tokens [..., L] and mask [..., L] to embeddings [..., L, D] float32."""
        return encode(self.module, self.params, tokens, mask)


def encode(module, params, tokens, mask):
    """As `TextEncoder.encode`, with the parameters as an argument, for use inside a jitted step."""
    lead, length = tokens.shape[:-1], tokens.shape[-1]
    out = module.apply({"params": params}, tokens.reshape(-1, length), mask.reshape(-1, length))
    return jax.lax.stop_gradient(out).astype(jnp.float32).reshape(*lead, length, -1)


def encoder_module(text_config) -> T5Encoder:
    """The network that a stage's `text` config describes."""
    sizes = {name: text_config[name] for name in ("vocab", "dim", "layers", "heads", "ff", "head_dim")}
    return T5Encoder(**sizes)


def load_encoder(text_config) -> TextEncoder:
    """The encoder a config names: `checkpoint` is a safetensors file, or empty for the one in the package.

    Raises UserError where the file is missing, damaged or of another size.
    """
    module = encoder_module(text_config)
    if text_config.checkpoint is None:
        raise UserError(
            f"config.text.checkpoint is not set: give a safetensors file of a T5 encoder of width {text_config.dim} "
            "with --config.text.checkpoint=FILE"
        )
    path = text_config.checkpoint or str(importlib.resources.files("ivideo") / SHIPPED)
    tokens = jax.ShapeDtypeStruct((1, text_config.length), jnp.int32)
    like = jax.eval_shape(module.init, jax.random.key(0), tokens, tokens)["params"]
    params = load_params(path, like)
    return TextEncoder(module, params, text_config.length, functools.partial(byte_tokens, length=text_config.length))
