"""Shows what FVD sees: half of a set of true clips is changed in known ways and measured against the other half.

  python launch/fvd_sensitivity.py FOLDER --i3d=FILE [--videos=FOLDER] [--clips=128]

The clips are of 16 frames. They are cut from the files of --videos, one after the other, or are --clips of the
captioned shapes in each half, at 96×160 pixels. Frames are changed at the size that I3D sees, 224×224. --i3d is the
file of I3D's weights (docs/evaluation.md). Writes FOLDER/sensitivity.md and FOLDER/sensitivity.json after every
change. Run it again after an interruption: it continues where it stopped.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Iterable

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np
from scipy import ndimage

from configs import ssr2
from ivideo import files
from ivideo.data import video_io
from ivideo.errors import UserError
from ivideo.evaluation import clip_sets, frechet
from ivideo.evaluation.networks import extract, i3d, layers

FRAMES, BATCH = 16, 8


def noise(level: float):
    """Adds Gaussian noise of this standard deviation, in levels of 255."""
    return lambda clip, rng: np.clip(clip + rng.normal(size=clip.shape) * level / 127.5, -1, 1)


def blur(pixels: float):
    """Blurs every frame by a Gaussian of this standard deviation."""
    return lambda clip, _: ndimage.gaussian_filter(clip, (0, pixels, pixels, 0))


# Each maps a clip [T, H, W, 3] in [-1, 1] and a generator to the changed clip
CHANGES = {
    "none": lambda clip, _: clip,
    "frames shuffled": lambda clip, rng: rng.permutation(clip),
    "first frame repeated": lambda clip, _: np.broadcast_to(clip[:1], clip.shape),
    **{f"noise of {level} of 255": noise(level) for level in (5, 15, 40)},
    **{f"blur of {pixels} px": blur(pixels) for pixels in (1, 2, 4)},
    "other colours (RGB as GBR)": lambda clip, _: np.roll(clip, -1, axis=-1),
}


def halves(clips: list) -> tuple[list, list]:
    """Divides clips at random, always in the same way."""
    order = np.random.default_rng(0).permutation(len(clips))
    middle = len(clips) // 2
    return [clips[n] for n in order[:middle]], [clips[n] for n in order[middle : 2 * middle]]


def clips_of_files(folder: str) -> list[np.ndarray]:
    """All clips uint8 [16, H, W, 3] that do not overlap, of every video file of a folder."""
    found = []
    for name in clip_sets.video_names(folder):
        frames, _ = video_io.read_video(os.path.join(folder, name))
        found += [frames[begin : begin + FRAMES] for begin in range(0, len(frames) - FRAMES + 1, FRAMES)]
    return found


def clips_of_shapes(count: int) -> list[np.ndarray]:
    """Clips uint8 [16, 96, 160, 3] of captioned shapes, whose captions are in random order."""
    selection = clip_sets.Selection(FRAMES)
    true = clip_sets.from_source(ssr2.get_config("demo"), clip_sets.SHAPES, selection, clips=count)
    return [clip for _, clip in true.read(range(count))]


def features(weights, clips: Iterable[np.ndarray], change) -> np.ndarray:
    """The features of changed clips. Clip n is changed with a generator of the seed n."""
    ready = (np.asarray(layers.resize(clip, i3d.SIZE)) for clip in clips)
    changed = (change(clip, np.random.default_rng(n)).astype(np.float32) for n, clip in enumerate(ready))
    return extract.extract(i3d.features, weights.params, changed, batch=BATCH)


def table(found: dict) -> str:
    lines = [f"FVD against {found['clips']} clips of {found['of']}", ""]
    lines += [f"| change of {found['clips']} others | FVD | 95% interval |", "|---|--:|--:|"]
    for row in found["rows"]:
        lines.append(f"| {row['change']} | {row['fvd']:.1f} | {row['low']:.1f} to {row['high']:.1f} |")
    return "\n".join(lines) + "\n"


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--i3d", required=True)
    parser.add_argument("--videos", default="", help="a folder of video files")
    parser.add_argument("--clips", type=int, default=128, help="clips of the captioned shapes in each half")
    args = parser.parse_args(arguments)
    path = args.folder / "sensitivity.json"
    try:
        weights = i3d.read(args.i3d)
        if args.clips < 2:
            raise UserError(f"--clips={args.clips}: expected 2 or more")
        changed, reference = halves(clips_of_files(args.videos) if args.videos else clips_of_shapes(2 * args.clips))
        if len(reference) < 2:
            raise UserError(f"{args.videos} has too few frames: expected two clips of {FRAMES} frames for each half")
        about = {"of": args.videos or clip_sets.SHAPES, "clips": len(reference), "weights": weights.digest}
        found = files.read_json(path) if path.exists() else {**about, "rows": []}
        if (theirs := {key: found.get(key) for key in about}) != about:
            raise UserError(f"{path} is of {theirs}, expected {about}: choose another folder")
        args.folder.mkdir(parents=True, exist_ok=True)
    except (UserError, OSError) as e:
        parser.exit(2, f"fvd_sensitivity.py: {e}\n")
    finished, statistics = {row["change"] for row in found["rows"]}, None
    for name, change in CHANGES.items():
        if name in finished:
            continue
        statistics = statistics or frechet.measure(features(weights, reference, CHANGES["none"]))
        value, (low, high) = frechet.distance_interval(features(weights, changed, change), statistics)
        found["rows"].append({"change": name, "fvd": value, "low": low, "high": high})
        files.write_json(path, found)
        files.write_text(args.folder / "sensitivity.md", table(found))
    print(table(found), end="")


if __name__ == "__main__":
    main()
