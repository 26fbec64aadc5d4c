"""Draws the pictures of the README and docs from the weights in the package.

  pip install '.[plot]' && python launch/draw_docs.py FOLDER

FOLDER/stages.png: a frame of a held-out caption as the input of each super-resolution stage, upsampled plainly,
upsampled by the stage, and the true frame. FOLDER/star.png: frames of the whole cascade's video of the README's prompt.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import matplotlib
import numpy as np

from configs import cascade as cascade_config
from ivideo.data.video_io import evenly
from ivideo.evaluation import evaluate
from ivideo.prompts import samples
from ivideo.sampling import cascade

matplotlib.use("agg")
from matplotlib import pyplot

PROMPT = "a yellow star moving right on a teal background"
COLUMNS = {"low_res": "input", "trivial": "bilinear, repeated", "stage": "the stage", "truth": "truth"}


def show(panel, frame, title=None) -> None:
    panel.imshow(np.clip((frame + 1) / 2, 0, 1), interpolation="nearest")
    panel.set(xticks=[], yticks=[])
    if title:
        panel.set_title(title, fontsize=9)


def draw_stages(configs, path: pathlib.Path) -> None:
    """One row per stage: input, plain upsampling, output, truth and the two errors.

    The frame is an odd one, which temporal super-resolution stages do not get as input.
    """
    figure, panels = pyplot.subplots(len(configs), 6, figsize=(13, 1.45 * len(configs)), layout="constrained")
    for index, (row, config) in enumerate(zip(panels, configs, strict=True)):
        top = index == 0
        _, videos = evaluate.upsample_held_out_clips(config, clips=1, seed=0)
        number = len(videos["truth"][0]) // 2 + 1
        times = config.video.frames // config.cond.frames
        frames = {name: video[0][number // (times if name == "low_res" else 1)] for name, video in videos.items()}
        for panel, (name, title) in zip(row, COLUMNS.items(), strict=False):
            show(panel, frames[name], title if top else None)
        for panel, name in zip(row[4:], ("trivial", "stage"), strict=True):
            show(panel, 4 * (frames[name] - frames["truth"]), f"error × 4: {COLUMNS[name]}" if top else None)
        row[0].set_ylabel(config.stage)
    figure.savefig(path, dpi=100)


def draw_star(configs, path: pathlib.Path) -> None:
    """Six frames of the cascade's video, from the first to the last."""
    _, _, video = next(cascade.run(configs, [PROMPT], seeds=[samples([PROMPT], seed=0)[0].noise]))
    figure, panels = pyplot.subplots(1, 6, figsize=(13, 1.6), layout="constrained")
    for panel, number in zip(panels, evenly(len(video), 6), strict=True):
        show(panel, video[number], f"frame {number + 1} of {len(video)}")
    figure.savefig(path, dpi=100)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    config = cascade_config.get_config("demo")
    # With each stage's own sampling settings: those in the cascade are tuned for the previous stage's output
    draw_stages([cascade_config.STAGES[name].get_config("demo") for name in config.order[1:]], folder / "stages.png")
    draw_star(cascade.select(config), folder / "star.png")


if __name__ == "__main__":
    main()
