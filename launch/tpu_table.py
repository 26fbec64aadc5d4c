"""Compiles all stages at the paper's size for TPU slices, without a TPU, and writes tables of what it finds.

  pip install '.[tpu]' && python launch/tpu_table.py

Each program is a row in docs/tpu.json. Rows that exist are kept. The tables between the marks in docs/tpu.md and
docs/distillation.md are written from all rows. On two cores a training step takes one to five minutes to compile, a
step of distillation two to ten, a sampling step less than one.
`--only=REGEX` selects rows by name, such as "train ssr2 v5p:4x4x4"; `--again` also compiles rows that exist.
"""

import argparse
import importlib
import json
import math
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from ivideo import stages  # noqa: E402
from ivideo.devices.chips import CHIPS, slice_of  # noqa: E402
from ivideo.files import write_json, write_text  # noqa: E402
from ivideo.planning.compile import gib  # noqa: E402
from ivideo.planning.describe import human, human_flops  # noqa: E402
from ivideo.training.distill_step import updates  # noqa: E402

DATA = ROOT / "docs" / "tpu.json"
STAGES = ("base", "tsr1", "ssr1", "ssr2", "tsr2", "tsr3", "ssr3")
BATCH = 256
DISTILLED_STEPS = 8  # per stage, in the paper's distilled cascade
SAMPLE = ("v6e:4x4", "v5e:4x4", "tpu7x:2x2x2")  # 16 devices each
# The options of every stage's training step per slice. A chip's memory decides the number of parts of a batch
TRAIN = {
    "tpu7x:4x4x4": {"accumulate": 1},
    "v5p:4x4x4": {"accumulate": 1},
    "v6e:8x8": {"accumulate": 4},
    "v5e:16x16": {"accumulate": 1},
}
# More options for the stages with videos of 192×320
LARGE = {"v5p:4x4x4": {"accumulate": 4}}
# More options for single stages
SINGLE = {"v5e:16x16": {"tsr3": {"accumulate": 4, "mesh.height": 4}}}
DISTILL = ("v5p:4x4x4",)
TEXT = ("v6e:2x2", "v5e:2x2", "tpu7x:2x2x1")


def rows():
    """Yields the name of each row and the arguments of its command."""
    for topology in SAMPLE:
        for stage in STAGES:
            yield f"sample {stage} {topology}", [f"--config=configs/{stage}.py", "--what=sample"]
    for topology in TEXT:
        yield f"text t5_xxl {topology}", ["--config=configs/base.py", "--what=text"]
    for what, topologies in (("train", TRAIN), ("distill-guidance", DISTILL), ("distill-round", DISTILL)):
        for topology in topologies:
            yield from _training_rows(what, topology)


def _training_rows(what: str, topology: str):
    """The rows of a step that updates parameters, for all stages on one slice."""
    for stage in STAGES:
        options = TRAIN[topology] | (LARGE.get(topology, {}) if stage in ("ssr2", "tsr2", "tsr3") else {})
        options |= SINGLE.get(topology, {}).get(stage, {})
        values = [f"--config.train.{name}={value}" for name, value in options.items()]
        yield (
            f"{what} {stage} {topology}",
            [f"--config=configs/{stage}.py", f"--what={what}", f"--config.train.batch_size={BATCH}", *values],
        )


def compile_row(name: str, arguments: list[str]) -> dict:
    """Runs mode compile and returns its result, or the reason why the program does not fit."""
    command = [
        sys.executable,
        "-m",
        "ivideo.main",
        "--mode=compile",
        f"--topology={name.split()[-1]}",
        "--json",
        *arguments,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout)
    errors = [line for line in done.stderr.splitlines() if line.startswith("ivideo: ")]
    if done.returncode == 2 and errors and "does not fit" in errors[-1]:
        return {"does_not_fit": errors[-1].removeprefix("ivideo: ")}
    raise SystemExit(f"{' '.join(command)}\n{done.stderr[-3000:]}")


def tables(found: dict) -> str:
    """All tables as Markdown."""
    parts = []
    for what, topologies, title in (
        ("train", TRAIN, f"A training step, {BATCH} videos"),
        ("distill-guidance", DISTILL, f"A step of the first phase of distillation (guidance), {BATCH} videos"),
        ("distill-round", DISTILL, f"A step of a later phase of distillation, {BATCH} videos"),
        ("sample", SAMPLE, "A sampling step of the distilled stage, one video (one evaluation of the network)"),
        ("text", TEXT, "The text encoder in bfloat16, 256 texts of 256 tokens"),
    ):
        for topology in topologies:
            names = ("t5_xxl",) if what == "text" else STAGES
            table_rows = [(name, found.get(f"{what} {name} {topology}")) for name in names]
            if any(row for _, row in table_rows):
                parts.append(f"**{title}, on {topology}** ({chip_count(topology)})\n\n" + table(what, table_rows))
    return "\n\n".join(parts)


