"""A cache of caption embeddings: computed once, and read in training instead of running the encoder.

A cache is a folder, written on this machine or to a bucket (gs://…), and read on this machine. `encoder.json` has the
encoder's fingerprint and the number of shards. Every shard is a pair of files: `texts-00000-of-00025.array_record` with
one record per caption, and `texts-00000-of-00025.keys.npy` with the keys. `index.json` is written last and marks the
cache as complete. A record is a caption's key and its embedding, [tokens, D] in bfloat16, without padding. A key is the
first bytes of the caption's SHA-256. Keys determine a caption's shard and its place in it, so the files do not depend
on the order or the repetition of captions, and a caption is found by bisection.
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
from ivideo.data.preparing import records
from ivideo.devices import agreeing, sharding
from ivideo.errors import UserError
from ivideo.prompts import one_line, read_lines
from ivideo.text import TextEncoder, fingerprint, from_bits, load_encoder

VERSION = 1
KEY = 16  # bytes
PER_SHARD = 4096  # captions, approximately
OPEN = 128  # shards open at a time, one file each: a process may open about a thousand files
PLAN, INDEX = "encoder.json", "index.json"
_ORDERED = np.dtype(f"S{KEY}")  # a dtype in which keys compare by their bytes
_COPY = "copy the whole cache again, or run the command that made it"
_WORDS = {
    "fingerprint": "encoder or tokenizer",
    "dim": "width",
    "captions": "set of captions",
    "shards": "number of shards",
}


def key_of(caption: str) -> bytes:
    """The key of a caption."""
    return hashlib.sha256(caption.encode()).digest()[:KEY]


def shard_of(key: bytes, shards: int) -> int:
    """The shard of a key. Shards divide the range of keys into equal parts, in order."""
    return int.from_bytes(key[:8]) * shards >> 64


def read_captions(path: str) -> list[str]:
    """The distinct captions of a text file, one per line (`read_lines`), or of a prepared set's folder."""
    if os.path.isfile(os.path.join(path, records.INFO)):
        if not os.path.isfile(os.path.join(path, records.CAPTIONS)):
            raise UserError(
                f"--captions={path} is a prepared set without {records.CAPTIONS}: mode prepare_data writes it; write "
                "the captions of other sets to a file, one per line"
            )
        path = os.path.join(path, records.CAPTIONS)
    return list({key_of(caption): caption for caption in read_lines(path, "--captions")}.values())


