"""The averaged parameters of a training run, read without touching the run.

Sampling, evaluating and exporting need nothing else of a checkpoint. The run may go on beside them and delete what they
read, or its folder may be read-only: nothing is written, moved or deleted here.
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
from ivideo.training.checkpoint import below, check_workdir, line, said, shapes, shapes_in, steps_in
from ivideo.weights import check_shapes

log = logging.getLogger("ivideo")

DELETED = "deleted"  # what is wrong with a checkpoint that the run may have deleted meanwhile
DESCRIPTORS = pathlib.Path("/proc/self/fd")  # a process's opened files
NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT)  # for opened files, or for links to them
TRIES = 100  # checkpoints that may be deleted while they are read, one after the other


def read_average(workdir: str, like) -> tuple[int, dict]:
    """The newest whole checkpoint of a run as (step, averaged parameters).

    `like`: the parameters' shapes with the shardings wanted, whatever devices saved them. All files of a checkpoint are
    compared with their digests, and the averaged parameters alone are then loaded. A damaged checkpoint is named in a
    warning and the one before it is read. Where the run deletes a checkpoint while it is read, since it has saved
    another one, reading goes on (on Linux), or that one is read. All processes of `jax.distributed` call this together.
    UserError where there is no checkpoint, where all are damaged, or where it is of another model.
    """
    check_workdir(workdir)
    folder, first = epath.Path(os.path.abspath(workdir)), jax.process_index() == 0
    if said("none" if first and not (folder / "checkpoints").is_dir() else ""):
        raise UserError(f"--workdir={workdir} has no checkpoints: give the folder that --mode=train was run with")
    damaged = set()
    for _ in range(TRIES):
        steps = steps_in(folder) if first else set()
        step = said(str(max(steps - damaged, default="")))
        if not step:
            break
        params, problem = _read(folder, int(step), max(steps, default=0), like)
        if not problem:
            return int(step), params
        if problem == DELETED:
            log.info("checkpoint %s was deleted while it was read: the newest one is read instead", step)
            continue
        if first:
            path = folder / "checkpoints" / step
            log.warning("checkpoint %s is damaged (%s): the one before it is used", path, problem)
        damaged.add(int(step))
    else:
        raise UserError(
            f"the checkpoints in {folder} are deleted faster than one can be read: copy the folder, or train with a "
            "larger config.train.keep or config.train.checkpoint_every"
        )
    if damaged:
        raise UserError(f"every checkpoint in {folder / 'checkpoints'} is damaged: copy a whole one back")
    raise UserError(f"--workdir={workdir} has no whole checkpoint yet: train longer than config.train.checkpoint_every")


def _read(folder, step, newest, like):
    """(averaged parameters, what is wrong with a checkpoint), of which one is empty.

    DELETED where there is a newer checkpoint than the `newest` there was: then the run may be deleting this one.
    """
    path, first = folder / "checkpoints" / str(step), jax.process_index() == 0

    def deleted():
        return said(DELETED if first and (not path.exists() or max(steps_in(folder), default=0) > newest) else "")

    with contextlib.ExitStack() as stack:
        files = problem = ""
        try:
            files = _held(path, stack)
        except OSError as e:
            problem = f"it cannot be read: {e}"
        if problem := said(problem) or deleted():
            return None, deleted() or problem
        found = said(digests.compare(folder, step, files) if first else "")
        if found not in (digests.WHOLE, digests.UNCHECKED):
            return None, deleted() or found
        params, problem = _load(files, path, like)
        if not (problem := said(problem)):
            return params, ""
        if not (gone := deleted()) and found == digests.WHOLE:
            raise OSError(f"{path} is as it was written, by its digests, but cannot be read ({problem})")
        return None, gone or problem


def _held(path, stack):
    """A folder with a checkpoint's files, readable until the stack is closed, even after the run has deleted them.

    Its files are links to opened ones, which Linux has. Elsewhere, and where not so many can be open or nothing
    temporary can be written, it is the checkpoint's own folder.
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
    """(averaged parameters, what is wrong with them), of which one is empty; in every process its own part.

    UserError, in all processes, where they are of another model.
    """
    handler = ocp.PyTreeCheckpointHandler()
    if other := said(_other_model(files, path, handler, like) if jax.process_index() == 0 else ""):
        raise UserError(other)
    wanted = {"step": jax.ShapeDtypeStruct((), np.int32), "ema": like}
    options = ocp.args.PyTreeRestore(
        wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
    )
    try:
        handler.metadata(files / "state")  # without it Orbax would take the shapes to be those wanted
        found = handler.restore(files / "state", args=options)
    except (MemoryError, jax.errors.JaxRuntimeError):  # says nothing about the files
        raise
    except Exception as e:  # what a damaged file raises depends on the byte
        return None, line(e)
    if int(found["step"]) != int(path.name):
        return None, f"it holds step {int(found['step'])}"
    return found["ema"], ""


def _other_model(files, path, handler, like) -> str:
    """What says that a checkpoint is of another model, where it is."""
    try:
        check_shapes(f"the checkpoint {path}", below(shapes_in(files, handler), "ema"), shapes(like))
    except UserError as e:
        return str(e)
    except Exception:  # damaged: loading it says so
        pass
    return ""
