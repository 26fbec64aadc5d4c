"""Measures of sampled clips: rows in a fixed order, on every kind of device, and their means."""

import jax
import numpy as np
import pytest

from ivideo.data import shapes
from ivideo.evaluation import generated

ATTRIBUTES = [shapes.Attributes("circle", "red", "teal", "left"), shapes.Attributes("star", "red", "gray", "still")]


def sampled():
    """The clips of two stages, the first stage's first; the second clip of the last stage is a square."""
    for stage, height in (("base", 24), ("ssr1", 48)):
        for number, attrs in enumerate(ATTRIBUTES):
            if stage == "ssr1" and number == 1:
                attrs = attrs._replace(shape="square")
            yield stage, number, shapes.render(attrs, number, frames=4, height=height, width=height * 5 // 3)


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_small_a_row_per_clip_and_stage(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    rows = generated.measure_all(sampled(), ATTRIBUTES)
    assert [(row["number"], row["stage"]) for row in rows] == [(0, "base"), (0, "ssr1"), (1, "base"), (1, "ssr1")]
    assert [row["held_out"] for row in rows] == [False, False, True, True]
    assert [row["shape"] for row in rows] == [True, True, True, False]
    for row, (_, _, video) in zip(sorted(rows, key=lambda row: row["stage"]), sampled(), strict=True):
        assert {**row, **generated.measure(video, ATTRIBUTES[row["number"]])} == row


def test_small_summary_is_of_the_last_stage():
    rows = generated.measure_all(sampled(), ATTRIBUTES)
    table = generated.summarize(rows)
    assert (table["seen"]["all"], table["red star"]["all"], table["held_out"]["shape"]) == (1, 0, 0)
    base, last, correct = table["stages"]["base"], table["stages"]["ssr1"], table["correct"]
    assert (base["held_out"], last["held_out"], correct["clips"]) == (1, 0, 1)
    overlaps = [row["ideal_iou"] for row in rows if row["stage"] == "ssr1"]
    assert last["ideal_iou"] == pytest.approx(np.mean(overlaps))
    assert last["standard_error"]["ideal_iou"] == pytest.approx(np.std(overlaps, ddof=1) / np.sqrt(2))
    assert correct["ideal_iou"] == overlaps[0] > 0.99 > 0.8 > overlaps[1]
    lines = generated.tables(table).splitlines()
    assert lines[-4].startswith("| ssr1 | 2 | 100.0% | 0.0% | 0.")
    assert lines[-3].startswith("| ssr1, correct clips | 1 | 100.0% | – | 1.000 | ")