def encode_captions(config, path: str, out: str) -> None:
    """Makes a cache of a file's captions and of the config's sample prompts in the folder `out`.

    The same call resumes after an interruption. The processes of `jax.distributed` divide the shards among them, and
    each splits its batches over its devices. UserError, before anything is written, where the captions or the encoder
    cannot be read, or `out` holds another cache.
    """
    captions = {key_of(caption): caption for caption in (*read_captions(path), *sample_prompts(config))}
    captions = [captions[key] for key in sorted(captions)]
    shards = -(-len(captions) // PER_SHARD)
    mesh = sharding.make_mesh(config.text.mesh, jax.local_devices())
    encoder = load_encoder(config.text, mesh=mesh)
    digest = hashlib.sha256("\n".join(captions).encode()).hexdigest()
    begin(out, config.text, encoder.fingerprint, shards=shards, of=digest)
    by_shard = [[] for _ in range(shards)]
    for caption in captions:
        by_shard[shard_of(key_of(caption), shards)].append(caption)
    mine = range(jax.process_index(), shards, jax.process_count())
    with tqdm.tqdm(total=sum(len(by_shard[i]) for i in mine), unit="caption", desc="encoding") as bar:
        for i in mine:
            if not _is_complete(shard_path(out, i, shards)):
                write_shard(out, i, shards, by_shard[i], encoder, batch=config.text.batch)
            bar.update(len(by_shard[i]))
    _wait("encoded")
    if jax.process_index() == 0:
        count, size = finish(out)
        print(summary(out, count, size))


def sample_prompts(config) -> list[str]:
    """The config's sample prompts, normalised as captions."""
    return [caption for prompt in config.train.sample_prompts if (caption := one_line(prompt))]


def summary(out: str, count: int, size: int | None) -> str:
    """Describes a finished cache in one line."""
    sizes = f", {size / 1e6:,.1f} MB, {size / count:,.0f} MB per million" if size is not None else ""
    return f"{out}: {count:,} captions{sizes}"


def _wait(name: str) -> None:
    """Waits until all processes have reached this call."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"text cache {name}")


def shard_path(out: str, i: int, shards: int) -> str:
    """The path of a shard's records."""
    return os.path.join(out, f"texts-{i:05}-of-{shards:05}.array_record")


def _keys(shard: str) -> str:
    return shard.removesuffix(".array_record") + ".keys.npy"


def begin(out: str, text_config, fingerprint: str, *, shards: int, of: str) -> None:
    """Writes the plan of a new cache to `out`, or checks that the cache in `out` has the same plan.

    `fingerprint` identifies the encoder, and `of` the captions. UserError where `out` holds another cache.
    """
    plan = {
        "version": VERSION, "fingerprint": fingerprint, "shards": shards, "captions": of,
        "dim": text_config.dim, "length": text_config.length,
    }  # fmt: skip
    path = os.path.join(out, PLAN)
    if not files.in_bucket(out):
        agreeing.check_shared(out)
    existing = files.read_json(path) if files.exists(path) else None
    if existing is not None:
        different = [name for name in plan if plan[name] != existing.get(name)]
        if different:
            raise UserError(
                f"--out={out} is a cache with another {' and '.join(_WORDS.get(name, name) for name in different)}: "
                "choose another folder"
            )
    elif (files.in_bucket(out) or os.path.isdir(out)) and files.list_names(out):
        raise UserError(f"--out={out} is a folder with other files: choose another, or an empty one")
    _wait("checked")  # before the plan is written, which would change the result of another process's check
    if existing is None and jax.process_index() == 0:
        if not files.in_bucket(out):
            os.makedirs(out, exist_ok=True)
        files.write_json(path, plan)
    _wait("begun")


def check_encoder(out: str, fingerprint: str) -> None:
    """UserError where this worker's encoder is not the one that the cache was begun with."""
    wanted = files.read_json(os.path.join(out, PLAN))["fingerprint"]
    if fingerprint != wanted:
        raise UserError(
            f"this worker's encoder or tokenizer is {fingerprint[:12]}, and {out} was begun with {wanted[:12]}: set "
            "config.text.checkpoint to a path at which all workers find the same files"
        )


def write_shard(out: str, i: int, shards: int, captions: list[str], encoder: TextEncoder, *, batch: int) -> None:
    """Writes a shard of these captions: its keys, then its records, each file atomically."""
    captions, keys = sorted(captions, key=key_of), keys_of(captions)
    path = shard_path(out, i, shards)
    values = embeddings(captions, encoder, batch=batch) if captions else []
    with files.atomic_write(path) as temporary:
        writer = array_record_module.ArrayRecordWriter(temporary, "group_size:1,uncompressed")
        for key, embedding in zip(keys, values, strict=True):
            writer.write(key.tobytes() + embedding.tobytes())
        writer.close()
        with files.atomic_write(_keys(path)) as other, open(other, "wb") as f:
            np.save(f, keys)


def keys_of(captions: list[str]) -> np.ndarray:
    """The keys of captions, sorted, [N, KEY] uint8."""
    return np.frombuffer(b"".join(sorted(map(key_of, captions))), np.uint8).reshape(-1, KEY)


def check_shard(out: str, i: int, shards: int, captions: list[str]) -> None:
    """UserError where an existing shard holds other captions than these."""
    if not np.array_equal(_read_keys(shard_path(out, i, shards)), keys_of(captions)):
        raise UserError(f"--out={out} is a cache with another set of captions: choose another folder")


def _read_keys(shard: str) -> np.ndarray:
    """The keys of a shard, [N, KEY] uint8. UserError where the file is missing or damaged."""
    try:
        with files.open_read(_keys(shard)) as f:
            return np.load(f).reshape(-1, KEY)
    except (OSError, ValueError, EOFError) as e:
        raise UserError(f"{_keys(shard)} cannot be read ({e}): {_COPY}") from e


def _is_complete(shard: str) -> bool:
    """Whether a shard exists and is complete. In a bucket, where files are always complete, whether it exists."""
    if not files.exists(shard):
        return False
    try:
        if not files.in_bucket(shard):
            _open_shard(shard)
        return True
    except UserError as e:
        logging.getLogger("ivideo").warning("%s: encoding it again", str(e).removesuffix(f": {_COPY}"))
        return False


def _open_shard(path: str):
    """A reader of a shard's records, and its keys. UserError where the shard is missing or incomplete."""
    keys = _read_keys(path)
    try:
        reader = array_record_module.ArrayRecordReader(path)
        count = reader.num_records()
    except Exception as e:  # the library raises many types of error for a missing or incomplete file
        raise UserError(f"{path} cannot be read ({' '.join(str(e).split())[:200]}): {_COPY}") from e
    if count != len(keys):
        raise UserError(f"{path} has {count} records, and {len(keys)} keys: {_COPY}")
    return reader, keys


def embeddings(captions: list[str], encoder: TextEncoder, *, batch: int) -> list[np.ndarray]:
    """Each caption's embedding, [its number of tokens, D] in bfloat16.

    Texts of similar length are encoded together, `batch` at a time: one compiled program for each eighth of the
    maximum length.
    """
    tokens, mask = encoder.tokenize(captions)
    lengths = mask.sum(1)
    step = max(8, encoder.length // 8)
    rounded = np.minimum(-(-lengths // step) * step, encoder.length)
    out = [np.zeros((0, encoder.module.dim), ml_dtypes.bfloat16)] * len(captions)
    for length in np.unique(rounded[lengths > 0]):
        rows = np.flatnonzero(rounded == length)
        for group in (rows[i : i + batch] for i in range(0, len(rows), batch)):
            # A short batch is padded with its first text, so that all batches have one shape and one program
            padded = np.concatenate([group, np.full(batch - len(group), group[0])])
            encoded = np.asarray(encoder.encode(tokens[padded, :length], mask[padded, :length]))
            for row, values in zip(group, encoded, strict=False):
                out[row] = values[: lengths[row]].astype(ml_dtypes.bfloat16)
    return out


def finish(out: str) -> tuple[int, int | None]:
    """Writes the index of a cache once all its shards exist; returns the number of captions and of bytes.

    The number of bytes is None in a bucket, which does not report sizes without sending the files.
    """
    plan = files.read_json(os.path.join(out, PLAN))
    paths = [shard_path(out, i, plan["shards"]) for i in range(plan["shards"])]
    existing = set(files.list_names(out))
    missing = [path for path in paths if os.path.basename(path) not in existing]
    if missing:
        raise UserError(f"{missing[0]} is missing, and {len(missing) - 1} more: run the same command again")
    counts, size = [], None
    for path in paths:
        counts.append(len(_read_keys(path) if files.in_bucket(out) else _open_shard(path)[1]))
    if not files.in_bucket(out):
        for leftover in glob.glob(os.path.join(glob.escape(out), "texts-*.tmp*")):  # of processes that were killed
            os.remove(leftover)
        size = sum(os.path.getsize(file) for path in paths for file in (path, _keys(path)))
    files.write_json(os.path.join(out, INDEX), {**plan, "counts": counts})
    return sum(counts), size


@dataclasses.dataclass(frozen=True)
class TextCache:
    """A cache that stands in for a `TextEncoder`: `tokenize` returns embeddings already. Pickles as its path."""

    path: str
    module = params = None  # fields of a `TextEncoder`; a cache runs no network

    @classmethod
    def open(cls, path: str, text_config) -> "TextCache":
        """Opens a cache. UserError where it is incomplete, or was made by another encoder than the config's.

        If the config names no checkpoint, as on machines that have only the cache, only width and length are compared.
        """
        if files.in_bucket(path):
            raise UserError(
                f"config.data.text_cache = {path} is in a bucket, but caches are read from a file system: copy it to "
                "every host (`gcloud storage cp -r`), or mount the bucket, and give that folder"
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
                "%s has the config's width and length; its encoder is not compared, since config.text.checkpoint is "
                "not set", path,
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
        """Identifies the encoder and the captions, as the index records them."""
        return f"{self.index['fingerprint']} of captions {self.index['captions']}"

    @functools.cached_property
    def index(self) -> dict:
        path = os.path.join(self.path, INDEX)
        if not os.path.exists(path):
            begun = os.path.exists(os.path.join(self.path, PLAN))
            raise UserError(
                f"{self.path} is not a complete text cache: "
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
        """Turns what `tokenize` returned into embeddings [..., L, D] float32, zero where the mask is False."""
        return from_bits(bits)

    def __call__(self, captions: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings [N, length, D], bfloat16 bits as uint16, and mask [N, length]. UserError for a new caption."""
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
        key = key_of(caption)
        reader, keys = self._open(shard_of(key, self.index["shards"]))
        place = int(np.searchsorted(keys, np.frombuffer(key, _ORDERED)[0]))
        try:
            record = reader.read([place])[0] if place < len(keys) else b""
        except Exception as e:
            reason = " ".join(str(e).split())[:200]
            raise UserError(f"{self.path}: {caption!r} cannot be read ({reason}): {_COPY}") from e
        if record[:KEY] != key:
            raise UserError(
                f"the text cache {self.path} has no embedding of {caption!r}: add it to the captions and make a new "
                "cache in another folder"
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
