"""Reads the averaged parameters of a training run without changing the run.

Sampling, evaluation and export need nothing else from a checkpoint. The run may still be training and delete the
checkpoint that is being read, or its folder may be read-only. This module writes, moves and deletes nothing.
"""

import contextlib
import errno
import logging
import os
import pathlib
import tempfile

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ivideo.errors import UserError
from ivideo.training import digests
from ivideo.training.checkpoint import (
    check_workdir,
    checkpoint_shapes,
    error_line,
    first_message,
    shapes,
    steps_in,
    subtree,
)
from ivideo.weights import check_shapes

log = logging.getLogger("ivideo")

DELETED = "deleted"  # the problem of a checkpoint that the run may have deleted in the meantime
DESCRIPTORS = pathlib.Path("/proc/self/fd")  # the open files of this process
NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT)  # too many open files, or no space for links to them
TRIES = 100  # how often a checkpoint may be deleted while it is read


def read_average(workdir: str, like) -> tuple[int, dict]:
    """Reads the newest undamaged checkpoint of a run as (step, averaged parameters).

    `like`: the parameters' shapes with the new shardings, which may differ from those that were saved. All files of a
    checkpoint are compared with their digests, then only the averaged parameters are loaded. For a damaged checkpoint,
    a warning names it and the previous one is read. If the run saves a new checkpoint and deletes the one being read,
    reading continues on Linux; elsewhere the new one is read. All processes of `jax.distributed` call this together.
    UserError if there is no checkpoint, if all are damaged, or if the checkpoint belongs to another model.
    """
    check_workdir(workdir)
    folder, is_first = epath.Path(os.path.abspath(workdir)), jax.process_index() == 0
    if first_message("none" if is_first and not (folder / "checkpoints").is_dir() else ""):
        raise UserError(f"--workdir={workdir} has no checkpoints: give the folder that --mode=train was run with")
    damaged = set()
    for _ in range(TRIES):
        steps = steps_in(folder) if is_first else set()
        step = first_message(str(max(steps - damaged, default="")))
        if not step:
            break
        params, problem = _read(folder, int(step), max(steps, default=0), like)
        if not problem:
            return int(step), params
        if problem == DELETED:
            log.info("checkpoint %s was deleted while it was read: reading the newest one instead", step)
            continue
        if is_first:
            path = folder / "checkpoints" / step
            log.warning("checkpoint %s is damaged (%s): using the previous one", path, problem)
        damaged.add(int(step))
    else:
        raise UserError(
            f"the checkpoints in {folder} are deleted faster than they can be read: copy the folder, or train with a "
            "larger config.train.keep or config.train.checkpoint_every"
        )
    if damaged:
        raise UserError(f"every checkpoint in {folder / 'checkpoints'} is damaged: copy an undamaged one back")
    raise UserError(f"--workdir={workdir} has no whole checkpoint yet: train longer than config.train.checkpoint_every")


def _read(folder, step, newest, like):
    """Returns (averaged parameters, '') or (None, problem).

    The problem is DELETED if there is a newer checkpoint than `newest`: then the run may be deleting this one.
    """
    path, is_first = folder / "checkpoints" / str(step), jax.process_index() == 0

    def deleted():
        return first_message(
            DELETED if is_first and (not path.exists() or max(steps_in(folder), default=0) > newest) else ""
        )

    with contextlib.ExitStack() as stack:
        files = problem = ""
        try:
            files = _keep_readable(path, stack)
        except OSError as e:
            problem = f"it cannot be read: {e}"
        if problem := first_message(problem) or deleted():
            return None, deleted() or problem
        found = first_message(digests.compare(folder, step, files) if is_first else "")
        if found not in (digests.WHOLE, digests.UNCHECKED):
            return None, deleted() or found
        params, problem = _load(files, path, like)
        if not (problem := first_message(problem)):
            return params, ""
        if not (gone := deleted()) and found == digests.WHOLE:
            raise OSError(f"{path} cannot be read although its digests are right ({problem})")
        return None, gone or problem


def _keep_readable(path, stack):
    """A folder with a checkpoint's files that stay readable until `stack` closes, even if the run deletes them.

    On Linux its files are links to open file descriptors. On other systems, with too many files, or if no temporary
    folder can be written, the result is the checkpoint's own folder.
    """
    if not DESCRIPTORS.is_dir():
        return path
    try:
        temporary = tempfile.TemporaryDirectory(prefix="ivideo_")
    except OSError:
        return path
    with contextlib.ExitStack() as opened:
        view = epath.Path(opened.enter_context(temporary))
        try:
            for file in sorted(pathlib.Path(path).rglob("*")):
                target = view / file.relative_to(path)
                if file.is_dir():
                    target.mkdir()
                else:
                    descriptor = opened.enter_context(open(file, "rb")).fileno()
                    os.symlink(DESCRIPTORS / str(descriptor), target)
        except OSError as e:
            if e.errno in NO_ROOM:
                return path
            raise
        stack.enter_context(opened.pop_all())
        return view


def _load(files, path, like):
    """Returns (averaged parameters, '') or (None, problem). Every process loads its own part.

    UserError in all processes if the parameters belong to another model.
    """
    handler = ocp.PyTreeCheckpointHandler()
    if mismatch := first_message(_model_mismatch(files, path, handler, like) if jax.process_index() == 0 else ""):
        raise UserError(mismatch)
    wanted = {"step": jax.ShapeDtypeStruct((), np.int32), "ema": like}
    options = ocp.args.PyTreeRestore(
        wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
    )
    try:
        handler.metadata(files / "state")  # without it, Orbax would not check the shapes
        found = handler.restore(files / "state", args=options)
    except (MemoryError, jax.errors.JaxRuntimeError):  # not the files' fault
        raise
    except Exception as e:  # damaged files raise many types
        return None, error_line(e)
    if int(found["step"]) != int(path.name):
        return None, f"it holds step {int(found['step'])}"
    return found["ema"], ""


def _model_mismatch(files, path, handler, like) -> str:
    """The error message if a checkpoint belongs to another model, otherwise ''."""
    try:
        check_shapes(f"the checkpoint {path}", subtree(checkpoint_shapes(files, handler), "ema"), shapes(like))
    except UserError as e:
        return str(e)
    except Exception:  # damaged: `_load` reports it
        pass
    return ""
