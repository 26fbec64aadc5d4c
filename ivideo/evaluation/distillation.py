"""How good each student of a distillation is, against the original network: one row per phase, and a plot."""

import functools
import json
import os

from ivideo import files, stages
from ivideo.errors import UserError
from ivideo.evaluation import evaluate, pictures
from ivideo.training import students, trained

PLOT = "evaluation.png"  # in the --workdir, where there is no --out beside which it could be


def evaluate_phases(
    config, workdir: str, *, clips: int, seed: int, out: str | None = None, as_json=False, overwrite=False
) -> list[dict]:
    """Measures the original network and the student of each finished phase of a distillation, on the same clips.

    `config`: of the original network, which is sampled as that says. Prints a table, or JSON with `as_json`, and draws
    quality and seconds per sample over steps, to WORKDIR/evaluation.png or beside `out`. `out` has all rows and is
    written anew after each. The seconds are those that the distillation measured (`ivideo.training.agreement`); those
    of the original network were measured with `config.distill.teacher_steps` and are scaled to its number of steps.
    UserError, before anything is computed, where a file exists or cannot be written, or where weights do not fit.
    """
    plot = os.path.join(workdir, PLOT) if out is None else f"{os.path.splitext(out)[0]}.png"
    if out is not None:
        files.refuse_existing([out, plot], overwrite=overwrite)
    files.prepare_folders([plot])
    cases = [(students.TEACHER, config)]
    cases += [(phase, stages.distilled(config, phase)) for phase in students.finished(workdir, config)]
    if len(cases) == 1:
        raise UserError(f"--workdir={workdir} has no finished phase yet: go on with --mode=distill")
    for phase, student in cases:
        trained.check(student, students.weights_path(workdir, phase))
    recorded = {row["phase"]: row for row in students.rows(workdir, config)}
    per_step = next(iter(recorded.values()))["teacher_seconds_per_sample"] / config.distill.teacher_steps
    recorded[students.TEACHER] = {"seconds_per_sample": per_step * config.sample.steps, "agreement": None}
    rows = []
    for phase, student in cases:
        sources = {student.stage: students.weights_path(workdir, phase)}
        if student.cond.frames:
            result = evaluate.super_resolution(student, sources=sources, clips=clips, seed=seed)
        else:
            group = student.sample.group
            result = evaluate.prompt_following([student], sources=sources, group=group, clips=clips, seed=seed)
        kept = {name: recorded[phase][name] for name in ("agreement", "seconds_per_sample")}
        rows.append({"phase": phase, "steps": student.sample.steps, **kept, "table": result["table"]})
        if out is not None:
            files.write_text(out, json.dumps(rows, indent=1, default=bool))
    print(json.dumps(rows, default=bool) if as_json else phases_table(rows))
    draw(rows, plot)
    return rows


def quality(row: dict) -> dict[str, float]:
    """What is compared between the rows: of super-resolution PSNR in dB, else the shares of clips that are right."""
    table = row["table"]
    if "stage" in table:
        return {"PSNR (dB)": table["stage"]}
    return {f"{name.replace('_', '-')} captions (%)": 100 * (table[name]["all"] or 0) for name in ("seen", "held_out")}


def phases_table(rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    columns = ["phase", "steps", "agreement (dB)", "seconds per sample", *quality(rows[0])]
    lines = [f"| {' | '.join(columns)} |", "|---|" + "--:|" * (len(columns) - 1)]
    for row in rows:
        agreement = "–" if row["agreement"] is None else f"{row['agreement']:.1f}"
        cells = [row["phase"], str(row["steps"]), agreement, f"{row['seconds_per_sample']:.3g}"]
        lines.append(f"| {' | '.join([*cells, *(f'{value:.1f}' for value in quality(row).values())])} |")
    return "\n".join(lines)


def draw(rows: list[dict], path: str) -> None:
    """Draws quality and seconds per sample over the number of steps (`pictures.plot`)."""
    if pictures.plot(path, functools.partial(_figure, rows)):
        print(path)


def _figure(rows, pyplot):
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    steps = [row["steps"] for row in rows]
    for name in quality(rows[0]):
        left.plot(steps, [quality(row)[name] for row in rows], "o", label=name)
    right.plot(steps, [row["seconds_per_sample"] for row in rows], "o", label="seconds per sample")
    for panel in (left, right):
        for row in rows:
            y = next(iter(quality(row).values())) if panel is left else row["seconds_per_sample"]
            panel.annotate(row["phase"], (row["steps"], y), fontsize=7, xytext=(3, 3), textcoords="offset points")
        panel.set_xscale("log", base=2)
        panel.set(xlabel="steps")
        panel.legend(fontsize=8)
    right.set_yscale("log")
    return figure
