"""Evaluates a trained stage or cascade (mode evaluate). Section 3."""

import json
from collections.abc import Mapping, Sequence

import numpy as np

from ivideo import files, stages
from ivideo.data import shapes
from ivideo.diffusion import conditioning
from ivideo.evaluation import averages, bootstrap, fidelity, generated, steadiness
from ivideo.sampling import cascade
from ivideo.training import trained


def evaluate(
    config,
    *,
    workdir=None,
    weights_path=None,
    clips=96,
    seed=0,
    out=None,
    as_json=False,
    overwrite=False,
    to_stage=None,
) -> dict:
    """Evaluates the base stage or a cascade with `prompt_following`, a super-resolution stage with `super_resolution`.

    `clips`: number of clips to sample. `to_stage`: the last stage of a cascade to run. Prints a table, or JSON with
    `as_json`, and writes the result to `out` as JSON. UserError before anything is computed if `out` exists or cannot
    be written, or if a stage's weights are missing or belong to another network.
    """
    if out is not None:
        files.refuse_existing([out], overwrite=overwrite)
        files.prepare_folders([out])
    configs = cascade.select(config, None, to_stage)
    sources = trained.find(configs, workdir=workdir, weights=weights_path)
    for stage in configs:
        trained.check(stage, sources[stage.stage])
    options = {"sources": sources, "clips": clips, "seed": seed}
    if configs[0].cond.frames:
        result, table = super_resolution(config, **options), psnr_table
    else:
        result, table = prompt_following(configs, group=config.sample.group, **options), generated.tables
    print(json.dumps(result["table"]) if as_json else table(result["table"]))
    if out is not None:
        files.write_text(out, json.dumps(result, indent=1, default=bool))
    return result


def prompt_following(configs, *, sources=None, group: int = 32, clips: int, seed: int) -> dict:
    """Samples clips of the captioned shapes and measures them (`measure_captions`).

    Half of the captions are from training, half are held out. Returns {'table': `generated.summarize`, 'clips': a row
    per clip and stage, 'seconds': per stage those of sampling a clip, without compilation}.
    """
    attributes = choose_captions(clips, seed)
    noise = [(seed, n) for n in range(clips)]
    rows, seconds = measure_captions(configs, attributes, seeds=noise, sources=sources, group=group)
    return {"table": generated.summarize(rows), "clips": rows, "seconds": seconds}


def measure_captions(
    configs, attributes: Sequence[shapes.Attributes], *, seeds, sources=None, group: int = 32
) -> tuple[list[dict], dict[str, float]]:
    """Samples a clip for each caption, and measures the output of every stage.

    `configs` are the stages to run, `group` clips at a time (`cascade.run`), with `seeds` as `stages.video_keys` takes
    them. Returns a row per clip and stage (`generated.measure_all`), and per stage the seconds of sampling a clip,
    without compilation.
    """
    everything, batches = set(range(len(attributes))), {config.stage: [] for config in configs}
    sampled = cascade.run(
        configs, [shapes.caption(a) for a in attributes], seeds=seeds, sources=sources, group=group,
        wanted={config.stage: everything for config in configs},
        on_batch=lambda stage, videos, seconds: batches[stage].append(seconds / videos),
    )  # fmt: skip
    rows = generated.measure_all(((config.stage, n, video) for config, n, video in sampled), attributes)
    return rows, {stage: averages.mean(found) for stage, found in batches.items()}


def super_resolution(config, *, sources=None, clips: int, seed: int) -> dict:
    """Measures a super-resolution stage on held-out clips that were downsampled and upsampled again.

    PSNR and SSIM, next to those of plain upsampling (bilinear in space, repeated frames in time), the colour's error,
    and `steadiness.measure`. Returns {'table': PSNR in dB over all clips together and the means of the others, with
    their bootstrap 'intervals', 'clips': a row per clip}. PSNR is infinite for a clip that equals the true one:
    repeated frames of a shape that stands still do.
    """
    captions, videos = upsample_held_out_clips(config, sources=sources, clips=clips, seed=seed)
    truth = videos["truth"]
    rows = [
        {
            "caption": caption,
            **{name: fidelity.psnr(videos[name][n], truth[n]) for name in ("stage", "trivial")},
            **{f"{name}_ssim": fidelity.ssim(videos[name][n], truth[n]) for name in ("stage", "trivial")},
            "colour_error": fidelity.colour_error(videos["stage"][n], truth[n]),
            **steadiness.measure(videos["stage"][n], shapes.parse_caption(caption)),
        }
        for n, caption in enumerate(captions)
    ]
    overall = {name: fidelity.psnr(videos[name], truth) for name in ("stage", "trivial")}
    overall["gain"] = overall["stage"] - overall["trivial"]
    intervals = _psnr_intervals({name: [row[name] for row in rows] for name in ("stage", "trivial")})
    for name in ("stage_ssim", "trivial_ssim", "colour_error", *steadiness.MEASURES):
        overall[name], intervals[name] = bootstrap.mean_interval([row[name] for row in rows])
    return {"table": {"name": config.stage, "clips": clips, **overall, "intervals": intervals}, "clips": rows}


