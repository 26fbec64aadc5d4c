"""Samples with kill -9 at random moments, and compares the videos with those of an uninterrupted run.

python tests/soak_sampling.py FOLDER [--kills=10] [--prompts=12] [--seed=0]

The smallest base stage is trained for two steps, and sampled for twelve prompts twice: to FOLDER/whole with one
command, and to FOLDER/killed with the same command and --resume, which is killed at random moments and restarted until
it ends. Exit code 0 if both folders have the same complete files, equal frame by frame.
"""

import argparse
import os
import pathlib
import random
import subprocess
import sys
import time

# As tests/conftest.py has it: the networks are tiny, to optimise their machine code would cost more than it saves
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

from ivideo.data import video_io

ROOT = pathlib.Path(__file__).resolve().parent.parent
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
SHAPES = ("circle", "square", "star", "triangle")


def command(folder: pathlib.Path, out: str | None, *more: str) -> list[str]:
    """Trains the stage in FOLDER/run, or with `out` samples into that folder."""
    base = [sys.executable, "-m", "ivideo.main", "--config=configs/base.py:small", f"--workdir={folder / 'run'}"]
    base += [f"--compile_cache={folder / 'compiled'}"]
    if out is None:
        return [*base, "--config.train.steps=2", "--config.train.checkpoint_every=2"]
    sample = ["--mode=sample", f"--prompts_file={folder / 'prompts.txt'}", f"--out={folder / out}", "--resume"]
    # Many small batches and groups, so that kills fall between and into them
    return [*base, *sample, "--config.sample.batch=2", "--config.sample.group=4", "--config.sample.steps=16", *more]


def run(arguments: list[str], kill_after: float | None = None) -> int:
    """Runs a command and returns its exit code. Kills it after `seconds`, if given."""
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        return process.wait(kill_after)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def count(folder: pathlib.Path) -> int:
    return len(list(folder.glob("*.mp4")))


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="folder to make")
    parser.add_argument("--kills", type=int, default=10, help="how often kill -9 (10)")
    parser.add_argument("--prompts", type=int, default=12, help="how many prompts (12)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f"{args.folder} exists: name a new folder")
    folder, rng = args.folder.resolve(), random.Random(args.seed)
    folder.mkdir(parents=True)
    prompts = [f"a {COLOURS[n % 6]} {SHAPES[n // 6 % 4]}" for n in range(args.prompts)]
    (folder / "prompts.txt").write_text("\n".join(prompts))
    if run(command(folder, None)) or run(command(folder, "whole")):
        return 1
    # All programs are in the compile cache now
    total = time.monotonic()
    run(command(folder, "timed"))
    total = time.monotonic() - total
    kills = 0
    while kills < args.kills:
        # A third of the kills may come before the first video, the others while videos are written
        seconds = rng.uniform(0.3, 1) * total
        code = run(command(folder, "killed"), seconds)
        kills += code == -9
        print(
            f"{'kill -9' if code == -9 else 'ended'} after {seconds:.1f} s: {count(folder / 'killed')} videos",
            flush=True,
        )
        if code == 0:  # too late for a kill: some of its videos are made again
            for path in rng.sample(sorted((folder / "killed").glob("*.mp4")), args.prompts // 2):
                path.unlink()
        elif code != -9:
            return 1
    if run(command(folder, "killed")):
        return 1
    whole, killed = ({p.name: p for p in (folder / name).glob("*.mp4")} for name in ("whole", "killed"))
    if whole.keys() != killed.keys() or len(whole) != args.prompts:
        print(f"{len(killed)} videos, expected {args.prompts}")
        return 1
    same_bytes = 0
    for name, path in whole.items():
        if not np.array_equal(video_io.read_video(path)[0], video_io.read_video(killed[name])[0]):
            print(f"{name} differs")
            return 1
        same_bytes += path.read_bytes() == killed[name].read_bytes()
    print(f"{kills} kills: {len(whole)} whole videos, equal frame by frame; {same_bytes} files equal byte by byte")
    return 0


if __name__ == "__main__":
    sys.exit(main())
