"""Mode show_data: files that show what a stage's network sees in training."""

import math
import os
from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ivideo import files, text
from ivideo.data import video_io
from ivideo.data.pipeline import make_iterator
from ivideo.training import loop, step

CLIPS = 4  # the first of the first batch
COLUMNS, HEIGHT = 8, 96  # pictures in a row of the sheet, and the pixels of their height
SMALLEST = 240  # pixels of a video's height, below which its pixels are enlarged
SHEET, CAPTIONS = "sheet.png", "captions.txt"
MARGIN, LINE = 4, 16  # pixels between pictures, and of a line of text


def show_data(config, out: str, *, overwrite: bool = False) -> list[str]:
    """Writes what a stage's network sees of the first clips of training to the folder `out`, and returns the paths.

    For each clip an mp4, for super-resolution also one of its low-resolution clip with the noise of the first step, as
    it is given to the network: upsampled. sheet.png has frames of all of them and the packed images. captions.txt has
    the captions as the text encoder reads them, decoded from their tokens. UserError, before anything is written, where
    the data cannot be read, or a file exists and `overwrite` is off.
    """
    count = min(CLIPS, config.train.batch_size)
    names = [SHEET, CAPTIONS, *(f"{k:03}.mp4" for k in range(count))]
    names += [f"{k:03}.low_res.mp4" for k in range(count) if config.cond.frames]
    paths = {name: os.path.join(out, name) for name in names}
    files.refuse_existing(list(paths.values()), overwrite=overwrite)
    samples = read(config, count)
    files.prepare_folders(list(paths.values()))
    for k, sample in enumerate(samples):
        for name, clip in ((f"{k:03}.mp4", sample["video"]), (f"{k:03}.low_res.mp4", sample.get("low_res"))):
            if clip is not None:
                video_io.write_video(paths[name], _enlarged(clip), fps=config.video.fps, overwrite=overwrite)
    lines = [line for sample in samples for line in (sample["caption"], *sample["image_captions"])]
    files.write_text(paths[CAPTIONS], "".join(f"{line}\n" for line in lines))
    with files.atomic_write(paths[SHEET]) as temporary:
        _sheet(samples).save(temporary, format="png")
    print(f"{out}: {count} clips of stage {config.stage}, {', '.join(names[:3])}, …")
    return list(paths.values())


def read(config, count: int) -> list[dict]:
    """The first samples of training, each a dict of uint8 arrays and texts.

    `video` [T,H,W,3], `caption`, `images` [K,H,W,3] and `image_captions`; for super-resolution also `low_res`
    [T + K,H,W,3], with the log-SNR `level` of its noise.
    """
    tokenizer = text.tokenizer_of(config.text)
    batch = next(
        make_iterator(
            loop.data_source(config), images=loop.image_source(config), batch_size=count, seed=config.seed,
            num_images=config.data.num_images, tokenize=tokenizer, text_length=config.text.length,
            max_unreadable=config.data.max_unreadable,
        )
    )  # fmt: skip
    captions = [tokenizer.decode(tokens) for tokens in batch["tokens"]]
    nothing = np.zeros((count, 0), np.int32)
    packed = [[tokenizer.decode(tokens) for tokens in row] for row in batch.get("image_tokens", nothing)]
    found = {"video": batch["video"], "caption": captions, "images": batch.get("images", nothing)}
    found["image_captions"] = packed
    if config.cond.frames:
        keys = step.draws(step.step_key(config, 0), config.train.batch_size)["key"]
        given = jax.jit(lambda batch, keys: _conditioning(config, batch, keys))(
            {name: batch[name] for name in ("video", "images") if name in batch}, keys[:count]
        )
        low_res = np.clip(np.asarray(given["cond"])[..., :3], -1, 1)
        found["low_res"] = [video_io.to_uint8(clip) for clip in low_res]
        found["level"] = np.asarray(given["aug_logsnr"])
    return [{name: values[k] for name, values in found.items()} for k in range(count)]


def _conditioning(config, batch, keys):
    """The conditioning of the step, which draws the noise from the third part of each sample's key (`step.example`)."""
    return step.conditioning_inputs(config, step.prepare(None, None, batch), step.sample_keys(keys)[2])


def _enlarged(video: np.ndarray) -> np.ndarray:
    """Small videos enlarged; the number of rows and columns even, which video files need."""
    zoom = math.ceil(SMALLEST / video.shape[1])
    if zoom % 2 and (video.shape[1] % 2 or video.shape[2] % 2):
        zoom += 1
    return video_io.zoomed(video, zoom)


def _sheet(samples: Sequence[dict]) -> Image.Image:
    """One picture of all samples: rows of pictures, each under a line of text."""
    rows = []
    for sample in samples:
        frames = video_io.evenly(len(sample["video"]), COLUMNS)
        rows.append((sample["caption"] or "(no text)", sample["video"][frames]))
        if "low_res" in sample:
            level = f"low-resolution clip, noise of log-SNR {sample['level']:.1f}"
            rows.append((level, sample["low_res"][frames]))
        for start in range(0, len(sample["images"]), COLUMNS):
            texts = " | ".join(sample["image_captions"][start : start + COLUMNS])
            rows.append((f"images: {texts}", sample["images"][start : start + COLUMNS]))
            if "low_res" in sample:
                first = len(sample["video"]) + start
                rows.append((f"{level}, of these", sample["low_res"][first : first + COLUMNS]))
    height, width = samples[0]["video"].shape[1:3]
    width = max(1, round(width * HEIGHT / height))
    tall, wide = HEIGHT + LINE + MARGIN, width + MARGIN
    sheet = Image.new("RGB", (COLUMNS * wide, len(rows) * tall), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=LINE - 4)
    for y, (label, pictures) in enumerate(rows):
        draw.text((0, y * tall), label.encode("latin1", "replace").decode("latin1"), fill="black", font=font)
        for x, picture in enumerate(pictures):
            kind = Image.Resampling.NEAREST if height < HEIGHT else Image.Resampling.BOX
            sheet.paste(Image.fromarray(picture).resize((width, HEIGHT), kind), (x * wide, y * tall + LINE))
    return sheet
