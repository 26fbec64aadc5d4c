"""Reads every clip of a data set as a stage would, and lists those that cannot be read."""

import concurrent.futures
import os

import tqdm

from ivideo.data.video_io import VideoError
from ivideo.errors import UserError

AT_A_TIME = 256  # clips that are asked for: a set may have many millions


def check_data(source) -> None:
    """Prints a line for each clip of a source that cannot be read, and how many there are.

    UserError where there is one.
    """
    found = 0
    with (
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm.tqdm(total=len(source), unit="clip", disable=None) as progress,
    ):
        for start in range(0, len(source), AT_A_TIME):
            some = range(start, min(start + AT_A_TIME, len(source)))
            for problem in pool.map(lambda index: _problem(source, index), some):
                progress.update()
                if problem:
                    found += 1
                    progress.write(problem)
    print(f"{len(source)} clips read, {found} of them unreadable")
    if found:
        raise UserError(
            f"{found} of {len(source)} clips cannot be read: prepare the set without them, or train with "
            f"--config.data.max_unreadable={found}, which leaves them out"
        )


def _problem(source, index):
    try:
        source[index]
    except VideoError as e:
        return str(e)
    return ""
