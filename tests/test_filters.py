"""Filters of prompts and of videos."""

import pytest

from ivideo.errors import UserError
from ivideo.sampling import filters


def test_small_words_count_as_a_whole_whatever_their_case(tmp_path):
    words = tmp_path / "words.txt"
    words.write_text("gun\nred  Star\ncafé\nc++\n")
    for prompt in ("it has begun", "gunner", "a red starfish", "star red", "cafés", "c+", ""):
        filters.check_prompts([prompt], str(words))
    for prompt, word in (
        ("A GUN.", "gun"),
        ("a red\n star", "red star"),
        ("CAFÉ au lait", "café"),
        ("in C++", r"c\+\+"),
    ):
        with pytest.raises(UserError, match=rf"has '{word}', which --blocked_words=.*words.txt does not allow"):
            filters.check_prompts(["a circle", prompt], str(words))
    with pytest.raises(UserError, match=r"--blocked_words=.*none.txt cannot be read"):
        filters.check_prompts(["a"], str(tmp_path / "none.txt"))


def test_small_packages_words():
    filters.check_prompts(["a yellow star moving right on a teal background"], "package")
    with pytest.raises(UserError, match="has 'nude', which --blocked_words=package does not allow"):
        filters.check_prompts(["A Nude."], "package")


def test_small_video_filters_are_functions():
    assert filters.load_video_filter("math:hypot")(3, 4) == 5
    for name, message in (
        ("math", "expected MODULE:FUNCTION"), ("none_such:f", "cannot be imported"), (":f", "cannot be imported"),
        ("math:none", "cannot be imported"), ("math:pi", "is float, expected a function"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            filters.load_video_filter(name)
