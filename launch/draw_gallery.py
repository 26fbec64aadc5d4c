"""Makes the moving pictures of docs/gallery.md with the small cascade.

  python launch/draw_gallery.py FOLDER [--clip=FILE] [--workdir=DIR] [--only=stages,clip]

FOLDER/prompts.webp: the videos of twelve prompts, four of which have attributes that were held out together.
stages.webp: the outputs of all stages for one prompt. clip.webp: your own video, made small, and what the
super-resolution stages make of it. Each is replaced if it exists, plays for the clip's 16/3 seconds at 12 frames per
second, and has under 1 MB.
"""

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import numpy as np
from figures import PROMPTS
from PIL import Image, ImageDraw

from ivideo import files
from ivideo.config_files import load_config
from ivideo.data import shapes, video_io
from ivideo.errors import UserError
from ivideo.prompts import samples
from ivideo.sampling import cascade
from ivideo.sampling.generate import read_clip
from ivideo.training import trained

PROMPT = "a yellow star moving right on a teal background"
SIZE = (160, 96)  # of a panel, width and height in pixels
TITLE = 14  # pixels
FPS = 12
MAX_BYTES = 1_000_000
PARTS = ("prompts", "stages", "clip")


def panel(video: np.ndarray, title: str, times: np.ndarray) -> np.ndarray:
    """The frames that a clip [T,H,W,3] in [-1, 1] shows at `times` in [0, 1), at SIZE under a title, uint8."""
    levels = video_io.to_uint8(video)
    method = Image.Resampling.NEAREST if levels.shape[2] < SIZE[0] else Image.Resampling.LANCZOS
    drawn = []
    for time in times:
        picture = Image.new("RGB", (SIZE[0] + 4, SIZE[1] + TITLE + 4), "white")
        picture.paste(Image.fromarray(levels[int(time * len(levels))]).resize(SIZE, method), (2, TITLE))
        ImageDraw.Draw(picture).text((2, 0), title, fill="black")
        drawn.append(np.asarray(picture))
    return np.stack(drawn)


def write_grid(path: pathlib.Path, clips: list[np.ndarray], titles: list[str], *, columns: int) -> None:
    """Writes clips side by side as an animated WebP. UserError if it has more than MAX_BYTES."""
    times = np.arange(0, 1, 3 / 16 / FPS)
    panels = [panel(clip, title, times) for clip, title in zip(clips, titles, strict=True)]
    panels += [np.full_like(panels[0], 255)] * (-len(panels) % columns)
    rows = [np.concatenate(panels[i : i + columns], axis=2) for i in range(0, len(panels), columns)]
    first, *rest = [Image.fromarray(frame) for frame in np.concatenate(rows, axis=1)]
    with files.atomic_write(path) as temporary:
        options = {"duration": round(1000 / FPS), "loop": 0, "quality": 60}
        first.save(temporary, format="webp", save_all=True, append_images=rest, **options)
        if (size := pathlib.Path(temporary).stat().st_size) > MAX_BYTES:
            raise UserError(f"{path} would have {size:,} bytes, expected at most {MAX_BYTES:,}")
    print(f"{path}: {len(clips)} clips, {size:,} bytes", flush=True)


def title_of(prompt: str) -> str:
    """A prompt in few words: `yellow star, right, teal`."""
    attrs = shapes.parse_caption(prompt)
    return f"{attrs.colour} {attrs.shape}, {attrs.motion}, {attrs.background}"


def draw(args) -> None:
    """Draws the pictures that the arguments ask for. UserError or OSError, before anything is sampled, for mistakes."""
    parts = args.only.split(",")
    if unknown := set(parts) - set(PARTS):
        raise UserError(f"--only={args.only}: {min(unknown)!r} is unknown, expected some of {', '.join(PARTS)}")
    if parts == ["clip"] and not args.clip:
        raise UserError("--only=clip needs --clip=FILE")
    configs = cascade.select(load_config("configs/cascade.py:demo"))
    sources = trained.find(configs, workdir=args.workdir)
    for config in configs:
        trained.check(config, sources[config.stage])
    clip = read_clip(args.clip, configs[1]) if args.clip else None
    args.folder.mkdir(parents=True, exist_ok=True)

    def sample(prompts, stages, wanted, **options):
        """The videos of the prompts by the stages in `wanted`."""
        noise = [one.noise for one in samples(prompts, seed=args.seed)]
        rows = {config.stage: set(range(len(prompts))) for config in wanted}
        made = cascade.run(stages, prompts, seeds=noise, sources=sources, wanted=rows, group=4, **options)
        return [video for _, _, video in made]

    names = [config.stage for config in configs]
    if "stages" in parts:
        write_grid(args.folder / "stages.webp", sample([PROMPT], configs, configs), names, columns=4)
    if "clip" in parts and clip is not None:
        clips = [clip, *sample([""], configs[1:], configs[1:], low_res=clip[None])]
        write_grid(args.folder / "clip.webp", clips, ["input", *names[1:]], columns=4)
    if "prompts" in parts:
        clips = sample(list(PROMPTS), configs, configs[-1:])
        write_grid(args.folder / "prompts.webp", clips, list(map(title_of, PROMPTS)), columns=4)


def main(arguments=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="where the pictures are written")
    parser.add_argument("--clip", help="a video of your own, for clip.webp")
    parser.add_argument("--workdir", help="a folder of training runs, instead of the weights in the package")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(PARTS), help="the pictures to make")
    try:
        draw(parser.parse_args(arguments))
    except (UserError, OSError) as e:
        parser.exit(2, f"draw_gallery.py: {e}\n")


if __name__ == "__main__":
    main()
