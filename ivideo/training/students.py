"""The files of a distillation: which phases are finished, and where their weights are.

DIR/teacher/        the averaged weights of the original network, copied when the distillation started
DIR/PHASE/          the run of a phase (`ivideo.training.loop`)
    begun.json            the digest of the teacher's parameters
  and when it is finished, like teacher/:
    weights.safetensors   the student's parameters in float32, with the config that samples them
    finished.json         digests of the file, of its parameters and of the teacher's; the file's size and time of
                          change; the phase's row of distill.jsonl
DIR/distill.jsonl   one line per finished phase
"""

import hashlib
import json
import logging
import os

import flax.traverse_util
import numpy as np

from ivideo import files, stages
from ivideo.errors import UserError
from ivideo.weights import config_metadata, save_params

log = logging.getLogger("ivideo")

TEACHER = "teacher"  # the folder of the first teacher's weights
WEIGHTS, BEGUN, RECORD, ROWS = "weights.safetensors", "begun.json", "finished.json", "distill.jsonl"


def weights_path(workdir: str, phase: str) -> str:
    """The file of a finished phase's weights."""
    return os.path.join(workdir, phase, WEIGHTS)


def is_distillation(folder: str) -> bool:
    """Whether a folder is the --workdir of a distillation."""
    return os.path.isfile(os.path.join(folder, TEACHER, RECORD))


def is_finished(folder: str) -> bool:
    """Whether a folder is that of a finished phase."""
    return os.path.isfile(os.path.join(folder, RECORD))


def finished(workdir: str, config) -> list[str]:
    """The finished phases of a distillation, in the order of the config's phases."""
    return [phase for phase in stages.phases(config) if is_finished(os.path.join(workdir, phase))]


def locate(folder: str, config) -> str:
    """Returns the file of a student's weights if `folder` is a distillation or one of its phases, else `folder`.

    In a distillation, this is the student of the phase `config.phase`. If the config is that of an original network, it
    is the student of the last finished phase. UserError if that phase is not finished.
    """
    if is_finished(folder):
        return os.path.join(folder, WEIGHTS)
    if not is_distillation(folder):
        return folder
    done = finished(folder, config)
    phase = config.phase or (done[-1] if done else stages.phases(config)[0])
    if not is_finished(os.path.join(folder, phase)):
        raise UserError(
            f"{folder} has no finished phase {phase} of distillation (finished: {', '.join(done) or 'none'}): go on "
            "with --mode=distill, or choose the variant of a finished phase"
        )
    return weights_path(folder, phase)


def record(workdir: str, phase: str) -> dict:
    """Returns the record of a finished phase.

    `file`: the SHA-256 of the file. `state`: its size and time of change. `weights`: the SHA-256 of the parameters.
    `teacher`: the SHA-256 of the teacher's parameters, or where the first teacher came from. `row`: the line of
    distill.jsonl. UserError if the record cannot be read.
    """
    return files.read_json(os.path.join(workdir, phase, RECORD))


def find_problems(workdir: str, config) -> dict[str, str | None]:
    """Returns what is wrong with the weights of the first teacher and of each phase, or ''. None: it is not finished.

    Files are read whole only where their weights are used next: the teacher of every phase that is to be done, and the
    last student. Of the others the size and the time of change are enough: a file of the largest stage takes minutes.
    """
    problems, needed = {}, True
    for phase in reversed([TEACHER, *stages.phases(config)]):
        problems[phase] = _find_problem(workdir, phase, whole=needed)
        needed = problems[phase] != ""
    return dict(reversed(problems.items()))


def _find_problem(workdir, phase, *, whole):
    """As `find_problems`, of one file. Not `whole`: it is read only if it seems to have changed."""
    if not is_finished(os.path.join(workdir, phase)):
        return None
    path = weights_path(workdir, phase)
    try:
        wanted = record(workdir, phase)
        if not whole and wanted.get("state") == _file_state(path):
            return ""
        found = files.digest(path)
    except FileNotFoundError:
        return "the file is missing"
    except (UserError, OSError) as e:
        return str(e)
    return "" if wanted.get("file") == found else "the file has changed since it was written"


def _file_state(path):
    """The size in bytes and the time of change in nanoseconds of a file."""
    state = os.stat(path)
    return [state.st_size, state.st_mtime_ns]


def set_aside(workdir: str, phase: str, problem: str) -> None:
    """Moves the damaged weights of a phase to PHASE/damaged/. The phase then counts as not finished."""
    path, target = weights_path(workdir, phase), os.path.join(workdir, phase, "damaged", WEIGHTS)
    os.remove(os.path.join(workdir, phase, RECORD))
    moved = ""
    if os.path.lexists(path):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        while os.path.lexists(target):
            target += "_"
        os.rename(path, target)
        moved = f", moved to {target}"
    source = "the teacher is copied again" if phase == TEACHER else "the last checkpoint of the phase is used"
    log.warning("%s is damaged (%s)%s: %s", path, problem, moved, source)


def begin(workdir: str, phase: str, before: str) -> None:
    """Notes which weights teach a phase: the student of `before`. UserError if the phase began with other weights."""
    folder, teacher = os.path.join(workdir, phase), record(workdir, before)["weights"]
    path = os.path.join(folder, BEGUN)
    if os.path.exists(path) and files.read_json(path).get("teacher") != teacher:
        raise UserError(
            f"{folder} began with another teacher than the weights that are in {os.path.join(workdir, before)} now: "
            f"move {folder} away to repeat that phase"
        )
    os.makedirs(folder, exist_ok=True)
    files.write_json(path, {"teacher": teacher})


def finish(workdir: str, phase: str, params: dict, *, config, teacher, row: dict | None = None) -> dict:
    """Writes the weights of a phase and then its record, with which the phase counts as finished. Returns the record.

    `params`: numpy arrays. `config`: the config to sample them with. `teacher`: identifies the teacher's weights.
    """
    folder, path = os.path.join(workdir, phase), weights_path(workdir, phase)
    os.makedirs(folder, exist_ok=True)
    # If there is a file without a record, a killed process has left it
    save_params(path, params, metadata=config_metadata(config), dtype=np.float32, overwrite=True)
    found = {
        "file": files.digest(path), "state": _file_state(path), "weights": _params_digest(params), "teacher": teacher,
        "row": row,
    }  # fmt: skip
    files.write_json(os.path.join(folder, RECORD), found)
    return found


def rows(workdir: str, config) -> list[dict]:
    """The rows of the finished phases, in their order."""
    return [record(workdir, phase)["row"] for phase in finished(workdir, config)]


def write_rows(workdir: str, config) -> None:
    """Writes distill.jsonl from the records of the finished phases, unless it has exactly their rows."""
    path, text = os.path.join(workdir, ROWS), "".join(json.dumps(row) + "\n" for row in rows(workdir, config))
    if not os.path.exists(path) or files.read_bytes(path) != text.encode():
        files.write_text(path, text)


def _params_digest(params):
    """The SHA-256 of parameters. A file of the same parameters can differ, in the order of its metadata for example."""
    digest = hashlib.sha256()
    for name, value in sorted(flax.traverse_util.flatten_dict(params, sep="/").items()):
        value = np.asarray(value, np.float32, order="C")
        digest.update(f"{name} {value.shape} ".encode())
        digest.update(value.data)
    return digest.hexdigest()
