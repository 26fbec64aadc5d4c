"""Text: tokenizers, and the frozen encoder whose embeddings condition the stages. Section 2.2."""

import dataclasses
import functools
import hashlib
import importlib.resources
import json
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ivideo.devices import sharding
from ivideo.errors import UserError
from ivideo.files import exists
from ivideo.prompts import one_line
from ivideo.text.arrays import inside
from ivideo.text.checkpoints import Checkpoint, open_checkpoint, read_array
from ivideo.text.t5 import T5Encoder
from ivideo.text.tokenizers import BYTE_VOCAB, Bytes, SentencePiece

SHIPPED = "demo/weights/text.safetensors"
SIZES = ("vocab", "dim", "layers", "heads", "head_dim", "ff")
DTYPES = ("float32", "bfloat16")
_SMALL_MATRIX = 2**14  # elements; a fingerprint reads one row of larger matrices
VOCABULARY = "spiece.model"  # the sentencepiece model's name in Hugging Face directories
HOW_TO_GET = (
    "T5-XXL is published as T5X, gs://t5-data/pretrained_models/t5x/t5_1_1_xxl/checkpoint_1000000 with "
    "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model as config.text.tokenizer, and on Hugging Face, "
    "google/t5-v1_1-xxl, to be saved as safetensors"
)


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """A frozen encoder with its tokenizer, on `mesh` or on one device.

    `fingerprint` is a hash of everything that determines the embeddings: parameters, tokenizer, dtype and length. It
    does not depend on the format of the checkpoint. It is computed on first use, from all vectors and small matrices
    and one row of each large matrix. `tokenizer`, (texts, length) -> (tokens, mask), is also loaded on first use:
    UserError where the checkpoint has none and no path was given.
    """

    module: T5Encoder
    params: Any
    length: int
    checkpoint: Checkpoint
    tokenizer_path: str = ""
    mesh: Any = None

    @functools.cached_property
    def tokenizer(self) -> Callable[[list[str], int], tuple[np.ndarray, np.ndarray]]:
        return _tokenizer(self.checkpoint, self.tokenizer_path)

    @functools.cached_property
    def fingerprint(self) -> str:
        return _fingerprint(self.checkpoint, self.tokenizer, self.length, self.module.dtype)

    def tokenize(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Texts to tokens [B, L] int32 and mask [B, L] bool. The texts are normalised as training captions are."""
        return self.tokenizer([one_line(text) for text in texts], self.length)

    def encode(self, tokens, mask) -> jax.Array:
        """Tokens [..., L] and mask [..., L] to embeddings [..., L, D] float32, zero where the mask is False."""
        return _encode(self.module, self.mesh, self.params, tokens, mask)


def encode(module, params, tokens, mask):
    """As `TextEncoder.encode`, but with the parameters as an argument, for use inside a jitted step."""
    lead, length = tokens.shape[:-1], tokens.shape[-1]
    out = module.apply({"params": params}, tokens.reshape(-1, length), mask.reshape(-1, length))
    return jax.lax.stop_gradient(out).astype(jnp.float32).reshape(*lead, length, -1)


def from_bits(bits):
    """Embeddings from a cache, bfloat16 bits as uint16, to float32."""
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode(module, mesh, params, tokens, mask):
    with sharding.layout(mesh):
        return encode(module, params, tokens, mask)


def encoder_module(text_config) -> T5Encoder:
    """The network that a stage's `text` config describes."""
    sizes = {name: text_config[name] for name in SIZES}
    return T5Encoder(**sizes, dtype=jnp.dtype(text_config.dtype))


def load_encoder(source, *, length: int = 256, dtype: str = "float32", tokenizer: str = "", mesh=None) -> TextEncoder:
    """Loads an encoder from a checkpoint's path, or from a stage's `text` config, which sets everything but the mesh.

    A path names a T5X directory, a Hugging Face directory or a safetensors file (`ivideo.text.checkpoints`), on this
    machine or in a bucket (gs://…). A config's empty `checkpoint` is the encoder in the package. `tokenizer` is the
    path of a sentencepiece model, local or in a bucket; if it is empty, spiece.model in the directory is used, or bytes
    for ByT5's vocabulary. An encoder loaded by path works without a tokenizer until the tokenizer is used; for a
    config, a missing tokenizer is an error at once. `length` is in tokens. `dtype`, of parameters and arithmetic, is
    float32 or bfloat16. Parameters are split over `mesh`; None places them on one device.

    UserError where files are missing, damaged, or of other sizes than the config's.
    """
    if by_path := isinstance(source, str | os.PathLike):
        checkpoint = open_checkpoint(os.fspath(source))
    else:
        checkpoint = _open_configured(source)
        length, dtype, tokenizer = source.length, source.dtype, source.tokenizer
    if dtype not in DTYPES:
        raise UserError(f"a text encoder's dtype is {dtype!r}: choose one of {', '.join(DTYPES)}")
    if tokenizer or not by_path or exists(os.path.join(checkpoint.path, VOCABULARY)):
        _tokenizer(checkpoint, tokenizer)  # fails here, before gigabytes of parameters are read
    module = T5Encoder(**checkpoint.sizes, dtype=jnp.dtype(dtype))
    params = _placed(checkpoint, module, mesh)
    return TextEncoder(module, params, length, checkpoint, tokenizer, mesh)


def fingerprint(text_config) -> str:
    """The fingerprint of the encoder that a config names, without loading it."""
    checkpoint = _open_configured(text_config)
    tokenize = _tokenizer(checkpoint, text_config.tokenizer)
    return _fingerprint(checkpoint, tokenize, text_config.length, text_config.dtype)


def caption_check(text_config) -> Callable[[str], bool]:
    """A function that says whether a caption has more tokens than `length` of a stage's `text` config.

    It needs the tokenizer alone. UserError where there is none.
    """
    tokenize, length = tokenizer_of(text_config), text_config.length
    return lambda caption: bool(tokenize([one_line(caption)], length + 1)[1].sum() > length)


def tokenizer_of(text_config) -> Bytes | SentencePiece:
    """The tokenizer of a stage's `text` config, without its encoder. UserError where there is none."""
    if text_config.tokenizer:
        return SentencePiece.load(text_config.tokenizer, text_config.vocab)
    return _tokenizer(_open_configured(text_config), "")


def _open_configured(text_config) -> Checkpoint:
    if text_config.checkpoint is None:
        raise UserError(
            "config.text.checkpoint is not set: give a T5 encoder with --config.text.checkpoint=PATH, a T5X or Hugging "
            f"Face directory or a safetensors file. {HOW_TO_GET}"
        )
    checkpoint = open_checkpoint(text_config.checkpoint or str(importlib.resources.files("ivideo") / SHIPPED))
    for name in SIZES:
        if checkpoint.sizes[name] != text_config[name]:
            raise UserError(
                f"{checkpoint.path} is another model's: its {name} is {checkpoint.sizes[name]}, and "
                f"config.text.{name} = {text_config[name]}; give another checkpoint, or set its sizes in config.text"
            )
    return checkpoint


def _tokenizer(checkpoint: Checkpoint, path: str):
    vocab = checkpoint.sizes["vocab"]
    if not path and exists(os.path.join(checkpoint.path, VOCABULARY)):
        path = inside(checkpoint.path, VOCABULARY)
    if path:
        return SentencePiece.load(path, vocab)
    if vocab == BYTE_VOCAB:
        return Bytes()
    raise UserError(
        f"{checkpoint.path} has no {VOCABULARY}, and its vocabulary of {vocab} is not that of bytes ({BYTE_VOCAB}): "
        "give its sentencepiece model with --config.text.tokenizer=FILE; T5's is "
        "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model"
    )


def _placed(checkpoint: Checkpoint, module: T5Encoder, mesh):
    """The parameters in the module's dtype on their devices. Each is cast and placed before the next is read."""
    import flax.traverse_util

    shapes = {name: jax.ShapeDtypeStruct(array.shape, module.dtype) for name, array in checkpoint.params.items()}
    tree = flax.traverse_util.unflatten_dict(shapes, sep="/")
    where = None if mesh is None else flax.traverse_util.flatten_dict(sharding.param_shardings(mesh, tree), sep="/")

    def place(name):
        value = np.ascontiguousarray(read_array(checkpoint, name).astype(module.dtype))
        return jax.device_put(value) if where is None else sharding.from_host(value, where[name])

    return flax.traverse_util.unflatten_dict({name: place(name) for name in checkpoint.params}, sep="/")


def _fingerprint(checkpoint: Checkpoint, tokenize, length: int, dtype) -> str:
    """A hash of the sizes, of all vectors and small matrices, and, to be quick, of one row of each large matrix."""
    digest, dtype = hashlib.sha256(), jnp.dtype(dtype).name
    described = {"sizes": checkpoint.sizes, "length": length, "dtype": dtype, "tokenizer": tokenize.fingerprint}
    digest.update(json.dumps(described, sort_keys=True).encode())
    for name in sorted(checkpoint.params):
        shape = checkpoint.params[name].shape
        small = len(shape) == 1 or math.prod(shape) < _SMALL_MATRIX
        value = read_array(checkpoint, name, () if small else (0,))
        digest.update(np.ascontiguousarray(value.astype(jnp.dtype(dtype))).tobytes())
    return digest.hexdigest()
