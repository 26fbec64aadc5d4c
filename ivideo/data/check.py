"""Decodes every clip of a data set, and lists the clips that cannot be read or are too short for the stage."""

import concurrent.futures
import os

import tqdm

from ivideo.data.video_io import VideoError
from ivideo.errors import UserError

AT_ONCE = 256  # clips submitted to the threads at once: a set may have many millions


def check_data(source) -> None:
    """Prints one line for each clip of a source that cannot be read, and their number.

    UserError where there is any.
    """
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
    print(f"{len(source)} clips read, {count} of them unreadable")
    if count:
        raise UserError(
            f"{count} of {len(source)} clips cannot be read: prepare the set without them, or train with "
            f"--config.data.max_unreadable={count}, which leaves them out"
        )


def _problem(source, index):
    try:
        source.check(index)
    except VideoError as e:
        return str(e)
    return ""
