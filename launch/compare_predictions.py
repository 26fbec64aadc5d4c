"""Compares predicting v with predicting eps (Section 2.4, Figures 12 and 13) on the stage ssr2.

  pip install '.[plot]' && python launch/compare_predictions.py FOLDER [--steps=200,400,800] [--clips=6]

Trains the stage twice from the same seed. Each training minimizes the mean squared error of its own prediction;
everything else is equal. It trains on short crops of clips with 8 frames, as in the figures. The demo's settings that
help only v (a shifted schedule and `data_std`) are off. At each number of steps, the stage upsamples held-out clips.
Writes FOLDER/v.json, FOLDER/eps.json and the plot FOLDER/compare.png: PSNR and the error of the background's colour
over training steps. Run it again after an interruption: it continues where it stopped.
"""

import argparse
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from absl import flags

from configs import ssr2
from ivideo.evaluation import evaluate
from ivideo.training.loop import train

PREDICTIONS = ("v", "eps")


def stage_config(prediction: str, steps: int, every: int):
    """The stage's config for a prediction, 'v' or 'eps'."""
    config = ssr2.get_config("demo")
    config.video.frames = config.cond.frames = 8  # as in the figures
    config.model.prediction = config.diffusion.loss = prediction
    config.model.data_std = 1.0  # the network's output is then v or eps itself
    config.diffusion.logsnr_shift, config.diffusion.logsnr_max = 0.0, 20.0
    config.train.decay = "constant"  # so that the learning rate does not depend on the total number of steps
    config.train.steps, config.train.checkpoint_every = steps, every
    config.sample.steps = 16
    return config


def measure(folder: pathlib.Path, prediction: str, milestones: list[int], clips: int) -> list[dict]:
    """Trains to each milestone, a number of steps, and measures PSNR and colour error there."""
    path, workdir = folder / f"{prediction}.json", str(folder / prediction)
    rows = json.loads(path.read_text()) if path.exists() else []
    for steps in milestones:
        if any(row["steps"] == steps for row in rows):
            continue
        config = stage_config(prediction, steps, milestones[0])
        train(config, workdir)
        table = evaluate.super_resolution(config, sources={config.stage: workdir}, clips=clips, seed=0)["table"]
        rows.append({"steps": steps, "psnr": table["stage"], "colour_error": table["colour_error"]})
        path.write_text(json.dumps(rows, indent=1))
        print(prediction, rows[-1], flush=True)
    return rows


def plot(found: dict[str, list[dict]], path: pathlib.Path) -> None:
    """Plots the rows of `measure` per prediction."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for panel, key, label in zip(
        panels, ("psnr", "colour_error"), ("PSNR, dB", "error of the background's colour, of 255"), strict=True
    ):
        for prediction, rows in found.items():
            panel.plot([r["steps"] for r in rows], [r[key] for r in rows], marker="o", label=prediction)
        panel.set(xlabel="training steps", ylabel=label)
        panel.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--steps", default="200,400,800", help="numbers of training steps to measure at")
    parser.add_argument("--clips", type=int, default=6)
    args = parser.parse_args()
    flags.FLAGS.mark_as_parsed()  # Grain reads absl's flags
    milestones = [int(n) for n in args.steps.split(",")]
    args.folder.mkdir(parents=True, exist_ok=True)
    found = {p: measure(args.folder, p, milestones, args.clips) for p in PREDICTIONS}
    plot(found, args.folder / "compare.png")
    print(args.folder / "compare.png")


if __name__ == "__main__":
    main()
