"""Times writing a text cache, writes another one with kills, and compares reading a cache with running the encoder.

  python tests/text_speed.py FOLDER [--captions=100000] [--repeats=3] [--kills=3] [--seed=0]

writes caches of that many captions with the small encoder in the package and `--mode=encode_text`, to FOLDER/cache-0,
-1, …. Then it writes one to FOLDER/killed, with `kill -9` at random moments, and compares the files. Finally it times,
in turns, reading the embeddings of a training batch from the cache and computing them with the encoder. Times of
commands include start-up and compilation. All times are medians. Exit code 1 if the files differ.
"""

import argparse
import os
import pathlib
import random
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["JAX_PLATFORMS"] = "cpu"

BATCHES = 200  # that are read and embedded, in turns


def write_captions(path: pathlib.Path, count: int) -> list[str]:
    """Captions of shapes, made unique by a number."""
    from ivideo.data import shapes

    captions = [shapes.caption(attributes) for attributes in shapes.all_attributes()]
    lines = [f"{captions[i % len(captions)]} {i // len(captions):03}" for i in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return lines


def begin(captions: pathlib.Path, out: pathlib.Path) -> subprocess.Popen:
    """The command that writes a cache."""
    command = [sys.executable, "-m", "ivideo.main", "--mode=encode_text", "--config=configs/base.py:demo"]
    command += [f"--captions={captions}", f"--out={out}"]
    env = {**os.environ, "XLA_FLAGS": ""}
    with open(f"{out}.log", "w") as log:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)


def finished(process: subprocess.Popen) -> None:
    if process.wait():
        out = process.args[-1].removeprefix("--out=")
        said = pathlib.Path(f"{out}.log").read_text()[-1000:]
        raise SystemExit(f"encode_text ended with exit code {process.returncode}:\n{said}")


def killed(captions: pathlib.Path, out: pathlib.Path, *, kills: int, rng: random.Random) -> None:
    """Writes a cache with several processes. The first `kills` of them are killed while they write."""

    def shards():
        return len(list(out.glob("texts-*.array_record")))

    for number in range(kills):
        process, before = begin(captions, out), shards()
        while shards() == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 2))
        if process.poll() is not None:
            raise SystemExit(f"the process was done before kill {number + 1}: give more captions, or fewer kills")
        process.kill()
        process.wait()
        print(f"kill -9 number {number + 1}: {shards()} shards done", flush=True)
    finished(begin(captions, out))


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def in_turns(folder: pathlib.Path, lines: list[str], rng: random.Random) -> tuple[float, float, int]:
    """(median seconds to read the embeddings of a training batch, to compute them, the batch's size)."""
    import jax

    from configs import base
    from ivideo.text import load_encoder
    from ivideo.text.cache import TextCache

    config = base.get_config("demo")
    cache, encoder = TextCache.open(str(folder), config.text), load_encoder(config.text)
    times = [], []
    for _ in range(BATCHES + 1):
        captions = rng.sample(lines, config.train.batch_size)
        for texts, seconds in zip((cache, encoder), times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(texts.encode(*texts.tokenize(captions)))
            seconds.append(time.perf_counter() - start)
    return *(statistics.median(seconds[1:]) for seconds in times), config.train.batch_size


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="folder to make")
    parser.add_argument("--captions", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills, and of the batches")
    args = parser.parse_args()
    folder, rng = args.folder.resolve(), random.Random(args.seed)
    folder.mkdir(parents=True)
    lines = write_captions(folder / "captions.txt", args.captions)
    seconds = []
    for i in range(args.repeats):
        start = time.perf_counter()
        finished(begin(folder / "captions.txt", folder / f"cache-{i}"))
        seconds.append(time.perf_counter() - start)
    took = statistics.median(seconds)
    size = sum(path.stat().st_size for path in (folder / "cache-0").iterdir())
    letters = sum(map(len, lines)) / len(lines)
    spread = f"{min(seconds):.1f} to {max(seconds):.1f}"
    print(f"{len(lines):,} captions of {letters:.0f} letters in {took:.1f} s ({spread}): {len(lines) / took:,.0f} a "
          f"second, {size / len(lines):,.0f} MB per million", flush=True)  # fmt: skip

    killed(folder / "captions.txt", folder / "killed", kills=args.kills, rng=rng)
    whole = contents(folder / "cache-0")
    same = all(contents(folder / name) == whole for name in ("killed", *(f"cache-{i}" for i in range(args.repeats))))
    print(f"killed {args.kills} times: {'the same' if same else 'NOT THE SAME'}, file for file ({len(whole)} files)")

    read, embedded, batch = in_turns(folder / "cache-0", lines, rng)
    print(f"a batch of {batch}: read in {1e3 * read:.2f} ms, embedded in {1e3 * embedded:.2f} ms, "
          f"{embedded / read:.1f} times as long")  # fmt: skip
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
