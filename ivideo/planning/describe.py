"""Describes a stage from its config: parameters, sizes, FLOPs and layers. Allocates and compiles nothing."""

import json
import math

import jax
import jax.numpy as jnp

from ivideo import stages
from ivideo.devices import flops
from ivideo.sampling import cascade
from ivideo.text import encoder_module


def facts(config) -> dict:
    """Everything that `describe` prints, as numbers, strings and lists.

    `input`: the size of the stage's input. Its `kind` is "noise" for the base stage and "video" for a super-resolution
    stage, whose network sees the upsampled clip as `channels` extra channels next to the noise.
    `levels`: from the finest on. A level has `blocks` blocks on the way down and as many on the way up.
    Sizes are in pixels, `fps` in frames per second. FLOPs are for one evaluation of the network on one video.
    """
    frames, height, width, _ = stages.video_shape(config)
    size = {"frames": frames, "height": height, "width": width}
    cond = stages.cond_channels(config)
    source = config.cond if config.cond.frames else config.video
    input_size = {name: source[name] for name in ("frames", "height", "width", "fps")}
    params = stages.param_shapes(config)
    parts = {name: param_count(part) for name, part in sorted(params.items())}
    return {
        "stage": config.stage,
        "variant": config.variant,
        "parameters": sum(parts.values()),
        "parts": parts,
        "input": {"kind": "video" if cond else "noise", **input_size, "channels": cond},
        "output": size,
        "fps": config.video.fps,
        "forward_flops": forward_flops(config),
        "levels": _levels(config.model, height, width),
        "text": _text(config.text),
    }


def forward_flops(config, batch: int = 1) -> int:
    """FLOPs of one evaluation of the stage's network on a batch of videos, without the text encoder."""
    model = stages.build_model(config)
    args, optional = stages.model_inputs(config, batch)
    return flops.count(
        lambda params, *a, **k: model.apply({"params": params}, *a, **k), stages.param_shapes(config), *args, **optional
    )


def describe(config, *, as_json: bool = False) -> None:
    """Prints the facts of a stage as a table or JSON. For a cascade, prints one line or one JSON object per stage."""
    found = [facts(stage) for stage in cascade.select(config)]
    if not cascade.is_cascade(config):
        print(json.dumps(found[0], indent=2) if as_json else _table(found[0]))
    else:
        print(json.dumps(found, indent=2) if as_json else _cascade_table(found))


def param_count(shapes) -> int:
    """The number of parameters in a tree of arrays or of their shapes."""
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
    return {"parameters": param_count(params), **sizes}


def _table(found: dict) -> str:
    source, text = found["input"], found["text"]
    source_text = "noise" if source["kind"] == "noise" else f"a video at {source['fps']} fps"
    blocks = {"down_": 0, "middle": 0, "up_": 0}
    for name, size in found["parts"].items():
        kind = next((kind for kind in blocks if name.startswith(kind)), "rest")
        blocks[kind] = blocks.get(kind, 0) + size
    parts = ", ".join(f"{kind.strip('_')} {human(size)}" for kind, size in blocks.items())
    lines = [
        f"{found['stage']}:{found['variant']}",
        f"parameters  {found['parameters']:,} ({human(found['parameters'])}: {parts})",
        f"input       {source_text}, {_video(source)}",
        f"output      {_video(found['output'])} at {found['fps']} fps",
        f"forward     {human_flops(found['forward_flops'])} for one video",
        f"text        {text['length']} tokens of {text['vocab']}, {text['layers']} layers of {text['dim']}, "
        f"{text['heads']} heads of {text['head_dim']}, inner {text['ff']} ({human(text['parameters'])} parameters)",
        "",
    ]
    rows = [("level", "pixels", "channels", "blocks each way", "spatial", "text", "temporal")]
    for i, level in enumerate(found["levels"]):
        attention = ["attention" if level[key] else "none" for key in ("spatial_attention", "cross_attention")]
        pixels = f"{level['height']} × {level['width']}"
        rows.append((i, pixels, level["channels"], level["blocks"], *attention, level["temporal"]))
    return "\n".join(lines + columns(rows))


def _video(size: dict) -> str:
    return f"{size['frames']} × {size['height']} × {size['width']}"


def _cascade_table(found: list[dict]) -> str:
    rows = [("stage", "parameters", "input", "output", "fps", "forward, one video")]
    for stage in found:
        source = "noise" if stage["input"]["kind"] == "noise" else _video(stage["input"])
        size = human(stage["parameters"])
        flops = human_flops(stage["forward_flops"])
        rows.append((stage["stage"], size, source, _video(stage["output"]), stage["fps"], flops))
    return "\n".join([*columns(rows), f"total: {human(sum(stage['parameters'] for stage in found))} parameters"])


def columns(rows) -> list[str]:
    """Formats rows of cells as lines of aligned columns."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def human(number: float, letters: str = "KMBT") -> str:
    """A number with three digits and a letter per power of 1000: 5.61B. Units use SI's `letters`."""
    for letter in ("", *letters):
        if number < 999.5 or letter == letters[-1]:
            return f"{number:.3g}{letter}" if number < 999.5 else f"{number:,.0f}{letter}"
        number /= 1000


def human_flops(number: float) -> str:
    """FLOPs with three digits: 2.69 GFLOPs."""
    digits = human(number, "KMGTPE")
    return f"{digits[:-1]} {digits[-1]}FLOPs" if digits[-1].isalpha() else f"{digits} FLOPs"
