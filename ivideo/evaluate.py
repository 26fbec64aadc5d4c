"""How good a trained stage is. Section 3."""

import json
import os

import numpy as np

from ivideo.data import shapes
from ivideo.errors import UserError
from ivideo.generate import load_weights, sample_videos
from ivideo.metrics import prompt_following as metric


def prompt_following(config, *, workdir=None, clips=96, seed=0, out=None, as_json=False, overwrite=False) -> dict:
    """Samples clips of the captioned shapes, half of seen and half of held-out captions, and scores each attribute.

    Prints a table of the share that is right (JSON with `as_json`) and writes it with every clip's score to `out`.
    """
    if out is not None and os.path.exists(out) and not overwrite:
        raise UserError(f"{out} exists: choose another --out, or pass --overwrite to replace it")
    attributes = choose_captions(clips, seed)
    params = load_weights(config, workdir)
    seeds = [(seed, n) for n in range(len(attributes))]
    videos = sample_videos(config, params, [shapes.caption(a) for a in attributes], seeds=seeds)
    scored = [(a, metric.score(v, a)) for a, v in zip(attributes, videos, strict=True)]
    table = metric.summarize(scored)
    print(json.dumps(table) if as_json else metric.format_table(table))
    if out is not None:
        rows = [{"caption": shapes.caption(a), "held_out": shapes.held_out(a), **s} for a, s in scored]
        temporary = f"{out}.tmp{os.getpid()}"
        with open(temporary, "w") as f:
            json.dump({"table": table, "clips": rows}, f, indent=1, default=bool)
        os.replace(temporary, out)
    return table


def choose_captions(clips: int, seed: int) -> list[shapes.Attributes]:
    """Half of the clips' attributes from the training captions, half held out; none twice before all have been used."""
    rng = np.random.default_rng(seed)

    def draw(pool, count):
        order = np.concatenate([rng.permutation(len(pool)) for _ in range(-(-count // len(pool)))])
        return [pool[i] for i in order[:count]]

    return draw(shapes.TRAIN, clips - clips // 2) + draw(shapes.HELD_OUT, clips // 2)
