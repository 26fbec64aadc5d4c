"""Turns a source of captioned clips into batches: shuffled, divided among processes, and resumable (Grain).

Dimension letters: B batch (of this process), T frames, K packed images, H height, W width, L text tokens.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from ivideo.data import mixtures, unreadable, video_io, workers
from ivideo.errors import UserError
from ivideo.prompts import one_line

Tokenize = Callable[[list[str], int], tuple[np.ndarray, np.ndarray]]
Readers = tuple[tuple[int, ...], ...]  # for each reader, the numbers of its parts of a batch


class _Read(grain.transforms.RandomMap):
    """Reads the clip of an index, and with K > 0 also `images` [K,H,W,3] and their captions, as uint8.

    Each image is one of the source `images`, or without it a frame of another clip. All places in time and space are
    drawn at random. What cannot be read is replaced by the next that can (`ivideo.data.unreadable`).
    """

    def __init__(self, source, images, num_images: int, max_unreadable: int):
        self._sources, self._num_images, self._max_unreadable = (source, images), num_images, max_unreadable

    def __setstate__(self, state):  # runs in a data worker, where the source is unpickled
        self.__dict__.update(state)
        workers.attend()

    def random_map(self, index: int, rng: np.random.Generator) -> dict:
        source, images = self._sources
        clip, used, left_out = self._first_readable(0, source.read, index, rng)
        element = {"video": video_io.to_uint8(clip["video"]), "caption": clip["caption"], unreadable.KEY: [left_out]}
        if self._num_images:
            if images is None:
                which, read, parts, but = 0, source.image, mixtures.parts_of(source), used
            else:
                which, read, parts, but = 1, images.image, mixtures.parts_of(images), None
            packed = []
            for number in mixtures.draw(parts, self._num_images, rng, but=but):
                image, _, left_out = self._first_readable(which, read, number, rng)
                packed.append(image)
                element[unreadable.KEY].append(left_out)
            element["images"] = video_io.to_uint8(np.stack([p["image"] for p in packed]))
            element["image_captions"] = [p["caption"] for p in packed]
        return element

    def _first_readable(self, which, read, index, rng):
        """What is read of source `which`, of which clip, and the entry of `unreadable.KEY`."""
        index, length = int(index), len(self._sources[which])
        found, used, count = unreadable.first_readable(lambda i: read(i, rng), index, length, self._max_unreadable)
        return found, used, (which, index, count)


class _Tokenize(grain.transforms.Map):
    """Replaces captions by masks and tokens, or a cache's embeddings, and drops everything that is not an array."""

    def __init__(self, tokenize: Tokenize, text_length: int):
        self._tokenize, self._text_length = tokenize, text_length

    def _tokens(self, captions: list[str]) -> tuple[str, np.ndarray, np.ndarray]:
        captions = [one_line(caption) for caption in captions]
        tokens, mask = (np.asarray(x) for x in self._tokenize(captions, self._text_length))
        expected = (len(captions), self._text_length)
        if tokens.shape[:2] != expected or mask.shape != expected:
            raise UserError(
                f"tokenize returned tokens {tokens.shape} and mask {mask.shape}, expected {expected} for both: "
                "pad and truncate to the length argument."
            )
        if tokens.ndim == 3:
            return "text", tokens, mask.astype(bool)
        return "tokens", tokens.astype(np.int32), mask.astype(bool)

    def map(self, element: dict) -> dict:
        name, tokens, mask = self._tokens([element["caption"]])
        out = {"video": element["video"], name: tokens[0], "token_mask": mask[0]}
        out[unreadable.KEY] = np.array(element[unreadable.KEY], np.int32)
        if "images" in element:
            name, image_tokens, image_mask = self._tokens(element["image_captions"])
            out |= {"images": element["images"], f"image_{name}": image_tokens, "image_token_mask": image_mask}
        return out


