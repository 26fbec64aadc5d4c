"""Measures clips that were sampled for captions of the captioned shapes, and summarizes them in tables."""

import collections
import concurrent.futures
import os
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from ivideo.data import shapes
from ivideo.evaluation import averages, fidelity, prompt_following, steadiness

MEASURES = (*steadiness.MEASURES, "drift")
_WORKERS = min(8, os.cpu_count() or 1)  # clips that are measured at a time; each needs 0.6 GB at 128×192×320


def measure(video: np.ndarray, attrs: shapes.Attributes) -> dict[str, float | bool | None]:
    """What of its caption a clip shows (`prompt_following.score`), and the measures of `steadiness` and `drift`."""
    return {
        **prompt_following.score(video, attrs),
        **steadiness.measure(video, attrs),
        "drift": fidelity.drift(video),
    }


def measure_all(sampled: Iterable[tuple[str, int, np.ndarray]], attributes: Sequence[shapes.Attributes]) -> list[dict]:
    """Measures clips, on accelerators while the next ones are sampled.

    `sampled` yields (name of the stage, number of the caption, clip) in any order. Returns one row per clip: 'stage',
    'number', 'caption', 'held_out' and what `measure` returns; sorted by number, the stages as they ran.
    """
    stages, pending, rows = [], collections.deque(), []
    # On CPUs sampling uses all cores, and its time is measured
    waiting = 0 if jax.default_backend() == "cpu" else _WORKERS

    def finish():
        stage, number, future = pending.popleft()
        attrs = attributes[number]
        row = {"stage": stage, "number": number, "caption": shapes.caption(attrs), "held_out": shapes.held_out(attrs)}
        rows.append({**row, **future.result()})

    with concurrent.futures.ThreadPoolExecutor(_WORKERS) as pool:
        for stage, number, video in sampled:
            if stage not in stages:
                stages.append(stage)
            pending.append((stage, number, pool.submit(measure, video, attributes[number])))
            del video  # the next batch needs its memory
            if len(pending) > waiting:
                finish()
        while pending:
            finish()
    return sorted(rows, key=lambda row: (row["number"], stages.index(row["stage"])))


def summarize(rows: Sequence[dict]) -> dict:
    """Summarizes the rows of `measure_all`.

    Returns `prompt_following.summarize` of the last stage's clips, 'largest_drift' of them, and 'stages': per stage the
    number of 'clips', the shares of 'seen' and 'held_out' clips that are correct in all attributes, and the mean of
    each measure; 'standard_error' has that of each. 'correct' has the same of the last stage's correct clips.
    """
    by_stage = {}
    for row in rows:
        by_stage.setdefault(row["stage"], []).append(row)
    last = list(by_stage.values())[-1]
    found = {stage: _averages(stage_rows) for stage, stage_rows in by_stage.items()}
    return {
        **prompt_following.summarize((shapes.parse_caption(row["caption"]), row) for row in last),
        "largest_drift": max(row["drift"] for row in last),
        "stages": found,
        "correct": _averages([row for row in last if prompt_following.all_right(row)]),
    }


def _averages(rows):
    values = {name: [row[name] for row in rows] for name in MEASURES}
    for name, held_out in (("seen", False), ("held_out", True)):
        values[name] = [prompt_following.all_right(row) for row in rows if row["held_out"] == held_out]
    errors = {name: averages.standard_error(found) for name, found in values.items()}
    return {"clips": len(rows), **{n: averages.mean(found) for n, found in values.items()}, "standard_error": errors}


def tables(table: dict) -> str:
    """The result of `summarize` as Markdown: the captions of the last stage, and every stage's measures."""
    following = {
        name: row for name, row in table.items() if name in ("seen", "held_out", *prompt_following.HELD_OUT_KINDS)
    }
    lines = [
        prompt_following.format_table(following),
        "",
        "| output of | clips | seen, all four | held-out, all four | ideal IoU | steady IoU | grain | drift |",
        f"|---|{'--:|' * 7}",
    ]
    outputs = {**table["stages"], f"{list(table['stages'])[-1]}, correct clips": table["correct"]}
    for name, row in outputs.items():
        error = row["standard_error"]
        cells = [averages.text(row[n], error[n], digits=1, percent=True) for n in ("seen", "held_out")]
        cells += [averages.text(row[n], error[n], digits=3 if "iou" in n else 2) for n in MEASURES]
        lines.append(f"| {name} | {row['clips']} | {' | '.join(cells)} |")
    drift = f"{table['largest_drift']:.1f} of 255"
    return "\n".join([*lines, "", f"largest change of a background's colour from first to last frame: {drift}"])
