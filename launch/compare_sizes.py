"""Compares three sizes of the base while they train (Section 3.1, Figure 11): FVD, and clips that follow their caption.

  pip install '.[plot]' && python launch/compare_sizes.py FOLDER --i3d=FILE [--widths=32,64,128] [--steps=2000]

Trains the small base at each width from the same seed; everything else is equal. Every quarter of the steps, its
average is measured as `config.train.evaluate_every` does. Writes FOLDER/sizes.md, FOLDER/sizes.json, and the plot
FOLDER/sizes.png. --i3d is the file of I3D's weights (docs/evaluation.md); without it there is no FVD. Run it again
after an interruption: it continues where it stopped.
"""

import argparse
import functools
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from absl import flags

from configs import base
from ivideo import checks, files, stages
from ivideo.errors import UserError
from ivideo.evaluation import in_training, pictures
from ivideo.planning import describe
from ivideo.training.loop import train

ABOUT = "about.json"
MEASURES = {"FVD": "FVD", "follows its caption": "share of clips that follow their caption"}


def size_config(width: int, args):
    """The small base with this many channels."""
    config = base.get_config("demo")
    config.model.channels = (width,) * len(config.model.channels)
    config.train.steps = args.steps
    config.train.decay = "constant"  # the average at an earlier step then has not seen a part of the decay
    config.train.evaluate_every = config.train.checkpoint_every = args.steps // 4
    config.evaluate.clips = args.clips
    config.evaluate.i3d = args.i3d
    checks.check(config)
    return config


def parameters(config) -> int:
    return describe.param_count(stages.param_shapes(config))


def rows_of(workdir: pathlib.Path, config) -> list[dict]:
    """What was measured in a training run, a row for each step and measure."""
    rows = []
    for path in sorted((workdir / in_training.FOLDER).glob("[0-9]*.json")):
        for name, found in json.loads(path.read_text())["measures"].items():
            if name in MEASURES:
                place = {"parameters": parameters(config), "step": int(path.stem), "measure": name}
                rows.append(place | {key: found[key] for key in ("value", "low", "high")})
    return rows


def draw(rows: list[dict], pyplot):
    """A panel for each measure, with a line for each size and the 95% intervals, and a legend above."""
    names = [name for name in MEASURES if any(row["measure"] == name for row in rows)]
    options = {"figsize": (4.5 * len(names), 3.5), "layout": "constrained", "squeeze": False}
    figure, panels = pyplot.subplots(1, len(names), **options)
    for panel, name in zip(panels[0], names, strict=True):
        for size in sorted({row["parameters"] for row in rows}):
            line = [row for row in rows if (row["measure"], row["parameters"]) == (name, size)]
            values = [row["value"] for row in line]
            below = [value - row["low"] for value, row in zip(values, line, strict=True)]
            above = [row["high"] - value for value, row in zip(values, line, strict=True)]
            steps = [row["step"] for row in line]
            # A bootstrap's interval need not contain the value: FVD has a bias that depends on the number of clips
            spans = [[max(0, span) for span in side] for side in (below, above)]
            panel.errorbar(steps, values, yerr=spans, marker="o", capsize=3, label=f"{size / 1e6:.2f}M parameters")
        panel.set(xlabel="training steps", ylabel=MEASURES[name])
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def table(rows: list[dict]) -> str:
    lines = ["| parameters | step | measure | value | 95% interval |", "|--:|--:|---|--:|--:|"]
    for row in rows:
        numbers = f"{row['value']:.4g} | {row['low']:.4g} to {row['high']:.4g}"
        lines.append(f"| {row['parameters'] / 1e6:.2f}M | {row['step']} | {row['measure']} | {numbers} |")
    return "\n".join(lines) + "\n"


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--widths", default="32,64,128", help="channels of every level")
    parser.add_argument("--steps", type=int, default=2000, help="training steps, a multiple of 4")
    parser.add_argument("--clips", type=int, default=256, help="clips of a measurement")
    parser.add_argument("--i3d", default="")
    args = parser.parse_args(arguments)
    flags.FLAGS.mark_as_parsed()  # Grain reads absl's flags
    try:
        if args.steps < 4 or args.steps % 4:
            raise UserError(f"--steps={args.steps}: expected a multiple of 4")
        configs = {int(width): size_config(int(width), args) for width in args.widths.split(",")}
        about = {"steps": args.steps, "clips": args.clips, "i3d": bool(args.i3d)}
        if (args.folder / ABOUT).exists() and (theirs := files.read_json(args.folder / ABOUT)) != about:
            raise UserError(f"{args.folder} has results of {theirs}, expected {about}: choose another folder")
        workdirs = {width: args.folder / f"width_{width}" for width in configs}
        evaluators = {width: in_training.evaluator(configs[width], str(workdirs[width])) for width in configs}
        args.folder.mkdir(parents=True, exist_ok=True)
        files.write_json(args.folder / ABOUT, about)
    except (UserError, ValueError, OSError) as e:
        parser.exit(2, f"compare_sizes.py: {e}\n")
    rows = []
    for width, config in configs.items():
        train(config, str(workdirs[width]), evaluate=evaluators[width])
        rows += rows_of(workdirs[width], config)
        files.write_json(args.folder / "sizes.json", rows)
        files.write_text(args.folder / "sizes.md", table(rows))
        pictures.plot(args.folder / "sizes.png", functools.partial(draw, rows))
    print(table(rows), end="")


if __name__ == "__main__":
    main()