def _psnr_intervals(found: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
    """Of the PSNR over all clips together, from that of each clip, of both ways of upsampling; and of the gain."""
    drawn = {}
    for name, of_clips in found.items():
        errors = 10 ** (-np.asarray(of_clips) / 10)  # the mean squared error, but for a factor
        with np.errstate(divide="ignore"):
            drawn[name] = -10 * np.log10(bootstrap.counts(len(errors)) @ errors / len(errors))
    drawn["gain"] = drawn["stage"] - drawn["trivial"]
    # Not between two values, since they can be infinite
    return {name: bootstrap.quantiles(values, method="nearest") for name, values in drawn.items()}


def upsample_held_out_clips(config, *, sources=None, clips: int, seed: int) -> tuple[list[str], dict[str, np.ndarray]]:
    """Draws clips of held-out captions, downsamples them to a stage's input, and upsamples them in two ways.

    Returns the captions and clips [N, T, H, W, 3] in [-1, 1]: 'truth', 'low_res' (smaller), 'trivial' (plain
    upsampling) and 'stage' (the stage's output).
    """
    attributes = choose_captions(2 * clips, seed)[clips:]
    captions = [shapes.caption(a) for a in attributes]
    frames, height, width, _ = stages.video_shape(config)
    truth = np.stack(
        [shapes.render(a, seed + n, frames=frames, height=height, width=width) for n, a in enumerate(attributes)]
    )
    factors = stages.factors(config)
    low_res = np.asarray(conditioning.reduce(truth, **factors))
    trivial = np.asarray(conditioning.enlarge(low_res, **factors))
    params = trained.load(config, (sources or {}).get(config.stage))
    seeds = [(seed, n) for n in range(clips)]
    videos = cascade.sample_stage(config, params, captions, seeds=seeds, low_res=low_res)
    return captions, {"truth": truth, "low_res": low_res, "trivial": trivial, "stage": videos}


# Titles of the table's columns, by the names of the values, and their formats
_COLUMNS = {
    "stage": ("PSNR, dB", ".2f"),
    "trivial": ("bilinear, repeated frames", ".2f"),
    "gain": ("gain, dB", "+.2f"),
    "stage_ssim": ("SSIM", ".4f"),
    "trivial_ssim": ("bilinear, repeated frames", ".4f"),
    "colour_error": ("colour error, of 255", ".1f"),
    "ideal_iou": ("ideal IoU", ".3f"),
    "steady_iou": ("steady IoU", ".3f"),
    "grain": ("grain, of 255", ".2f"),
}


def psnr_table(table: dict) -> str:
    """The table of `super_resolution` as Markdown: the values, and below them their 95% intervals."""
    values = [f"{table[name]:{form}}" for name, (_, form) in _COLUMNS.items()]
    intervals = [
        "{:{form}} to {:{form}}".format(*table["intervals"][name], form=form) for name, (_, form) in _COLUMNS.items()
    ]
    rows = [
        ["stage", "clips", *(title for title, _ in _COLUMNS.values())],
        ["---", *["--:"] * (1 + len(_COLUMNS))],
        [table["name"], str(table["clips"]), *values],
        ["95% interval", "", *intervals],
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def choose_captions(clips: int, seed: int) -> list[shapes.Attributes]:
    """Random captions, as their attributes: the first half from training, the second half held out.

    A caption is repeated only after all others of its half have been used.
    """
    rng = np.random.default_rng(seed)

    def draw(pool, count):
        order = np.concatenate([rng.permutation(len(pool)) for _ in range(-(-count // len(pool)))])
        return [pool[i] for i in order[:count]]

    return draw(shapes.TRAIN, clips - clips // 2) + draw(shapes.HELD_OUT, clips // 2)
