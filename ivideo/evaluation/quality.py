"""Measures samples against a reference with the metrics of the paper and of time, each with its protocol. Section 3."""

import dataclasses
import hashlib
import json
import logging
import os
import resource
import time

import jax
import numpy as np

from ivideo import files, text
from ivideo.data import shapes
from ivideo.data.video_io import evenly
from ivideo.devices import agreeing
from ivideo.errors import UserError
from ivideo.evaluation import clip_sets, frechet, judges, measures, motion, page, results
from ivideo.prompts import read_lines
from ivideo.sampling import cascade
from ivideo.training import trained

log = logging.getLogger("ivideo")

RESULTS, TABLE, PAGE, REFERENCE, PARTS = (
    "results.json",
    "results.md",
    "index.html",
    f"reference{frechet.SUFFIX}",
    "parts",
)
OF_CLIPS = (*motion.MEASURES, "clip_distance", "changes", "follows")  # what is measured of single clips of both sets


def evaluate_quality(
    config,
    out: str,
    *,
    reference: str | None = None,
    samples: str | None = None,
    prompts_file: str | None = None,
    workdir: str | None = None,
    weights_path: str | None = None,
    clips: int | None = None,
    seed: int = 0,
    to_stage: str | None = None,
    as_json: bool = False,
    overwrite: bool = False,
) -> dict:
    """Measures new samples of a stage or cascade, or the video files in `samples`, against `reference`.

    `reference` is a folder of video files, the folder of a prepared set, 'shapes', or an .npz file of statistics from
    an earlier run. Without it only the measures that need none are made. `clips`: number of samples, by default
    config.evaluate.clips. `prompts_file`: a prompt per line, of the new samples, or of the files by their order.

    Writes the folder `out`: results.json, results.md, index.html, the reference's statistics in reference.npz, and what
    was measured so far in parts/, from which the same command goes on. Prints the table, or JSON with `as_json`.
    UserError, before anything is computed, where clips are too few, too short or unreadable, where weights are of
    another network, where the reference's statistics are of another protocol, and where `out` has other results.
    FloatingPointError at the first new sample that is not finite; what was measured before is kept.
    """
    begin, selection = time.monotonic(), selection_of(config)
    clips, configs = clips or config.evaluate.clips, cascade.select(config, None, to_stage)
    kernel_samples, replicates = config.evaluate.kernel_samples, config.evaluate.replicates
    judging = judges_of(config, selection)
    real_clips = config.evaluate.reference_clips or (clips if reference == clip_sets.SHAPES else 0)
    stored, real = _reference(configs[-1], reference, selection, clips=real_clips)
    if stored:
        _check_protocols(reference, stored, judging.protocols())
    made = _samples(
        configs, samples, selection, clips=clips, seed=seed, prompts_file=prompts_file, reference=reference, real=real,
        workdir=workdir, weights=weights_path, group=config.sample.group,
    )  # fmt: skip
    kept_about = next((found.about for found in (stored or {}).values()), {})
    _warn_of_differences(made.about, real.about if real else kept_about)
    missing = _missing(judging, reference, made.captions)
    about = {"samples": made.about, "reference": real.about if real else {"file": reference} if stored else None}
    agreeing.check_shared(out)
    clip_digests = {"samples": _digest(made.identities), "reference": _digest(real.identities) if real else None}
    _prepare(out, {"about": about, "judges": judging.described(), "clips": clip_digests}, overwrite=overwrite)
    if real:
        folder = os.path.join(out, PARTS, "reference")
        stored, real_values = measure_reference(
            judging, real, folder, batch=config.evaluate.batch, kernel_samples=kernel_samples
        )
        if stored and jax.process_index() == 0:
            frechet.save(os.path.join(out, REFERENCE), stored)
    else:
        real_values = {}
    folder = os.path.join(out, PARTS, "samples")
    values = judges.judge_whole_set(judging, made, folder, batch=config.evaluate.batch, label="samples")
    texts = measures.texts(judging.clip, made.captions)
    found = {
        **about,
        "protocol": _protocol(judging, stored),
        "measures": measures.all_of(
            values, stored, made.captions, texts, replicates=replicates, kernel_samples=kernel_samples
        ),
        "reference_measures": measures.means(real_values, replicates=replicates),
        "fewer_clips": measures.fewer_clips(values, stored),
        "not_measured": missing,
        "frame_changes": {
            name: of["changes"].mean(axis=0).tolist()
            for name, of in (("samples", values), ("reference", real_values))
            if "changes" in of
        },
        "seconds": time.monotonic() - begin,
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }
    table = results.markdown(found)
    if jax.process_index() == 0:
        files.write_json(os.path.join(out, RESULTS), found)
        files.write_text(os.path.join(out, TABLE), table + "\n")
        shown = {name: os.path.join(out, PARTS, name) for name in ("samples", "reference")}
        files.write_text(os.path.join(out, PAGE), page.html(found, shown, made.captions))
        print(json.dumps(found) if as_json else table)
    return found


