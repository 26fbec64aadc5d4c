"""What a stage is: parameters, sizes, FLOPs and layers, from its config alone. Nothing is allocated or compiled."""

import json
import math

import jax
import jax.numpy as jnp

from ivideo import stages
from ivideo.devices import flops
from ivideo.sampling import cascade
from ivideo.text import encoder_module


def facts(config) -> dict:
    """All that `describe` prints, as numbers, strings and lists.

    `input` is the noise that the stage begins with, or where `kind` is "video" the clip that it enlarges, which its
    network sees at the stage's own size as `channels` channels beside the noise. A level has `blocks` on the way down
    and as many on the way up. Sizes are in pixels, `fps` in frames a second, FLOPs those of one evaluation of the
    network on a batch of one.
    """
    frames, height, width, _ = stages.video_shape(config)
    size = {"frames": frames, "height": height, "width": width}
    cond = stages.cond_channels(config)
    given = config.cond if config.cond.frames else config.video
    given = {name: given[name] for name in ("frames", "height", "width", "fps")}
    params = stages.param_shapes(config)
    parts = {name: _size(part) for name, part in sorted(params.items())}
    return {
        "stage": config.stage,
        "variant": config.variant,
        "parameters": sum(parts.values()),
        "parts": parts,
        "input": {"kind": "video" if cond else "noise", **given, "channels": cond},
        "output": size,
        "fps": config.video.fps,
        "forward_flops": forward_flops(config),
        "levels": _levels(config.model, height, width),
        "text": _text(config.text),
    }


def forward_flops(config, batch: int = 1) -> int:
    """FLOPs of one evaluation of the stage's network on a batch of videos, text encoder not included."""
    model = stages.build_model(config)
    args, optional = stages.model_inputs(config, batch)
    return flops.count(
        lambda params, *a, **k: model.apply({"params": params}, *a, **k), stages.param_shapes(config), *args, **optional
    )


def describe(config, *, as_json: bool = False) -> None:
    """Prints the facts of a stage's config as a table, or as JSON; of the cascade's, a line or an object a stage."""
    found = [facts(stage) for stage in cascade.select(config)]
    if not cascade.is_cascade(config):
        print(json.dumps(found[0], indent=2) if as_json else _table(found[0]))
    else:
        print(json.dumps(found, indent=2) if as_json else _cascade_table(found))


def _size(shapes) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def _levels(model, height: int, width: int) -> list[dict]:
    levels = []
    for i, stride in enumerate(model.strides):
        height, width = height // stride, width // stride
        level = {"height": height, "width": width}
        for name in ("channels", "blocks", "spatial_attention", "cross_attention", "temporal"):
            level[name] = model[name][i]
        levels.append(level)
    return levels


def _text(config) -> dict:
    tokens = jax.ShapeDtypeStruct((1, config.length), jnp.int32)
    params = jax.eval_shape(encoder_module(config).init, jax.random.key(0), tokens, tokens)["params"]
    sizes = {name: config[name] for name in ("length", "vocab", "dim", "layers", "heads", "head_dim", "ff")}
    return {"parameters": _size(params), **sizes}


def _table(found: dict) -> str:
    given, text = found["input"], found["text"]
    source = "noise" if given["kind"] == "noise" else f"a video at {given['fps']} frames a second"
    blocks = {"down_": 0, "middle": 0, "up_": 0}
    for name, size in found["parts"].items():
        kind = next((kind for kind in blocks if name.startswith(kind)), "rest")
        blocks[kind] = blocks.get(kind, 0) + size
    parts = ", ".join(f"{kind.strip('_')} {human(size)}" for kind, size in blocks.items())
    lines = [
        f"{found['stage']}:{found['variant']}",
        f"parameters  {found['parameters']:,} ({human(found['parameters'])}: {parts})",
        f"input       {source}, {_video(given)}",
        f"output      {_video(found['output'])} at {found['fps']} frames a second",
        f"forward     {human_flops(found['forward_flops'])} for one video",
        f"text        {text['length']} tokens of {text['vocab']}, {text['layers']} layers of {text['dim']}, "
        f"{text['heads']} heads of {text['head_dim']}, inner {text['ff']} ({human(text['parameters'])} parameters)",
        "",
    ]
    rows = [("level", "pixels", "channels", "blocks each way", "in space", "to text", "in time")]
    for i, level in enumerate(found["levels"]):
        attention = ["attention" if level[key] else "none" for key in ("spatial_attention", "cross_attention")]
        pixels = f"{level['height']} × {level['width']}"
        rows.append((i, pixels, level["channels"], level["blocks"], *attention, level["temporal"]))
    return "\n".join(lines + columns(rows))


def _video(size: dict) -> str:
    return f"{size['frames']} × {size['height']} × {size['width']}"


def _cascade_table(found: list[dict]) -> str:
    rows = [("stage", "parameters", "input", "output", "frames a second", "forward, one video")]
    for stage in found:
        given = "noise" if stage["input"]["kind"] == "noise" else _video(stage["input"])
        size = human(stage["parameters"])
        flops = human_flops(stage["forward_flops"])
        rows.append((stage["stage"], size, given, _video(stage["output"]), stage["fps"], flops))
    return "\n".join([*columns(rows), f"in all {human(sum(stage['parameters'] for stage in found))} parameters"])


def columns(rows) -> list[str]:
    """Rows of cells as lines, every column as wide as its widest cell."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def human(number: float, letters: str = "KMBT") -> str:
    """A number to three digits and the letter of its thousands: 5.61B of parameters. Units take SI's letters."""
    for letter in ("", *letters):
        if number < 999.5 or letter == letters[-1]:
            return f"{number:.3g}{letter}" if number < 999.5 else f"{number:,.0f}{letter}"
        number /= 1000


def human_flops(number: float) -> str:
    """FLOPs to three digits: 2.69 GFLOPs."""
    digits = human(number, "KMGTPE")
    return f"{digits[:-1]} {digits[-1]}FLOPs" if digits[-1].isalpha() else f"{digits} FLOPs"
