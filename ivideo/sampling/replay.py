"""Samples a video again from the recipe in its file, and compares the two."""

import contextlib
import json
import os
import tempfile

import jax
import numpy as np

from ivideo.data import video_io
from ivideo.errors import UserError
from ivideo.files import digest, prepare_folders, refuse_existing
from ivideo.prompts import samples
from ivideo.sampling import cascade, recipes
from ivideo.sampling.generate import read_clip
from ivideo.training import trained


def replay(
    path: str,
    *,
    clip: str | None = None,
    workdir: str | None = None,
    weights_path: str | None = None,
    out: str | None = None,
    overwrite: bool = False,
    as_json: bool = False,
) -> dict:
    """Samples the video at `path` again, prints how equal the two are, and returns it.

    `clip`: the file that the first stage upsampled, if there was one. `workdir`, `weights_path`: where the weights are
    (`trained.find`). `out`: a file for the new video. Each stage samples batches of the recorded size, so on the same
    kind of device and with the same versions the frames are the same bit for bit.
    Returns {"equal": whether all frames are, "different": the share of values that differ, "largest": the largest
    difference of 255, "psnr": in dB}. The last three are of the decoded files where the frames are not equal: encoding
    loses the same in both.
    UserError, before anything is compiled or written, if the file has no recipe, or if the recipe's config, weights or
    clip are not those that are here.
    """
    found = recipes.read(path)
    config = recipes.config_from(found)
    names = found["stages"].split()
    configs = cascade.select(config, names[0], names[-1]) if cascade.is_cascade(config) else [config]
    sources = trained.find(configs, workdir=workdir, weights=weights_path)
    for stage in configs:
        _check_weights(path, found, stage.stage, trained.check(stage, sources[stage.stage]))
    _check_clip(path, found, clip)
    if out is not None:
        video_io.extension(out)
        refuse_existing([out], overwrite=overwrite)
        prepare_folders([out])
    for stage in configs:
        stage.sample.batch = found["batch"][stage.stage]
    count = max(found["batch"].values())
    same_noise = found["noise"] == "shared"
    *_, row = samples([found["prompt"]] * (found["number"] + 1), seed=found["seed"], same_noise=same_noise)
    low_res = None
    if clip is not None:
        one = read_clip(clip, configs[0])
        low_res = np.broadcast_to(one, (count, *one.shape))
    sampled = cascade.run(
        configs, [row.prompt] * count, seeds=[row.noise] * count, sources=sources, low_res=low_res,
        wanted={configs[-1].stage: {0}},
    )  # fmt: skip
    with contextlib.closing(sampled):
        _, _, video = next(sampled)
    result = _compared(path, found, video, configs[-1].video.fps)
    if out is not None:
        zoomed = video_io.zoomed(video, found["zoom"])
        again = found | {"jax_version": jax.__version__, "device": jax.devices()[0].device_kind}
        again["frames"] = recipes.frames_digest(video)
        video_io.write_video(out, zoomed, fps=configs[-1].video.fps, metadata=again, overwrite=overwrite)
    print(json.dumps(result, indent=1) if as_json else _sentence(path, found, result, video.shape))
    return result


def _check_weights(path, found, stage, identity):
    recorded = found["weights"][stage]
    if identity != recorded:
        raise UserError(
            f"{path} was made with weights {recorded} of stage {stage}, and these are {identity}: give those weights "
            "with --workdir or --weights"
        )


def _check_clip(path, found, clip):
    recorded = found.get("input")
    if recorded and clip is None:
        raise UserError(f"{path} was made from a clip: give that file with --clip")
    if clip is not None and not recorded:
        raise UserError(f"--clip={clip}: {path} was made from its prompt alone; leave it out")
    if clip is not None and not digest(clip).startswith(recorded):
        raise UserError(f"--clip={clip} is another file than the one that {path} was made from")


def _compared(path, found, video, fps) -> dict:
    """How equal a new video is to the one in the file."""
    if recipes.frames_digest(video) == found.get("frames"):
        return {"equal": True, "different": 0.0, "largest": 0, "psnr": None}
    zoomed = video_io.zoomed(video, found["zoom"])
    with tempfile.TemporaryDirectory() as folder:
        again = os.path.join(folder, f"again{video_io.extension(path)}")
        video_io.write_video(again, zoomed, fps=fps)
        (old, _), (new, _) = video_io.read_video(path, min_frames=1), video_io.read_video(again, min_frames=1)
    if old.shape != new.shape:
        raise UserError(f"{path} has frames of shape {old.shape}, and its recipe makes {new.shape}: it was edited")
    difference = np.abs(old.astype(np.int16) - new)
    mse = float(np.square(difference, dtype=np.float64).mean())
    return {
        "equal": False,
        "different": float((difference > 0).mean()),
        "largest": int(difference.max()),
        "psnr": None if mse == 0 else float(10 * np.log10(255**2 / mse)),
    }


def _sentence(path, found, result, shape) -> str:
    size = f"{shape[0]} frames of {shape[1]}×{shape[2]}"
    if result["equal"]:
        return f"{path}: the same {size}, bit for bit"
    here = f"{jax.devices()[0].device_kind} with jax {jax.__version__}"
    there = f"{found['device']} with jax {found['jax_version']}"
    if not result["largest"]:
        return f"{path}: the frames differ by rounding that encoding removes; made on {there}, and again on {here}"
    return (
        f"{path}: {result['different']:.2%} of the values of its {size} differ, by at most {result['largest']} of 255 "
        f"(PSNR {result['psnr']:.1f} dB); made on {there}, and again on {here}"
    )
