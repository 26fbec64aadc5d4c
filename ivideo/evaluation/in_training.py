"""Measures a stage while it is trained, every config.train.evaluate_every steps, against its training set."""

import logging
import os
import shutil
from collections.abc import Callable

import jax

from ivideo import files
from ivideo.data import video_io
from ivideo.devices import agreeing
from ivideo.evaluation import clip_sets, judges, measures, quality
from ivideo.sampling import cascade

log = logging.getLogger("ivideo")

FOLDER = "evaluation"  # in --workdir


def evaluator(config, workdir: str) -> Callable[[int, object], dict[str, float]] | None:
    """A function from step and averaged parameters to measures by name, or None where none is asked for.

    It samples config.evaluate.clips clips with the captions of the training set, always from the same noise, and
    writes WORKDIR/evaluation/STEP.json, which has the intervals as well. The reference is measured at the first call,
    and kept. Samples that are not finite are not measured. UserError, before anything is computed, as
    `quality.evaluate_quality`.
    """
    if not config.train.evaluate_every:
        return None
    selection = quality.selection_of(config)
    selection.check(config.video.frames, f"a sample of stage {config.stage}")
    judging, folder, clips = quality.judges_of(config, selection), os.path.join(workdir, FOLDER), config.evaluate.clips
    name = clip_sets.SHAPES if config.data.source == "shapes" else config.data.dir
    real = clip_sets.from_source(config, name, selection, clips=clips)
    prompts = list(real.captions) if None not in real.captions else clip_sets.captions_of(config, name, clips)
    sampler = cascade.StageSampler(config, min(config.sample.batch, clips))
    kept = {}

    def prepare(step):
        # A run that went back to an earlier step comes again with other parameters
        shutil.rmtree(os.path.join(folder, f"{step:06d}"), ignore_errors=True)
        files.prepare_folders([os.path.join(folder, part, "0") for part in ("reference", f"{step:06d}")])

    def evaluate(step: int, params) -> dict[str, float]:
        agreeing.from_first_process(lambda: prepare(step))
        if not kept:
            kept["reference"], _ = quality.measure_reference(
                judging, real, os.path.join(folder, "reference"), batch=config.evaluate.batch,
                kernel_samples=config.evaluate.kernel_samples,
            )  # fmt: skip
            kept["texts"] = cascade.embed_prompts(config, prompts)
        placed = sampler.place(params)

        def read(numbers):
            size, seeds = sampler.size, [(0, n) for n in range(clips)]
            batches = [list(numbers[i : i + size]) for i in range(0, len(numbers), size)]
            for rows, videos in sampler.batches(placed, batches, texts=kept["texts"], seeds=seeds):
                for row, video in zip(rows, videos, strict=True):
                    if cascade.defect(video) == cascade.NOT_FINITE:
                        raise FloatingPointError
                    yield row, selection.resized(video_io.to_uint8(video))

        whole = selection.span == config.video.frames
        names = [str(n) for n in range(clips)]
        made = clip_sets.ClipSet({}, prompts, names, read, whole, config.video.fps, sampled=True)
        options = {"batch": config.evaluate.batch, "label": f"step {step}"}
        try:
            values = judges.judge_whole_set(judging, made, os.path.join(folder, f"{step:06d}"), **options)
        except FloatingPointError:
            log.warning("step %d is not measured: some samples are not finite", step)
            return {}
        result = measures.all_of(
            values, kept["reference"], prompts, measures.texts(judging.clip, prompts),
            replicates=config.evaluate.replicates, kernel_samples=config.evaluate.kernel_samples,
        )  # fmt: skip
        if jax.process_index() == 0:
            files.write_json(os.path.join(folder, f"{step:06d}.json"), {"step": step, "measures": result})
        log.info("step %d: %s", step, ", ".join(f"{name} {row['value']:.4g}" for name, row in result.items()))
        return {f"evaluate/{name}": row["value"] for name, row in result.items()}

    return evaluate
