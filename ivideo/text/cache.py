"""Embeddings of captions, made once and read in training in place of running the encoder.

A cache is a folder, made on this machine or in a bucket (gs://…) and read on this machine. Its `encoder.json` says what
made it and how many shards there are, and every shard is a pair of files, `texts-00000-of-00025.array_record` with a
record a caption and `texts-00000-of-00025.keys.npy` with their keys. `index.json`, written last, says that all are
there. A record is a caption's key and the bits of its embedding, [tokens, D] in bfloat16, without padding. A key is the
beginning of the SHA-256 of the caption. Captions are put into shards by their keys and sorted by them, so that neither
their order nor how often one occurs changes a file, and a caption is found by bisection.
"""

import collections
import dataclasses
import functools
import glob
import hashlib
import logging
import os

import jax
import ml_dtypes
import numpy as np
import tqdm
from array_record.python import array_record_module

from ivideo import files
from ivideo.devices import agreeing, sharding
from ivideo.errors import UserError
from ivideo.prompts import one_line, read_lines
from ivideo.text import TextEncoder, fingerprint, from_bits, load_encoder

VERSION = 1
KEY = 16  # bytes
PER_SHARD = 4096  # captions, about
OPEN = 128  # shards that are open at a time, each a file: a process may have about a thousand
PLAN, INDEX = "encoder.json", "index.json"
_ORDERED = np.dtype(f"S{KEY}")  # how keys compare
_COPY = "copy the whole cache again, or run the command that made it"
_WORDS = {"fingerprint": "encoder or tokenizer", "dim": "width"}


def key_of(caption: str) -> bytes:
    """What a caption is found by."""
    return hashlib.sha256(caption.encode()).digest()[:KEY]


def shard_of(key: bytes, shards: int) -> int:
    """The shard of a key: equal ranges, in order."""
    return int.from_bytes(key[:8]) * shards >> 64


def read_captions(path: str) -> list[str]:
    """The distinct captions of a text file, one per line (`read_lines`), in no order."""
    return list({key_of(caption): caption for caption in read_lines(path, "--captions")}.values())


