"""How good a trained stage is. Section 3."""

import json

import numpy as np

from ivideo import files, stages
from ivideo.data import shapes
from ivideo.diffusion import conditioning
from ivideo.evaluation import fidelity
from ivideo.evaluation import prompt_following as metric
from ivideo.sampling import cascade, outputs
from ivideo.training import trained


def evaluate(
    config, *, workdir=None, weights_path=None, clips=96, seed=0, out=None, as_json=False, overwrite=False, last=None
) -> dict:
    """Measures what makes videos from texts by `prompt_following`, a super-resolution stage by `super_resolution`.

    `last` is the last stage of a cascade to run. Prints the result's table (JSON with `as_json`), and writes the result
    to `out`. UserError, before anything is computed, where that exists or cannot be written, or where the weights of a
    stage are missing or of another network.
    """
    if out is not None:
        files.refuse_existing([out], overwrite=overwrite)
        outputs.prepare([out])
    configs = cascade.select(config, None, last)
    sources = trained.find(configs, workdir=workdir, weights=weights_path)
    for stage in configs:
        trained.check(stage, sources[stage.stage])
    options = {"sources": sources, "clips": clips, "seed": seed}
    if configs[0].cond.frames:
        result, table = super_resolution(config, **options), psnr_table
    else:
        result, table = prompt_following(configs, group=config.sample.group, **options), following_table
    print(json.dumps(result["table"]) if as_json else table(result["table"]))
    if out is not None:
        files.write_text(out, json.dumps(result, indent=1, default=bool))
    return result


def prompt_following(configs, *, sources=None, group: int = 32, clips: int, seed: int) -> dict:
    """Samples clips of the captioned shapes, half of seen and half of held-out captions, and scores each attribute.

    `configs` are the stages to run, the first from a text, `group` clips at a time (`cascade.run`). Returns {'table':
    shares that are right and the largest drift, 'clips': what was found of each}.
    """
    attributes = choose_captions(clips, seed)
    seeds = [(seed, n) for n in range(len(attributes))]
    texts = [shapes.caption(a) for a in attributes]
    scored, rows = [], []
    for _, n, video in cascade.run(configs, texts, seeds=seeds, sources=sources, group=group):
        a, found = attributes[n], metric.score(video, attributes[n])
        scored.append((a, found))
        rows.append(
            {"caption": texts[n], "held_out": shapes.held_out(a), "drift": float(fidelity.drift(video)), **found}
        )
        del video
    return {"table": {**metric.summarize(scored), "largest_drift": max(row["drift"] for row in rows)}, "clips": rows}


def following_table(table: dict) -> str:
    """The table of `prompt_following` in Markdown."""
    table = dict(table)
    drift = table.pop("largest_drift")
    changed = f"largest change of a background's colour from first to last frame: {drift:.1f} of 255"
    return f"{metric.format_table(table)}\n\n{changed}"


def super_resolution(config, *, sources=None, clips: int, seed: int) -> dict:
    """PSNR and colour of a super-resolution stage on true clips of held-out captions, shrunk and enlarged again.

    Beside it the trivial way back: bilinear in space, repeated frames in time. Returns {'table': dB over all clips at
    once, 'clips': each clip's}, infinite where a clip is the true one, as repeated frames of what stands still are.
    """
    texts, videos = enlarged_again(config, sources=sources, clips=clips, seed=seed)
    truth = videos["truth"]
    rows = [
        {
            "caption": text,
            **{name: fidelity.psnr(videos[name][n], truth[n]) for name in ("stage", "trivial")},
            "colour_error": fidelity.colour_error(videos["stage"][n], truth[n]),
        }
        for n, text in enumerate(texts)
    ]
    overall = {name: fidelity.psnr(videos[name], truth) for name in ("stage", "trivial")}
    overall["colour_error"] = float(np.mean([row["colour_error"] for row in rows]))
    return {"table": {"name": config.stage, "clips": clips, **overall}, "clips": rows}


def enlarged_again(config, *, sources=None, clips: int, seed: int) -> tuple[list[str], dict[str, np.ndarray]]:
    """True clips of held-out captions, what a super-resolution stage is given of them, and two ways back.

    Returns the captions, and clips [N, T, H, W, 3] in [-1, 1]: 'truth', 'given', 'trivial' and 'stage'.
    """
    attributes = choose_captions(2 * clips, seed)[clips:]
    texts = [shapes.caption(a) for a in attributes]
    frames, height, width, _ = stages.video_shape(config)
    truth = np.stack(
        [shapes.render(a, seed + n, frames=frames, height=height, width=width) for n, a in enumerate(attributes)]
    )
    factors = stages.factors(config)
    given = np.asarray(conditioning.reduce(truth, **factors))
    trivial = np.asarray(conditioning.enlarge(given, **factors))
    params = cascade.load_weights(config, (sources or {}).get(config.stage))
    made = cascade.sample_stage(config, params, texts, seeds=[(seed, n) for n in range(clips)], low=given)
    return texts, {"truth": truth, "given": given, "trivial": trivial, "stage": made}


def psnr_table(table: dict) -> str:
    """The table of `super_resolution` in Markdown."""
    gain = table["stage"] - table["trivial"]
    return (
        "| stage | clips | PSNR | bilinear, repeated frames | gain | colour error |\n|---|--:|--:|--:|--:|--:|\n"
        f"| {table['name']} | {table['clips']} | {table['stage']:.2f} dB | {table['trivial']:.2f} dB | {gain:+.2f} dB "
        f"| {table['colour_error']:.1f} of 255 |"
    )


def choose_captions(clips: int, seed: int) -> list[shapes.Attributes]:
    """Half of the clips' attributes from the training captions, half held out; none twice before all have been used."""
    rng = np.random.default_rng(seed)

    def draw(pool, count):
        order = np.concatenate([rng.permutation(len(pool)) for _ in range(-(-count // len(pool)))])
        return [pool[i] for i in order[:count]]

    return draw(shapes.TRAIN, clips - clips // 2) + draw(shapes.HELD_OUT, clips // 2)
