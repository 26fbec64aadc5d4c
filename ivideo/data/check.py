"""Decodes every clip of a data set, and lists the clips that cannot be read or are too short for the stage."""

import concurrent.futures
import os

import tqdm

from ivideo.data.video_io import VideoError
from ivideo.errors import UserError

AT_ONCE = 256  # clips submitted to the threads at once: a set may have many millions


def check_data(source, images=None) -> None:
    """Prints one line for each clip of a source, and each image of one, that cannot be read, and their numbers.

    UserError where there is any.
    """
    counts = [_check(source, "clips")] + ([_check(images, "images")] if images is not None else [])
    if any(counts):
        total = len(source) + (len(images) if images is not None else 0)
        raise UserError(
            f"{sum(counts)} of {total} clips cannot be read: prepare the set without them, or train with "
            f"--config.data.max_unreadable={sum(counts)}, which leaves them out"
        )


def _check(source, kind):
    """The number of clips that cannot be read, after a line for each."""
    count = 0
    with (
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm.tqdm(total=len(source), unit="clip", disable=None) as progress,
    ):
        for start in range(0, len(source), AT_ONCE):
            indices = range(start, min(start + AT_ONCE, len(source)))
            for problem in pool.map(lambda index: _problem(source, index), indices):
                progress.update()
                if problem:
                    count += 1
                    progress.write(problem)
    print(f"{len(source)} {kind} read, {count} of them unreadable")
    return count


def _problem(source, index):
    try:
        source.check(index)
    except VideoError as e:
        return str(e)
    return ""
