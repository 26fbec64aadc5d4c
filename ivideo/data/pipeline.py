"""From a source of captioned clips to batches, shuffled, sharded over processes and resumable (Grain).

Dimension letters: B batch (of this process), T frames, K packed images, H height, W width, L text tokens.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from ivideo.data import unreadable, workers
from ivideo.errors import UserError
from ivideo.prompts import one_line

Tokenize = Callable[[list[str], int], tuple[np.ndarray, np.ndarray]]
Readers = tuple[tuple[int, ...], ...]  # the numbers of a batch's equal parts that each of several readers has


class _Indexed:
    """A source whose records carry their index, for choosing the other clips that images are taken from.

    In the place of a clip that cannot be read is the next one that can (`ivideo.data.unreadable`).
    """

    def __init__(self, source, max_unreadable: int):
        self._source, self._max_unreadable = source, max_unreadable

    def __setstate__(self, state):  # what a data worker is sent is unpickled there
        self.__dict__.update(state)
        workers.attend()

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        read = self._source.__getitem__
        clip, used, count = unreadable.first_readable(read, int(index), len(self), self._max_unreadable)
        return {**clip, "index": used, unreadable.KEY: np.array([[index, count]], np.int32)}

    def __repr__(self) -> str:
        return f"Indexed({type(self._source).__name__}, {len(self)})"


class _PackImages(grain.transforms.RandomMap):
    """Adds `images` [K,H,W,3] and their captions, each a frame of another clip of the source."""

    def __init__(self, source, num_images: int, max_unreadable: int):
        self._source, self._num_images, self._max_unreadable = source, num_images, max_unreadable

    def random_map(self, element: dict, rng: np.random.Generator) -> dict:
        # Steps of 1 .. n-1 around the source never come back to the clip itself, nor twice to another.
        steps = 1 + rng.choice(len(self._source) - 1, self._num_images, replace=False)
        others = [(element["index"] + int(step)) % len(self._source) for step in steps]
        packed, left_out = [], [element[unreadable.KEY]]
        for index in others:
            image, _, count = unreadable.first_readable(
                lambda i: _image(self._source, i, rng), index, len(self._source), self._max_unreadable
            )
            packed.append(image)
            left_out.append(np.array([[index, count]], np.int32))
        return {
            **element,
            "images": np.stack([p["image"] for p in packed]),
            "image_captions": [p["caption"] for p in packed],
            unreadable.KEY: np.concatenate(left_out),
        }


def _image(source, index: int, rng: np.random.Generator) -> dict:
    if hasattr(source, "image"):
        return source.image(index, rng)
    clip = source[index]
    return {"image": clip["video"][rng.integers(len(clip["video"]))], "caption": clip["caption"]}


class _Tokenize(grain.transforms.Map):
    """Replaces captions by tokens, or a cache's embeddings, and masks, and keeps nothing but arrays."""

    def __init__(self, tokenize: Tokenize, text_length: int):
        self._tokenize, self._text_length = tokenize, text_length

    def _tokens(self, captions: list[str]) -> tuple[str, np.ndarray, np.ndarray]:
        captions = [one_line(caption) for caption in captions]
        tokens, mask = (np.asarray(x) for x in self._tokenize(captions, self._text_length))
        expected = (len(captions), self._text_length)
        if tokens.shape[:2] != expected or mask.shape != expected:
            raise UserError(
                f"tokenize returned tokens {tokens.shape} and mask {mask.shape}, expected {expected} for both: "
                "pad and cut to the length it is given."
            )
        if tokens.ndim == 3:
            return "text", tokens, mask.astype(bool)
        return "tokens", tokens.astype(np.int32), mask.astype(bool)

    def map(self, element: dict) -> dict:
        name, tokens, mask = self._tokens([element["caption"]])
        out = {"video": np.asarray(element["video"], np.float32), name: tokens[0], "token_mask": mask[0]}
        out[unreadable.KEY] = element[unreadable.KEY]
        if "images" in element:
            name, image_tokens, image_mask = self._tokens(element["image_captions"])
            images = np.asarray(element["images"], np.float32)
            out |= {"images": images, f"image_{name}": image_tokens, "image_token_mask": image_mask}
        return out


class _PartOrder(grain.MapDataset):
    """The order in which every n-th example, from the i-th, makes the i-th of n readers' parts of each batch.

    Grain deals the examples of a batch out to its readers one by one; a device's part of an array is in one piece, and
    which example has which place must not depend on the readers.
    """

    def __init__(self, parent: grain.MapDataset, batch_size: int, readers: Readers):
        super().__init__(parent)
        self._batch_size, self._readers = batch_size, readers
        self._part_size = batch_size // sum(map(len, readers))

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        batch, place = divmod(index, self._batch_size)
        row, reader = divmod(place, len(self._readers))
        number, row = divmod(row, self._part_size)
        return self._parent[batch * self._batch_size + self._readers[reader][number] * self._part_size + row]