class _PartOrder(grain.MapDataset):
    """Reorders examples so that Grain's division of a batch among readers gives each reader its own parts.

    Grain gives reader i of n every n-th example, from the i-th. A device's part of an array is contiguous, and an
    example's place in the batch must not depend on the number of readers.
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
    images=None,
    tokenize: Tokenize,
    text_length: int,
    shuffle: bool = True,
    max_unreadable: int = 0,
) -> grain.MapDataset:
    """The endless data set of examples that `make_iterator` batches: its dicts without the batch dimension.

    An example also lists the clips that were left out for it (`unreadable.KEY`). Every epoch has a new order, and shows
    other parts of the clips. Of a mixture (`mixtures.Mixture`), each set has epochs of its own, and any number of
    successive examples has as many of each set as the weights say, to within one. An example depends on the seed and
    its number alone. UserError where the source is empty, or a set too small for `num_images` images of other clips.
    """
    if len(source) == 0:
        raise UserError("The source has 0 clips, expected 1 or more: check its folder and split.")
    parts = mixtures.parts_of(source)
    smallest = min(len(numbers) for numbers, _ in (parts if images is None else mixtures.parts_of(images)))
    if images is not None and not 0 <= num_images <= smallest:
        raise UserError(f"num_images is {num_images} with a set of {smallest} images: pack fewer or use a larger set.")
    if images is None and not 0 <= num_images < smallest:
        raise UserError(
            f"num_images is {num_images} with a source of {smallest} clips, expected 0 to {smallest - 1}: each "
            "packed image comes from another clip, so pack fewer or use a larger source."
        )
    if text_length < 1:
        raise UserError(f"text_length is {text_length}, expected 1 or more tokens: set the config's text length.")
    orders = []
    for k, (numbers, _) in enumerate(parts):
        order = grain.MapDataset.range(numbers.start, numbers.stop).seed((seed + k) % 2**32)
        orders.append((order.shuffle() if shuffle else order).repeat())
    dataset = orders[0]
    if len(orders) > 1:
        dataset = grain.MapDataset.mix(orders, [weight for _, weight in parts]).seed(seed)
    # After the repetition, so that each epoch draws new random numbers
    dataset = dataset.random_map(_Read(source, images, num_images, max_unreadable))
    return dataset.map(_Tokenize(tokenize, text_length))


def make_iterator(
    source,
    *,
    batch_size: int,
    seed: int,
    num_images: int = 0,
    images=None,
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
    """An endless iterator over batches of numpy arrays, or over one reader's parts of every batch.

    Args:
      source: see `ivideo.data.sources`; `mixtures.Mixture` makes several sources one.
      batch_size: clips per batch, of all readers together; UserError unless the number of parts divides it.
      seed: of the order, the choice of images, and the places that clips and images are read at.
      num_images: K, images packed with each video.
      images: a source of images (`sources.ImageSource`), or a mixture of them; without it they are frames of other
        clips.
      tokenize: (texts, length) -> (tokens [N,L], mask [N,L]), or a `TextCache`.
      text_length: L.
      num_workers: processes that prepare data; 0 prepares it in threads of this process. Workers are spawned, so guard
        the main module, pass a `source` and `tokenize` that pickle, and parse absl's flags first.
      num_threads: threads of each process; 0 uses none.
      prefetch: batches that each process keeps ready, which bounds the memory.
      reader: the index in `readers` of this process's reader (`sharding.process_parts`).
      readers: for each reader, the numbers of its parts of a batch, in the order in which it yields them.
      max_unreadable: clips that may be left out because they cannot be read (VideoError), with a warning for each;
        UserError at the next one.

    Returns:
      An iterator over dicts of `video` uint8 [B,T,H,W,3], `tokens` int32 [B,L] and `token_mask` bool [B,L]. With
      K > 0 they also have K images with their own captions: `images` uint8 [B,K,H,W,3], `image_tokens`
      int32 [B,K,L], `image_token_mask` bool [B,K,L]. With a cache, `text` [B,L,D] and `image_text` [B,K,L,D], bfloat16
      bits as uint16, take the place of the tokens. Save its state with `grain.checkpoint.CheckpointSave(iterator)` or
      `get_state()`: it is one number, valid for any number of readers and workers.
    """
    shard, parts = grain.sharding.ShardOptions(reader, len(readers)), sum(map(len, readers))
    if batch_size < 1 or batch_size % parts:
        raise UserError(
            f"batch_size is {batch_size} in {parts} parts, expected a positive multiple of {parts}: it counts the "
            "clips of all processes."
        )
    if num_workers < 0:
        raise UserError(f"num_workers is {num_workers}, expected 0 or more: 0 prepares data in this process.")
    dataset = make_dataset(
        source, seed=seed, num_images=num_images, images=images, tokenize=tokenize, text_length=text_length,
        shuffle=shuffle, max_unreadable=max_unreadable,
    )  # fmt: skip
    if len(readers) > 1:
        dataset = _PartOrder(dataset, batch_size, readers)
    # Grain's default is to keep 500 elements ready, and an element here is a batch of videos
    read_options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    processes = None
    if num_workers:
        processes = grain.multiprocessing.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=1)
    elastic = grain.experimental.ElasticIterator(
        dataset, batch_size, shard, read_options=read_options, multiprocessing_options=processes
    )
    return unreadable.WarnUnreadable(iter(elastic), (source, images), max_unreadable)


def load_state(iterator: grain.DatasetIterator, directory: str | pathlib.Path) -> None:
    """Sets `iterator` to the state that Orbax saved in `directory`, whatever the number of processes that saved it.

    `grain.checkpoint.CheckpointRestore` works only with the same number of processes. FileNotFoundError where the
    folder has no state.
    """
    iterator.set_state(read_state(directory))


def read_state(directory: str | pathlib.Path) -> dict[str, Any]:
    """The iterator's state that Orbax saved in `directory`. All processes save the same state."""
    files = sorted(pathlib.Path(directory).glob("process_*.json"))
    if not files:
        raise FileNotFoundError(
            f"{directory} has no process_*.json, expected a saved data iterator: pass the checkpoint's data folder."
        )
    return json.loads(files[0].read_text())
