"""The report of a prepared set: one HTML file with histograms, pictures, and what was left out and why."""

import base64
import collections
import html
import itertools
import os

import numpy as np

from ivideo import files
from ivideo.data import video_io
from ivideo.data.images import read_image
from ivideo.data.pictures import VideoError
from ivideo.data.preparing.choosing import REASONS
from ivideo.data.preparing.items import Item, Rejected
from ivideo.data.preparing.measuring import thumbnail

EXAMPLES = 10  # of each reason
NOT_SHOWN = ("crashed", "timeout", "large")  # reading such files would end or stop this process, or fill its memory
SHOWN = 30  # pictures of files of the set
HISTOGRAMS = {  # what is shown of the files of the set
    "seconds": "length, seconds",
    "fps": "frames per second",
    "height": "height, pixels",
    "width": "width, pixels",
    "motion": "motion, levels of 255 in a quarter of a second",
    "jump": "largest difference of neighbouring frames, levels of 255",
    "bytes": "size, bytes",
}
_STYLE = """
body { font: 15px/1.4 sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; }
figure { display: inline-block; width: 200px; margin: 4px; vertical-align: top; font-size: 12px; }
figure { overflow-wrap: anywhere; }
img { height: 96px; max-width: 200px; object-fit: contain; }
svg { margin: 8px; }
td, th { padding: 2px 12px 2px 0; text-align: left; }
"""


def write(path: str, media: str, kept: list[dict], rejected: list[Rejected], by_name: dict[str, Item]) -> None:
    """Writes the report. `kept` are the rows of the set's files; `by_name` has all files, for their pictures."""
    parts = [f"<h1>{len(kept):,} {media}s, {len(rejected):,} left out</h1>"]
    parts += _reasons(rejected)
    if kept:
        parts.append("<h2>The set</h2>")
        shown = {name: title for name, title in HISTOGRAMS.items() if name in kept[0]}
        parts += [_histogram(title, [row[name] for row in kept]) for name, title in shown.items()]
        parts.append(f"<p>{len({caption for row in kept for caption in row['captions']}):,} different captions</p>")
        every = max(1, len(kept) // SHOWN)
        for row in itertools.islice(kept, 0, every * SHOWN, every):
            parts.append(_figure(by_name[row["name"]], media, row["captions"][0]))
    for reason, ones in _grouped(rejected).items():
        parts.append(f"<h2>Left out: {reason}, {REASONS[reason]} ({len(ones):,})</h2>")
        for one in ones[:EXAMPLES]:
            item = None if reason in NOT_SHOWN else by_name.get(one.name)
            parts.append(_figure(item, media, one.detail, name=one.name))
    body = "\n".join(parts)
    files.write_text(
        path, f'<!doctype html><meta charset="utf-8"><title>Prepared data</title><style>{_STYLE}</style>\n{body}\n'
    )


def _grouped(rejected: list[Rejected]) -> dict[str, list[Rejected]]:
    groups = collections.defaultdict(list)
    for one in rejected:
        groups[one.reason].append(one)
    return {reason: groups[reason] for reason in REASONS if reason in groups}


def _reasons(rejected: list[Rejected]) -> list[str]:
    rows = [
        f"<tr><td>{reason}<td>{len(ones):,}<td>{REASONS[reason]}</tr>" for reason, ones in _grouped(rejected).items()
    ]
    return ["<table><tr><th>left out<th>files<th>because it is</tr>", *rows, "</table>"] if rows else []


def _histogram(title: str, values: list[float], *, width: int = 320, height: int = 100, bins: int = 32) -> str:
    counts, edges = np.histogram(values, bins=bins)
    step = width / bins
    bars = "".join(
        f'<rect x="{k * step:.1f}" y="{height * (1 - n / counts.max()):.1f}" width="{step - 1:.1f}" '
        f'height="{height * n / counts.max():.1f}" fill="#468"><title>{low:g} to {high:g}: {n}</title></rect>'
        for k, (n, low, high) in enumerate(zip(counts, edges, edges[1:], strict=False))
    )
    middle = float(np.median(values))
    label = f"{title}: {edges[0]:g} to {edges[-1]:g}, median {middle:g}"
    return (
        f'<svg width="{width}" height="{height + 20}">{bars}'
        f'<text x="0" y="{height + 15}" font-size="11">{html.escape(label)}</text></svg>'
    )


def _figure(item: Item | None, media: str, text: str, name: str = "") -> str:
    picture = "" if item is None else _picture(item, media)
    name = name or (item.name if item else "")
    return f"<figure>{picture}<br><b>{html.escape(name)}</b><br>{html.escape(text[:300])}</figure>"


def _picture(item: Item, media: str) -> str:
    """An image element with a frame of the file, or nothing if it cannot be read."""
    if not files.in_bucket(item.path) and not os.path.isfile(item.path):  # reading a pipe may take forever
        return ""
    try:
        data = item.read()
        image = read_image(data) if media == "image" else next(video_io.iter_frames(data, frames=1, fps=1))
    except (VideoError, OSError):
        return ""
    return f'<img src="data:image/jpeg;base64,{base64.b64encode(thumbnail(image, height=96)).decode()}">'
