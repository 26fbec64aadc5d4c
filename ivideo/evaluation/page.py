"""The results of `ivideo.evaluation.quality` as one HTML page with videos, plots and the protocol in it."""

import base64
import html as escaping
import json
import os
from collections.abc import Mapping, Sequence

from ivideo.evaluation import results
from ivideo.evaluation.judges import SHOWN

_WIDTH, _HEIGHT, _EDGE = 460, 190, 46  # pixels of a plot, and of its labels
_COLOURS = ("#1b6ac9", "#c2571a")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td, th { border-bottom: 1px solid #ccc; padding: .2em .8em; text-align: right }
td:first-child, th:first-child { text-align: left } figure { display: inline-block; margin: .5em; width: 210px }
video { width: 100% } figcaption { font-size: 12px; color: #555 } svg { margin-right: 1em } h2 { margin-top: 1.5em }
pre { background: #f4f4f4; overflow-x: auto; padding: 1em; font-size: 12px }
"""


def html(found: Mapping, folders: Mapping[str, str], captions: Sequence[str | None]) -> str:
    """The page. `folders` have the videos of the samples and of the reference, 000.mp4 and so on."""
    rows = [line.strip("| ").split(" | ") for line in results.table(found).splitlines()]
    head, body = rows[0], rows[2:]
    parts = ["<h1>Quality of samples</h1>", "<table>", _row("th", head), *(_row("td", row) for row in body), "</table>"]
    said = results.notes(found) + [f"not measured: {name}; {what}" for name, what in found["not_measured"].items()]
    parts += ["<ul>", *(f"<li>{_text(line)}</li>" for line in said), "</ul>"]
    if len(found["fewer_clips"]) > 1:
        points = [(int(count), value) for count, value in found["fewer_clips"].items()]
        parts += ["<h2>FVD of the first clips</h2>", plot({"samples": points}, x="clips", y="FVD")]
    changes = {name: list(enumerate(values, 1)) for name, values in found["frame_changes"].items()}
    parts += [
        "<h2>Mean change from one frame to the next, of 255</h2>",
        plot(changes, x="frame", y="change"),
    ]
    for name, folder in folders.items():
        videos = _videos(folder, captions if name == "samples" else ())
        parts += [f"<h2>{name.capitalize()}</h2>", *videos] if videos else []
    protocol = {name: found[name] for name in ("protocol", "samples", "reference")}
    parts += ["<h2>Protocol</h2>", f"<pre>{_text(json.dumps(protocol, indent=1))}</pre>"]
    head = f'<meta charset="utf-8"><title>Quality of samples</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"


def plot(lines: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str) -> str:
    """Lines of points by name, as an SVG picture. The vertical axis begins at 0."""
    points = [point for line in lines.values() for point in line]
    left, right = min(p[0] for p in points), max(p[0] for p in points)
    top = max(p[1] for p in points) or 1.0

    def place(a, b):
        across = (a - left) / ((right - left) or 1) * (_WIDTH - 2 * _EDGE) + _EDGE
        return f"{across:.1f},{_HEIGHT - _EDGE - b / top * (_HEIGHT - 2 * _EDGE):.1f}"

    parts = [f'<svg width="{_WIDTH}" height="{_HEIGHT}" font-size="11" role="img">']
    frame = " ".join(place(*corner) for corner in ((left, top), (left, 0), (right, 0)))
    parts.append(f'<polyline points="{frame}" fill="none" stroke="#999"/>')
    labels = [(_EDGE, _HEIGHT - 30, left), (_WIDTH - _EDGE, _HEIGHT - 30, right), (4, _EDGE + 4, top)]
    parts += [f'<text x="{a}" y="{b}">{results.number(value)}</text>' for a, b, value in labels]
    parts.append(f'<text x="{_WIDTH // 2}" y="{_HEIGHT - 14}">{_text(x)}</text><text x="4" y="24">{_text(y)}</text>')
    for number, (name, line) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        parts.append(f'<polyline points="{" ".join(place(*p) for p in line)}" fill="none" stroke="{colour}"/>')
        parts += ['<circle cx="{}" cy="{}" r="2.5" fill="{}"/>'.format(*place(*p).split(","), colour) for p in line]
        parts.append(f'<text x="{_WIDTH - 110}" y="{16 + 14 * number}" fill="{colour}">{_text(name)}</text>')
    return "".join([*parts, "</svg>"])


def _videos(folder, captions):
    figures = []
    for number in range(SHOWN):
        path = os.path.join(folder, f"{number:03d}.mp4")
        if not os.path.exists(path):
            continue
        with open(path, "rb") as f:
            data = base64.b64encode(f.read()).decode()
        caption = captions[number] if number < len(captions) and captions[number] else ""
        figures.append(
            f'<figure><video autoplay loop muted playsinline controls src="data:video/mp4;base64,{data}"></video>'
            f"<figcaption>{_text(caption)}</figcaption></figure>"
        )
    return figures


def _row(tag, cells):
    return f"<tr>{''.join(f'<{tag}>{_text(cell)}</{tag}>' for cell in cells)}</tr>"


def _text(value):
    return escaping.escape(str(value))
