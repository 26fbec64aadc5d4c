"""Filters around sampling: words that a prompt may not have, and a function that judges each video.

The authors filtered prompts and videos in their trials (the paper's section on limitations). Both filters are off by
default. A list of words stops careless requests; it does not make a model safe.
"""

import importlib
import importlib.resources
import re
from collections.abc import Callable, Sequence

import numpy as np

from ivideo.errors import UserError
from ivideo.prompts import one_line, read_lines

PACKAGED = "package"  # instead of a file: the words in the package


def load_blocked_words(words_path: str) -> Callable[[str], re.Match | None]:
    """A function that finds a word of a list in a prompt. UserError where the list cannot be read.

    `words_path`: a UTF-8 file with one word or phrase per line, or 'package'. Words count as a whole, whatever their
    case: "gun" is not in "begun".
    """
    if words_path == PACKAGED:
        text = (importlib.resources.files("ivideo") / "sampling" / "blocked_words.txt").read_text(encoding="utf-8")
        words = [line for line in text.splitlines() if line and not line.startswith("#")]
    else:
        words = list(read_lines(words_path, "--blocked_words"))
    blocked = re.compile(rf"(?<!\w)(?:{'|'.join(re.escape(one_line(word).casefold()) for word in words)})(?!\w)")
    return lambda prompt: blocked.search(one_line(prompt).casefold())


def check_prompts(prompts: Sequence[str], words_path: str) -> None:
    """UserError for the first prompt with one of the words in a list (`load_blocked_words`)."""
    find_blocked = load_blocked_words(words_path)
    for prompt in prompts:
        if found := find_blocked(prompt):
            raise UserError(
                f"the prompt {prompt!r} has {found[0]!r}, which --blocked_words={words_path} does not allow: change "
                "the prompt, or the list"
            )


def load_video_filter(name: str) -> Callable[[np.ndarray, str], bool]:
    """The function MODULE:FUNCTION, which is called with a video, uint8 [T, H, W, 3], and its prompt.

    The video is written if it returns True. UserError where there is no such function.
    """
    module, colon, function = name.partition(":")
    if not colon:
        raise UserError(f"--video_filter={name}: expected MODULE:FUNCTION, such as my_filters:is_safe")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as e:
        raise UserError(f"--video_filter={name} cannot be imported ({e}): put its module on Python's path") from e
    if not callable(found):
        raise UserError(
            f"--video_filter={name} is {type(found).__name__}, expected a function of a video and its prompt"
        )
    return found
