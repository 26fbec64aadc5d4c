"""Measures the CPU time to read training samples from a video file, and what a TPU host needs of it.

  python launch/measure_reading.py CLIP.mp4 [--stages=base,ssr2,ssr3] [--parts=3] [--images=8]

For each stage at the paper's size it reads parts of the clip as training does, and images, which are single frames. For
comparison it decodes the same frames plainly with PyAV: from the key frame before the first one to the last one, in
order, without resizing. It prints a table. Times are CPU seconds, so other programs on the machine hardly change them.

cores: those that a host with four v5p chips needs, to read samples as fast as its chips can train at most. That is the
roofline of a step of 256 videos on 64 chips (docs/tpu.json). Such a host has 208 virtual cores.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time
from fractions import Fraction

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import av
import numpy as np

from ivideo.arguments import load_config
from ivideo.data import decoding
from ivideo.data.preparing import measuring, records
from ivideo.training.loop import data_source

HOSTS = 16  # of 64 chips of v5p
COLUMNS = ("stage", "a part", "an image", "a sample", "samples/s", "MB/s", "plain decoding", "of plain speed", "cores")


def cpu_seconds(run, count: int) -> float:
    """The mean CPU time of `run(k)` for k = 0 .. count-1, after one that is not counted."""
    run(0)
    begin = time.process_time()
    for k in range(count):
        run(k)
    return (time.process_time() - begin) / count


def decode_plainly(data: bytes, source, seed: int) -> None:
    """Decodes the frames that `source.read(0, default_rng(seed))` takes, to RGB, in the simplest way."""
    rng = np.random.default_rng(seed)
    source.crop.place(rng, frames=source.crop.frames, height=source.height, width=source.width)
    seconds = Fraction(source.crop.frames - 1) / Fraction(source.fps)
    with decoding.open_video(data, "a video") as video:
        start = decoding.choose_start(video, seconds, rng.integers) + video.first.time
    wanted = [start + k / Fraction(source.fps) for k in range(source.crop.frames)]
    with decoding.open_video(data, "a video") as video:
        stream = video.stream
        video.container.seek(int(start / stream.time_base), stream=stream)
        for frame in video.container.decode(stream):
            if wanted and frame.pts * stream.time_base >= wanted[0]:
                frame.to_ndarray(format="rgb24")
                wanted.pop(0)
            if not wanted:
                break


def write_set(folder: str, data: bytes, measures: dict) -> None:
    """Writes a set of one clip, with what was measured of it."""
    row = measures | {"captions": ["a clip"], "name": "clip"}
    records.write_shard(records.shard_path(folder, 0, 1), "video", [records.record("video", row, data)])
    records.write_info(folder, "video", [1], len(data), "One clip.")


def measure(stage: str, folder: str, data: bytes, *, parts: int, images: int) -> list[str]:
    """A row of the table."""
    config = load_config(f"configs/{stage}.py")
    config.data.dir = folder
    source = data_source(config)
    part = cpu_seconds(lambda k: source.read(0, np.random.default_rng(k)), parts)
    image = cpu_seconds(lambda k: source.image(0, np.random.default_rng(k)), images)
    plain = cpu_seconds(lambda k: decode_plainly(data, source, k), parts)
    sample = part + config.data.num_images * image
    crop = source.crop
    size = (crop.frames + config.data.num_images) * crop.height * crop.width * 3 / 1e6
    table = json.loads((pathlib.Path(__file__).parents[1] / "docs" / "tpu.json").read_text())
    step = table[f"train {stage} v5p:4x4x4"]
    cores = step["batch"] / HOSTS / step["roofline_seconds"] * sample
    values = [f"{part:.2f}", f"{image:.3f}", f"{sample:.2f}", f"{1 / sample:.2f}", f"{size / sample:.1f}"]
    return [stage, *values, f"{plain:.2f}", f"{plain / part:.2f}", f"{cores:.0f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clip", type=pathlib.Path)
    parser.add_argument("--stages", default="base,ssr2,ssr3")
    parser.add_argument("--parts", type=int, default=3, help="parts of the clip to read")
    parser.add_argument("--images", type=int, default=8, help="images to read")
    args = parser.parse_args()
    data = args.clip.read_bytes()
    measures = measuring.measure_video(data)
    print(
        f"{args.clip}: {measures['width']} x {measures['height']} pixels, {measures['seconds']:.1f} s, "
        f"{measures['fps']:.3g} fps, {8e-6 * len(data) / measures['seconds']:.1f} Mbit/s; PyAV {av.__version__}, "
        f"{os.cpu_count()} cores; {args.parts} parts and {args.images} images of each stage"
    )
    with tempfile.TemporaryDirectory() as folder:
        write_set(folder, data, measures)
        print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
        for stage in args.stages.split(","):
            row = measure(stage, folder, data, parts=args.parts, images=args.images)
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