def selection_of(config) -> clip_sets.Selection:
    """The frames that config.evaluate says. UserError where its height and width do not fit."""
    height, width = config.evaluate.height, config.evaluate.width
    if bool(height) != bool(width):
        raise UserError(f"config.evaluate.height = {height} and config.evaluate.width = {width}: give both or neither")
    return clip_sets.Selection(config.evaluate.frames, config.evaluate.stride, config.evaluate.fps, height, width)


def judges_of(config, selection: clip_sets.Selection) -> judges.Judges:
    """The networks that config.evaluate names (`judges.load`)."""
    return judges.load(
        selection,
        paths={"i3d": config.evaluate.i3d, "inception": config.evaluate.inception, "clip": config.evaluate.clip},
        size=config.evaluate.size,
        antialias=config.evaluate.antialias,
        image_frames=config.evaluate.image_frames,
    )


def _reference(config, reference, selection, *, clips):
    """(statistics by measure of a file, None) or (None, set of clips) or (None, None)."""
    if reference is None:
        return None, None
    if reference.endswith(frechet.SUFFIX):
        return frechet.load(reference), None
    if reference == clip_sets.SHAPES or clip_sets.is_prepared(reference):
        return None, clip_sets.from_source(config, reference, selection, clips=clips)
    if not os.path.isdir(reference):
        raise UserError(
            f"--reference={reference} does not exist: give a folder of video files, the folder of a prepared set, "
            f"{clip_sets.SHAPES}, or a {frechet.SUFFIX} file of an earlier run"
        )
    return None, clip_sets.from_folder(reference, selection, clips=clips)


def _samples(configs, samples, selection, *, clips, seed, prompts_file, reference, real, workdir, weights, group):
    prompts = list(read_lines(prompts_file, "--prompts_file")) if prompts_file else []
    if samples is not None:
        return clip_sets.from_folder(samples, selection, clips=clips, prompts=prompts, same=True)
    if configs[0].cond.frames:
        raise UserError(
            f"stage {configs[0].stage} upsamples clips and cannot be sampled from prompts alone: give "
            "--config=configs/cascade.py, or give clips that it made with --samples; without --reference its PSNR is "
            "measured"
        )
    if not prompts:
        if real is not None and all(caption is not None for caption in real.captions):
            prompts = list(real.captions)
        elif reference is not None and clip_sets.is_prepared(reference):
            prompts = clip_sets.captions_of(configs[-1], reference, clips)
        elif configs[0].data.source == "shapes":
            prompts = [shapes.caption(attributes) for attributes in clip_sets.shuffled_attributes()]
        if not prompts:
            raise UserError("--prompts_file is missing: the reference has no captions to sample from")
    selection.check(configs[-1].video.frames, f"a sample of stage {configs[-1].stage}")
    selection.check_rate(configs[-1].video.fps, f"a sample of stage {configs[-1].stage}")
    # The errors of meshes and of text encoders, before hours of measuring the reference
    for config in configs:
        cascade.sampling_mesh(config, min(config.sample.batch, clips))
    for text_config in {repr(config.text): config.text for config in configs}.values():  # stages may share an encoder
        text.tokenizer_of(text_config)
    sources = trained.find(configs, workdir=workdir, weights=weights)
    identities = {config.stage: trained.check(config, sources[config.stage]) for config in configs}
    prompts = [prompts[n % len(prompts)] for n in range(clips)]
    return clip_sets.generated(
        configs, prompts, selection, seed=seed, sources=sources, identities=identities, group=group
    )


def _warn_of_differences(samples, reference):
    """Warns of what makes most numbers useless, but can be meant."""
    for name, what in (("fps", "motion"), ("size", "sharpness")):
        if reference and samples[name] != reference.get(name, samples[name]):
            log.warning(
                "%s of the samples is %s, and of the reference %s: their %s differs; see config.evaluate",
                name, samples[name], reference[name], what,
            )  # fmt: skip


