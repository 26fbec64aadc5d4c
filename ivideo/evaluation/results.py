"""The results of `ivideo.evaluation.quality` as a Markdown table with their protocol."""

_DIGEST = 12  # hexadecimal digits of a digest that are shown


def markdown(found: dict) -> str:
    """The measures with their intervals and protocols, and what was not measured."""
    lines = [table(found), ""]
    for name, protocol in found["protocol"].items():
        lines.append(f"- {name}: {sentence(protocol)}")
    for name in ("samples", "reference"):
        if found[name]:
            lines.append(f"- {name}: {sentence(found[name])}")
    for note in notes(found):
        lines.append(f"- {note}")
    for name, advice in found["not_measured"].items():
        lines.append(f"- not measured: {name}; {advice}")
    return "\n".join(lines)


def table(found: dict) -> str:
    """The measures with their 95% intervals as Markdown, next to those of the reference."""
    real = found["reference_measures"]
    lines = ["| measure | samples | value | 95% interval | reference | better |", "|---|--:|--:|--:|--:|---|"]
    for name, row in found["measures"].items():
        cells = [name, str(row["samples"]), number(row["value"]), f"{number(row['low'])} to {number(row['high'])}"]
        cells += [number(real[name]["value"]) if name in real else "–", row["better"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def notes(found: dict) -> list[str]:
    """What a reader has to know about the numbers."""
    measures, said = found["measures"], []
    if "FVD" in measures:
        said.append(
            "FVD sees errors of single frames much better than errors of motion (arXiv 2404.12391): look at the "
            "measures of time, too"
        )
        if measures["FVD"]["samples"] < 2048:
            said.append("FVD is too large with few samples: published numbers have 2,048. Compare equal numbers only")
    if any(name in measures for name in ("flicker", "warping error", "drift")):
        said.append("flicker, warping error and drift are in levels of 255")
    return said


def sentence(values: dict) -> str:
    """A dict as text: digests are shortened."""
    return ", ".join(f"{name} {_short(value)}" for name, value in values.items())


def number(value: float) -> str:
    """Four significant digits, without an exponent where that is readable."""
    return (
        f"{value:.4g}"
        if 1e-3 <= abs(value) < 1e4 or not value
        else f"{value:.3e}"
        if abs(value) < 1
        else f"{value:.0f}"
    )


def _short(value):
    is_digest = isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
    return value[:_DIGEST] if is_digest else value