def chip_count(topology: str) -> str:
    """The number of chips of a slice, and of devices if that differs."""
    name, sizes = slice_of(topology)
    count, devices = math.prod(sizes), CHIPS[name].devices
    return f"{count} chips" if devices == 1 else f"{count} chips, {count * devices} devices"


def table(what, table_rows) -> str:
    """The table of one slice. For sampling, it ends with the sum over the cascade."""
    lines = [
        f"| {'encoder' if what == 'text' else 'stage'} | mesh | parts | memory per device | FLOPs per device "
        "| bytes per device | roofline | bound by | MFU at most | gathers of activations | permutes | compiled in |",
        "|---|---|--:|--:|--:|--:|--:|---|--:|--:|--:|--:|",
    ]
    total = 0.0
    for stage, row in table_rows:
        if row is None:
            continue
        if "does_not_fit" in row:
            lines.append(f"| {stage} | does not fit: {row['does_not_fit']} |" + " |" * 10)
            continue
        total += row["roofline_seconds"]
        memory, moved = row["memory"], row["collectives"]
        mesh = " × ".join(f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1)
        gathers = moved.get("all-gather of activations")
        counts = (
            f"{gathers['count']}, up to {gathers['largest']}" if gathers else 0,
            moved.get("collective-permute of activations", {"count": 0})["count"],
        )
        cells = (
            stage, mesh, row["accumulate"], f"{gib(memory['peak'])} of {memory['capacity'] >> 30}",
            human_flops(row["flops"]), f"{human(row['bytes'], 'KMGTP')}B", f"{1e3 * row['roofline_seconds']:.3g} ms",
            row["bound_by"], f"{row['mfu_bound']:.1%}", *counts, f"{row['compile_seconds']:.0f} s",
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if what == "sample" and sum("roofline_seconds" in (row or {}) for _, row in table_rows) == len(STAGES):
        lines.append(
            f"\nThe whole distilled cascade, {DISTILLED_STEPS} steps per stage: **{DISTILLED_STEPS * total:.2f} s** "
            "for one video of 128×768×1280, as a lower bound from these rooflines, without communication, the text "
            "encoder and writing the file."
        )
    return "\n".join(lines)


def costs(found: dict) -> str:
    """The chip-hours of every stage's distillation on one slice as Markdown, for stages whose rows exist."""
    (topology,) = DISTILL
    lines = [
        "| stage | a step of `guidance` | a step of a later phase | updates | chip-hours at least |",
        "|---|--:|--:|--:|--:|",
    ]
    for stage in STAGES:
        pair = [found.get(f"{what} {stage} {topology}", {}) for what in ("distill-guidance", "distill-round")]
        if not all("roofline_seconds" in row for row in pair):
            continue
        config = importlib.import_module(f"configs.{stage}").get_config()
        first, *later = [updates(config, *stages.student(config, phase)) for phase in stages.phases(config)]
        guidance, round_ = (row["roofline_seconds"] for row in pair)
        hours = pair[0]["chips"] * (first * guidance + sum(later) * round_) / 3600
        lines.append(f"| {stage} | {guidance:.2f} s | {round_:.2f} s | {first + sum(later):,} | {hours:,.0f} |")
    return "\n".join(lines)


def write_between(page: pathlib.Path, begin: str, end: str, text: str) -> None:
    """Replaces what is between two marks in a page."""
    head, _, rest = page.read_text().partition(begin)
    write_text(page, f"{head}{begin}\n{text}\n\n{end}{rest.partition(end)[2]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="compile only rows whose name matches this regular expression")
    parser.add_argument("--again", action="store_true", help="compile rows that exist, too")
    args = parser.parse_args()
    found = json.loads(DATA.read_text()) if DATA.exists() else {}
    for name, arguments in rows():
        if re.search(args.only, name) and (args.again or name not in found):
            row = compile_row(name, arguments)
            # Another process may have added rows in the meantime
            found = {**(json.loads(DATA.read_text()) if DATA.exists() else {}), name: row}
            write_json(DATA, found)
            print(
                name, row.get("does_not_fit") or f"{row['mfu_bound']:.1%} in {row['compile_seconds']:.0f} s", flush=True
            )
    docs, by = ROOT / "docs", "launch/tpu_table.py -->\n"
    write_between(docs / "tpu.md", f"<!-- tables: {by}", "<!-- end of tables -->", tables(found))
    write_between(docs / "distillation.md", f"<!-- chip-hours: {by}", "<!-- end of chip-hours -->", costs(found))


if __name__ == "__main__":
    main()