def encode_captions(config, path: str, out: str) -> None:
    """Makes the cache of a file's captions, and of the config's sample prompts, in the folder `out`.

    The same call again goes on where it was stopped. Shards are divided over the processes of `jax.distributed`, and a
    batch of each over its devices. UserError, before anything is written, where the captions or the encoder cannot be
    read, or `out` is of others.
    """
    captions = {key_of(caption): caption for caption in (*read_captions(path), *sample_prompts(config))}
    captions = [captions[key] for key in sorted(captions)]
    shards = -(-len(captions) // PER_SHARD)
    mesh = sharding.make_mesh(config.text.mesh, jax.local_devices())
    encoder = load_encoder(config.text, mesh=mesh)
    digest = hashlib.sha256("\n".join(captions).encode()).hexdigest()
    begin(out, config.text, encoder.fingerprint, shards=shards, of=digest)
    parts = [[] for _ in range(shards)]
    for caption in captions:
        parts[shard_of(key_of(caption), shards)].append(caption)
    mine = range(jax.process_index(), shards, jax.process_count())
    with tqdm.tqdm(total=sum(len(parts[i]) for i in mine), unit="caption", desc="encoding") as bar:
        for i in mine:
            if not _is_whole(shard_path(out, i, shards)):
                write_shard(out, i, shards, parts[i], encoder, batch=config.text.batch)
            bar.update(len(parts[i]))
    _wait("encoded")
    if jax.process_index() == 0:
        count, size = finish(out)
        print(summary(out, count, size))


def sample_prompts(config) -> list[str]:
    """The config's sample prompts, as captions."""
    return [caption for prompt in config.train.sample_prompts if (caption := one_line(prompt))]


def summary(out: str, count: int, size: int | None) -> str:
    """A finished cache in a line."""
    sizes = f", {size / 1e6:,.1f} MB, {size / count:,.0f} MB a million" if size is not None else ""
    return f"{out}: {count:,} captions{sizes}"


def _wait(name: str) -> None:
    """All processes wait for one another."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"text cache {name}")


def shard_path(out: str, i: int, shards: int) -> str:
    """The file of a shard's records."""
    return os.path.join(out, f"texts-{i:05}-of-{shards:05}.array_record")


def _keys(shard: str) -> str:
    return shard.removesuffix(".array_record") + ".keys.npy"


def begin(out: str, text_config, fingerprint: str, *, shards: int, of: str) -> None:
    """Writes what a cache will be of, or finds that the one there is of the same.

    `fingerprint`: the encoder's; `of`: what tells these captions from others. UserError where `out` is of others.
    """
    plan = {
        "version": VERSION, "fingerprint": fingerprint, "shards": shards, "captions": of,
        "dim": text_config.dim, "length": text_config.length,
    }  # fmt: skip
    path = os.path.join(out, PLAN)
    if not files.in_bucket(out):
        agreeing.check_shared(out)
    there = files.read_json(path) if files.exists(path) else None
    if there is not None:
        different = [name for name in plan if plan[name] != there.get(name)]
        if different:
            raise UserError(
                f"--out={out} is a cache of other {' and '.join(_WORDS.get(name, name) for name in different)}: choose "
                "another folder"
            )
    elif (files.in_bucket(out) or os.path.isdir(out)) and files.list_names(out):
        raise UserError(f"--out={out} is a folder with other files: choose another, or an empty one")
    _wait("looked")  # what is wrong, all have seen
    if there is None and jax.process_index() == 0:
        if not files.in_bucket(out):
            os.makedirs(out, exist_ok=True)
        files.write_json(path, plan)
    _wait("begun")


def check_encoder(out: str, fingerprint: str) -> None:
    """UserError where a worker's encoder is not the one that the cache was begun with."""
    wanted = files.read_json(os.path.join(out, PLAN))["fingerprint"]
    if fingerprint != wanted:
        raise UserError(
            f"this worker's encoder or tokenizer is {fingerprint[:12]}, and {out} was begun with {wanted[:12]}: give "
            "config.text.checkpoint as a path at which all workers find the same files"
        )


def write_shard(out: str, i: int, shards: int, captions: list[str], encoder: TextEncoder, *, batch: int) -> None:
    """A shard of these captions: its keys, then its records, neither there before it is whole."""
    captions, keys = sorted(captions, key=key_of), keys_of(captions)
    path = shard_path(out, i, shards)
    found = embeddings(captions, encoder, batch=batch) if captions else []
    with files.atomic_write(path) as temporary:
        writer = array_record_module.ArrayRecordWriter(temporary, "group_size:1,uncompressed")
        for key, embedding in zip(keys, found, strict=True):
            writer.write(key.tobytes() + embedding.tobytes())
        writer.close()
        with files.atomic_write(_keys(path)) as other, open(other, "wb") as f:
            np.save(f, keys)


def keys_of(captions: list[str]) -> np.ndarray:
    """The keys of a shard's captions in their order, [N, KEY] uint8."""
    return np.frombuffer(b"".join(sorted(map(key_of, captions))), np.uint8).reshape(-1, KEY)


def check_shard(out: str, i: int, shards: int, captions: list[str]) -> None:
    """UserError where a shard that is there is not of these captions."""
    if not np.array_equal(_read_keys(shard_path(out, i, shards)), keys_of(captions)):
        raise UserError(f"--out={out} is a cache of other captions: choose another folder")


def _read_keys(shard: str) -> np.ndarray:
    """[N, KEY] uint8. UserError where the file is not there or damaged."""
    try:
        with files.open_read(_keys(shard)) as f:
            return np.load(f).reshape(-1, KEY)
    except (OSError, ValueError, EOFError) as e:
        raise UserError(f"{_keys(shard)} cannot be read ({e}): {_COPY}") from e


def _is_whole(shard: str) -> bool:
    """Whether a shard is there and whole; of one in a bucket, where files are whole, whether it is there."""
    if not files.exists(shard):
        return False
    try:
        if not files.in_bucket(shard):
            _open_shard(shard)
        return True
    except UserError as e:
        logging.getLogger("ivideo").warning("%s: made again", str(e).removesuffix(f": {_COPY}"))
        return False


def _open_shard(path: str):
    """A shard's records and keys. UserError where it is not there, or not whole."""
    keys = _read_keys(path)
    try:
        reader = array_record_module.ArrayRecordReader(path)
        count = reader.num_records()
    except Exception as e:  # whatever the library says of a file that is not there or not whole
        raise UserError(f"{path} cannot be read ({' '.join(str(e).split())[:200]}): {_COPY}") from e
    if count != len(keys):
        raise UserError(f"{path} has {count} records, and {len(keys)} keys: {_COPY}")
    return reader, keys


def embeddings(captions: list[str], encoder: TextEncoder, *, batch: int) -> list[np.ndarray]:
    """Each caption's embedding [its tokens, D] in bfloat16.

    Texts of about a length are encoded together, `batch` at a time: a program for each eighth of the greatest length.
    """
    tokens, mask = encoder.tokenize(captions)
    lengths = mask.sum(1)
    step = max(8, encoder.length // 8)
    rounded = np.minimum(-(-lengths // step) * step, encoder.length)
    found = [np.zeros((0, encoder.module.dim), ml_dtypes.bfloat16)] * len(captions)
    for length in np.unique(rounded[lengths > 0]):
        rows = np.flatnonzero(rounded == length)
        for some in (rows[i : i + batch] for i in range(0, len(rows), batch)):
            # The last ones are filled up with the first: one shape, one program
            filled = np.concatenate([some, np.full(batch - len(some), some[0])])
            out = np.asarray(encoder.encode(tokens[filled, :length], mask[filled, :length]))
            for row, values in zip(some, out, strict=False):
                found[row] = values[: lengths[row]].astype(ml_dtypes.bfloat16)
    return found


def finish(out: str) -> tuple[int, int | None]:
    """Writes the index of a cache whose shards are all there; returns the number of captions and of bytes.

    None for the bytes of a bucket's: it tells no sizes without sending the files.
    """
    plan = files.read_json(os.path.join(out, PLAN))
    paths = [shard_path(out, i, plan["shards"]) for i in range(plan["shards"])]
    there = set(files.list_names(out))
    missing = [path for path in paths if os.path.basename(path) not in there]
    if missing:
        raise UserError(f"{missing[0]} is missing, and {len(missing) - 1} more: run the same command again")
    counts, size = [], None
    for path in paths:
        counts.append(len(_read_keys(path) if files.in_bucket(out) else _open_shard(path)[1]))
    if not files.in_bucket(out):
        for left in glob.glob(os.path.join(glob.escape(out), "texts-*.tmp*")):  # by processes that were killed
            os.remove(left)
        size = sum(os.path.getsize(file) for path in paths for file in (path, _keys(path)))
    files.write_json(os.path.join(out, INDEX), {**plan, "counts": counts})
    return sum(counts), size


@dataclasses.dataclass(frozen=True)
class TextCache:
    """A cache to read from, in place of a `TextEncoder`: its tokens are embeddings already. Pickles as its path."""

    path: str
    module = params = None  # what an encoder has to run

    @classmethod
    def open(cls, path: str, text_config) -> "TextCache":
        """UserError where there is no whole cache here, or where it was made by another encoder than the config's.

        Without a checkpoint in the config, as on machines that have only the cache, widths and lengths are compared.
        """
        if files.in_bucket(path):
            raise UserError(
                f"config.data.text_cache = {path} is in a bucket, and a cache is read from a file system: copy it to "
                "every host (`gcloud storage cp -r`), or mount the bucket, and give the folder there"
            )
        cache = cls(path)
        index = cache.index
        for i in range(index["shards"]):
            for file in (shard := shard_path(path, i, index["shards"]), _keys(shard)):
                if not os.path.exists(file):
                    raise UserError(f"{file} is missing: {_COPY}")
        for name in ("dim", "length"):
            if index[name] != text_config[name]:
                raise UserError(
                    f"config.data.text_cache = {path} has {name} {index[name]}, and config.text.{name} = "
                    f"{text_config[name]}: make a cache with this config's encoder (--mode=encode_text)"
                )
        if text_config.checkpoint is None:
            logging.getLogger("ivideo").info(
                "%s: width and length are those of the config; which encoder made it is not compared, as "
                "config.text.checkpoint is not set", path,
            )  # fmt: skip
        elif index["fingerprint"] != (own := fingerprint(text_config)):
            raise UserError(
                f"config.data.text_cache = {path} was made by another encoder or tokenizer "
                f"({index['fingerprint'][:12]}) than config.text names ({own[:12]}): make it again with "
                "--mode=encode_text, or name that encoder"
            )
        return cache

    @property
    def fingerprint(self) -> str:
        """Of the encoder and of the captions, as the index has them."""
        return f"{self.index['fingerprint']} of captions {self.index['captions']}"

    @functools.cached_property
    def index(self) -> dict:
        path = os.path.join(self.path, INDEX)
        if not os.path.exists(path):
            begun = os.path.exists(os.path.join(self.path, PLAN))
            raise UserError(
                f"{self.path} is not a whole text cache: "
                + ("run the command that began it again" if begun else "make one with --mode=encode_text")
            )
        index = files.read_json(path)
        if index.get("version") != VERSION:
            raise UserError(f"{path} is of version {index.get('version')!r}, expected {VERSION}: make the cache again")
        return index

    def __len__(self) -> int:
        return sum(self.index["counts"])

    @property
    def length(self) -> int:
        return self.index["length"]

    @property
    def tokenizer(self):
        return self

    def tokenize(self, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        return self(captions, self.length)

    def encode(self, bits, mask) -> jax.Array:
        """What `tokenize` returned to embeddings [..., L, D] float32, zero where the mask is False."""
        return from_bits(bits)

    def __call__(self, captions: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings [N, length, D], bfloat16's bits as uint16, and mask [N, length]. UserError for a new caption."""
        dim = self.index["dim"]
        out = np.zeros((len(captions), length, dim), np.uint16)
        mask = np.zeros((len(captions), length), bool)
        for caption, row, valid in zip(map(one_line, captions), out, mask, strict=True):
            if not caption:
                continue
            values = self._record(caption)
            row[: len(values)], valid[: len(values)] = values, True
        return out, mask

    def _record(self, caption: str) -> np.ndarray:
        key, (reader, keys) = key_of(caption), self._open(shard_of(key_of(caption), self.index["shards"]))
        place = int(np.searchsorted(keys, np.frombuffer(key, _ORDERED)[0]))
        try:
            record = reader.read([place])[0] if place < len(keys) else b""
        except Exception as e:
            reason = " ".join(str(e).split())[:200]
            raise UserError(f"{self.path}: {caption!r} cannot be read ({reason}): {_COPY}") from e
        if record[:KEY] != key:
            raise UserError(
                f"the text cache {self.path} has no embedding of {caption!r}: add it to the captions and make a cache "
                "of them in another folder"
            )
        return np.frombuffer(record, np.uint16, offset=KEY).reshape(-1, self.index["dim"])

    def _open(self, i: int):
        readers = self.__dict__.setdefault("_readers", collections.OrderedDict())
        if i not in readers:
            while len(readers) >= OPEN:
                readers.popitem(last=False)
            reader, keys = _open_shard(shard_path(self.path, i, self.index["shards"]))
            readers[i] = reader, keys.reshape(-1).view(_ORDERED)
        readers.move_to_end(i)
        return readers[i]

    def __getstate__(self):
        return {"path": self.path}

    def __setstate__(self, state):
        object.__setattr__(self, "path", state["path"])