def make_dataset(
    source,
    *,
    seed: int,
    num_images: int = 0,
    tokenize: Tokenize,
    text_length: int,
    shuffle: bool = True,
    max_unreadable: int = 0,
) -> grain.MapDataset:
    """The endless set of single examples that `make_iterator` batches: dicts as there, without the B.

    They also hold which clips were left out (`unreadable.KEY`).
    Clips are shuffled anew in every epoch. UserError where the source is empty, or too small for `num_images` images
    of other clips.
    """
    if len(source) == 0:
        raise UserError("The source has 0 clips, expected 1 or more: check its folder and split.")
    if not 0 <= num_images < len(source):
        raise UserError(
            f"num_images is {num_images} with a source of {len(source)} clips, expected 0 to {len(source) - 1}: each "
            "packed image comes from another clip, so pack fewer or use a larger source."
        )
    if text_length < 1:
        raise UserError(f"text_length is {text_length}, expected 1 or more tokens: set the config's text length.")
    dataset = grain.MapDataset.source(_Indexed(source, max_unreadable)).seed(seed)
    if shuffle:
        dataset = dataset.shuffle()
    dataset = dataset.repeat()
    if num_images:
        dataset = dataset.random_map(_PackImages(source, num_images, max_unreadable))
    return dataset.map(_Tokenize(tokenize, text_length))


def make_iterator(
    source,
    *,
    batch_size: int,
    seed: int,
    num_images: int = 0,
    tokenize: Tokenize,
    text_length: int,
    shuffle: bool = True,
    num_workers: int = 0,
    num_threads: int = 2,
    prefetch: int = 2,
    reader: int = 0,
    readers: Readers = ((0,),),
    max_unreadable: int = 0,
) -> grain.DatasetIterator:
    """An endless iterator of batches of numpy arrays, or of some parts of every batch.

    `source`: see `ivideo.data.sources`. `batch_size`: clips over all parts together. `seed`: of the order and of
    the choice of images. `tokenize(texts, length) -> (tokens [N,L], mask [N,L])`, or a `TextCache`. `num_workers`:
    processes that prepare data; 0 prepares it in threads of this one. Workers are spawned: guard the main module, pass
    a `source` and `tokenize` that pickle, and parse absl's flags first. `num_threads`: threads of each process (0:
    none, in line); `prefetch`: batches kept ready by each process, which bounds the memory. `reader`: which one of
    `readers` this is, where several processes read (`sharding.process_parts`); its parts come in their order.
    `max_unreadable`: clips that cannot be read (VideoError) and are left out, with a warning for each; UserError at the
    next one.

    A batch has `video` float32 [B,T,H,W,3], `tokens` int32 [B,L], `token_mask` bool [B,L] and, where num_images = K is
    positive, `images` float32 [B,K,H,W,3], `image_tokens` int32 [B,K,L], `image_token_mask` bool [B,K,L]: frames of K
    other clips with their own captions. With a cache `text` [B,L,D] and `image_text` [B,K,L,D] stand for the tokens,
    the bits of bfloat16 as uint16.

    Save the state with `grain.checkpoint.CheckpointSave(iterator)` or `get_state()`. It is one number, good for any
    count of readers and workers. UserError where batch_size does not divide among the parts.
    """
    shard, parts = grain.sharding.ShardOptions(reader, len(readers)), sum(map(len, readers))
    if batch_size < 1 or batch_size % parts:
        raise UserError(
            f"batch_size is {batch_size} in {parts} parts, expected a positive multiple of {parts}: the batch is of "
            "all processes together."
        )
    if num_workers < 0:
        raise UserError(f"num_workers is {num_workers}, expected 0 or more: 0 prepares data in this process.")
    dataset = make_dataset(
        source, seed=seed, num_images=num_images, tokenize=tokenize, text_length=text_length, shuffle=shuffle,
        max_unreadable=max_unreadable,
    )  # fmt: skip
    if len(readers) > 1:
        dataset = _PartOrder(dataset, batch_size, readers)
    # Grain keeps 500 elements ready unless told, here whole batches of video.
    read_options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    processes = None
    if num_workers:
        processes = grain.multiprocessing.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=1)
    elastic = grain.experimental.ElasticIterator(
        dataset, batch_size, shard, read_options=read_options, multiprocessing_options=processes
    )
    return unreadable.WarnUnreadable(iter(elastic), source, max_unreadable)


def load_state(iterator: grain.DatasetIterator, directory: str | pathlib.Path) -> None:
    """Sets `iterator` to the state that Orbax saved in `directory`, whatever number of processes saved it.

    `grain.checkpoint.CheckpointRestore` finds its file only where the number of processes is the one that saved.
    FileNotFoundError where the folder holds no state.
    """
    iterator.set_state(read_state(directory))


def read_state(directory: str | pathlib.Path) -> dict[str, Any]:
    """The iterator state that Orbax saved in `directory`; all processes save the same one."""
    files = sorted(pathlib.Path(directory).glob("process_*.json"))
    if not files:
        raise FileNotFoundError(
            f"{directory} holds no process_*.json, expected a saved data iterator: pass the checkpoint's data folder."
        )
    return json.loads(files[0].read_text())