def _missing(judging, reference, captions) -> dict[str, str]:
    """What is not measured, and what to do about it."""
    missing = dict(judging.missing)
    if reference is None:
        missing["FVD, FID and KID"] = "give --reference"
    if judging.clip and any(caption is None for caption in captions):
        missing["CLIP score and R-precision"] = "some samples have no prompt: give --prompts_file"
        log.warning("not measured: CLIP score and R-precision; %s", missing["CLIP score and R-precision"])
    return missing


def _check_protocols(path, stored, protocols):
    for name, protocol in protocols.items():
        if name not in stored:
            raise UserError(
                f"{path} has no statistics of {name.upper()}, only of {', '.join(stored)}: measure the reference's "
                f"videos again with the weights of {protocol['network']}"
            )
        for key in sorted(protocol.keys() | stored[name].protocol.keys()):
            theirs, ours = stored[name].protocol.get(key, "absent"), protocol.get(key, "absent")
            if theirs != ours:
                raise UserError(
                    f"{path} is of another protocol of {name.upper()}: {key} is {theirs} there and {ours} here; "
                    "measure the reference's videos again, or change config.evaluate"
                )


def _digest(identities):
    return hashlib.sha256("\n".join(identities).encode()).hexdigest()


def _prepare(out, described, *, overwrite):
    """Makes the folder of the results. UserError where it has results of another command."""
    path = os.path.join(out, PARTS, "command.json")
    described = json.loads(json.dumps(described))

    def prepare():
        if not os.path.exists(path) and os.path.isdir(out) and os.listdir(out):
            raise UserError(f"{out} is not empty and has no results of an evaluation: choose another --out")
        if overwrite:
            # The file that says whose results they are is the last one to go
            for name in (RESULTS, TABLE, PAGE, REFERENCE, PARTS):
                if os.path.exists(os.path.join(out, name)):
                    files.remove(os.path.join(out, name))
        elif os.path.exists(path):
            _check_same(out, files.read_json(path), described)
        names = [os.path.join(out, PARTS, name, "0") for name in ("samples", "reference")]
        files.prepare_folders([path, *names])
        files.write_json(path, described)

    agreeing.from_first_process(prepare)


def _check_same(out, theirs, ours):
    """UserError where results are of another command. It says what differs."""
    for group, values in ours.items():
        others = theirs.get(group, {})
        for key in sorted(values.keys() | others.keys()):
            if (value := values.get(key)) == (other := others.get(key)):
                continue
            if group == "clips":
                differ = "their files, their prompts or config.sample have changed"
            else:
                differ = f"{json.dumps(other)[:200]} there, and {json.dumps(value)[:200]} now"
            raise UserError(f"{out} has results with other {key}: {differ}; choose another --out, or pass --overwrite")


def measure_reference(judging: judges.Judges, real: clip_sets.ClipSet, folder: str, *, batch: int, kernel_samples: int):
    """(statistics of a reference by measure, its values of time): features are added up part by part.

    Parts are kept in `folder` (`judges.judge_set`).
    """
    protocols = judging.protocols()
    names = {"fvd": "i3d", "fid": "inception"}
    chosen = set(evenly(len(real), max(2, kernel_samples // judging.image_frames)).tolist())
    sums, kept, values = {}, [], []
    for part, found in judges.judge_set(judging, real, folder, batch=batch, label="reference"):
        for measure, protocol in protocols.items():
            features = found[names[measure]]
            added = frechet.measure(features.reshape(-1, features.shape[-1]), protocol)
            sums[measure] = frechet.merge([sums[measure], added]) if measure in sums else added
        if "fid" in protocols:
            kept += [found["inception"][n - part.start] for n in part if n in chosen]
        values.append({name: found[name] for name in OF_CLIPS if name in found})
    sums = {measure: dataclasses.replace(found, about=real.about) for measure, found in sums.items()}
    if kept:
        sums["fid"] = dataclasses.replace(sums["fid"], sample=np.concatenate(kept))
    return sums, {name: np.concatenate([part[name] for part in values]) for name in values[0]}


def _protocol(judging, stored) -> dict:
    """Per measure, what its number belongs to, with the digest of the reference's statistics."""
    found = {}
    for name, protocol in judging.protocols().items():
        if stored and name in stored:
            statistics = {"reference samples": stored[name].count, "reference statistics": stored[name].digest}
            found["FVD" if name == "fvd" else "FID and KID"] = protocol | statistics
    if judging.clip:
        more = {"frames per clip": judging.image_frames, "of the first frames": judging.selection.frames}
        found["CLIP"] = judging.clip.protocol() | more
    found["time"] = {"frames": judging.selection.span, "fps": judging.selection.fps or "each clip's own"}
    return found
