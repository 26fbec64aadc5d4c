"""Training states on disk: written by Orbax, checked by digests of our own, never lost.

A working folder holds checkpoints/STEP/ (Orbax), digests/STEP.json (`ivideo.training.digests`) and damaged/STEP/ for
checkpoints that were found damaged. All processes share the folder: each writes its part of a checkpoint through Orbax,
and the first one alone writes digests and moves folders. Sampling reads a run through `ivideo.training.average`, which
moves nothing.
"""

import concurrent.futures
import contextlib
import logging
import os
import re
import shutil

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from ivideo.data.pipeline import load_state
from ivideo.errors import UserError
from ivideo.files import in_bucket, read_json, write_json
from ivideo.training import digests
from ivideo.weights import check_shapes

log = logging.getLogger("ivideo")

TEMPORARY = ".orbax-checkpoint-tmp"  # in the name of a folder that Orbax has not finished
SAVE_SECONDS = 3600  # for all processes to write one checkpoint: shared storage can be slow


class Checkpoints:
    """The newest `keep` checkpoints of a training run. Saving goes on in the background.

    Every process of a program makes one, and calls the same methods in the same order.
    """

    def __init__(self, workdir: str, *, keep: int):
        check_workdir(workdir)
        self.workdir = epath.Path(os.path.abspath(workdir))
        self._keep, self._first = keep, jax.process_index() == 0
        self._digester = concurrent.futures.ThreadPoolExecutor(1)
        self._digesting = None  # the newest task of the digester
        self._failed = False  # whether a checkpoint could not be written
        self._position = self.workdir / "rollback.json"
        self._manager = self._open()

    def save(self, step: int, state, iterator) -> None:
        """Starts saving the state and the data iterator's position; returns once they may change again.

        UserError where the checkpoint before could not be written, such as to a full disk.
        """
        if self._first and not self._path(step).exists():
            # Somebody deleted a checkpoint of this step: its digests would make the new one look damaged
            digests.forget(self.workdir, step)
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(iterator))
        with self._saving():
            saved = self._manager.save(step, args=args)
        if not saved:
            log.warning("step %d is not saved: there is step %d already", step, self._manager.latest_step())
        elif self._first:
            self._digesting = self._digester.submit(self._write_digests, step)

    def finish(self) -> None:
        """Waits for the checkpoint being saved and for its digests. UserError where it could not be written."""
        with self._saving():
            self._manager.wait_until_finished()
        if self._digesting is not None:
            self._digesting.result()

    def check(self) -> None:
        """UserError where the checkpoint that was being saved could not be written; returns at once."""
        with self._saving():
            self._manager.check_for_errors()

    def keep_position(self, step: int, iterator) -> None:
        """Makes a restart from the checkpoint of `step` read on where the iterator is now, not where it was then."""
        if self._first:
            write_json(self._position, {"step": step, "data": iterator.get_state()})

    def restore(self, like, iterator=None):
        """The newest whole checkpoint as (step, state), or None where there is none; sets the iterator's position.

        `like`: the state's shapes with the shardings wanted, whatever devices saved it. A damaged checkpoint is moved
        to damaged/, with a warning, and the one before it is tried. With an iterator, that is where training begins,
        what a killed save has left is deleted: it holds nothing that a whole one lacks. UserError where the checkpoint
        is of another model or optimizer, or where all are damaged.
        """
        self.finish()
        if self._first:
            self._sweep(temporary=iterator is not None)
        while (step := self._manager.latest_step()) is not None:
            state, problem = None, said(digests.compare(self.workdir, step) if self._first else "")
            if problem in (digests.WHOLE, digests.UNCHECKED):
                state, problem = self._load(step, like, iterator, whole=problem == digests.WHOLE)
                problem = said(problem)
            if not problem:
                return int(step), state
            if self._first:
                self._set_aside(str(step), problem)
                log.warning("trying the checkpoint before %d", step)
            said("")  # none may look before it is moved
            self._reopen()
        # Also when the next start finds nothing but these: it would begin anew where a run has been
        if said("damaged" if self._first and self._lost() else ""):
            raise UserError(
                f"every checkpoint in {self.workdir / 'checkpoints'} is damaged (moved to {self.workdir / 'damaged'}): "
                "copy a whole one back, or start anew in another --workdir"
            )
        return None

    def close(self) -> None:
        """Waits for what is being saved. After a checkpoint that could not be, there is nothing to wait for."""
        if not self._failed:
            self.finish()
            self._manager.close()
        self._digester.shutdown()

    def _open(self):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep,
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(timeout_secs=SAVE_SECONDS),
            single_host_load_and_broadcast=True,  # the same steps in all processes, whatever storage shows them
            lightweight_initialize=True,  # reads no metadata
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "data": grain.checkpoint.CheckpointHandler()}
        return ocp.CheckpointManager(self.workdir / "checkpoints", options=options, item_handlers=handlers)

    @contextlib.contextmanager
    def _saving(self):
        """Turns what Orbax raises where storage refuses a checkpoint into a UserError; what was written is deleted."""
        try:
            yield
        except (OSError, ValueError) as e:
            self._failed, problem = True, _storage_problem(e)
            if not problem:
                raise
            folder = self.workdir / "checkpoints"
            if self._first:
                for torn in folder.glob(f"*{TEMPORARY}*"):
                    shutil.rmtree(torn, ignore_errors=True)
            steps = steps_in(self.workdir)
            raise UserError(
                f"a checkpoint could not be saved in {folder} ({problem}): make room there, or see that it can be "
                f"written; the same command goes on from {f'step {max(steps)}' if steps else 'the start'}"
            ) from e

    def _reopen(self):
        """Looks at the folder anew; the manager's own `reload` would read metadata, which may be damaged."""
        self._manager.close()
        self._manager = self._open()

    def _path(self, step):
        return self.workdir / "checkpoints" / str(step)

    def _write_digests(self, step):
        """Waits for a checkpoint and writes its digests, in a thread: that may take as long as many training steps."""
        try:
            self._manager.wait_until_finished()
            self._position.unlink(missing_ok=True)  # this checkpoint has its own
            digests.write(self.workdir, step, kept=self._manager.all_steps())
        except Exception as e:
            # Else saving has failed, which is raised in the main thread, or there are newer ones enough
            if self._path(step).exists():
                log.warning("checkpoint %d has no digests (%s): Orbax's own checks remain", step, line(e))

    def _load(self, step, like, iterator, *, whole):
        """(state, what is wrong with it), of which one is empty; in every process its own part."""
        path = self._path(step)
        handler = ocp.StandardCheckpointHandler()  # not the manager: a process that fails alone would miss its barriers
        unread = None
        try:
            found = shapes_in(path, handler)
        except Exception as e:  # restoring may do without what is damaged here
            unread = e
        else:
            check_shapes(f"the checkpoint {path}", below(found, "params"), below(shapes(like), "params"))
            check_shapes(f"the checkpoint {path}", found, shapes(like), of="optimizer (config.train.optimizer)")
        try:
            state = handler.restore(path / "state", args=ocp.args.StandardRestore(like))
            if int(state.step) != step:
                return None, f"it holds step {int(state.step)}"
            if iterator is not None:
                load_state(iterator, path / "data")
                if self._position.exists() and (kept := read_json(self._position))["step"] == step:
                    iterator.set_state(kept["data"])
            return state, ""
        except (MemoryError, jax.errors.JaxRuntimeError):  # says nothing about the files
            raise
        except Exception as e:  # what a damaged file raises depends on the byte
            if whole:
                e.add_note(f"{path} is as it was written, by its digests: not set aside")
                raise
            return None, line(unread or e)

    def _sweep(self, *, temporary):
        """Sets aside what has a checkpoint's place but is none, as Orbax would pass over it, and then fail to save."""
        for path in sorted((self.workdir / "checkpoints").iterdir()):
            number, folder = path.name.isdecimal(), path.is_dir()
            if TEMPORARY in path.name:
                if temporary:
                    log.info("%s is deleted: a save was killed before its end", path)
                    shutil.rmtree(path, ignore_errors=True)
            elif number and not folder:
                self._set_aside(path.name, "it is a file, not a folder")
            elif folder and not (number and path.name == str(int(path.name))):
                self._set_aside(path.name, "its name is not a step")

    def _set_aside(self, name, problem):
        target = self.workdir / "damaged" / name
        while target.exists():
            target = target.with_name(target.name + "_")
        target.parent.mkdir(exist_ok=True)
        (self.workdir / "checkpoints" / name).rename(target)
        digests.forget(self.workdir, name)
        log.warning("checkpoint %s is damaged (%s): moved to %s", name, problem, target)

    def _lost(self):
        """Whether there are checkpoints among what was set aside."""
        folder = self.workdir / "damaged"
        return folder.exists() and any(TEMPORARY not in path.name for path in folder.iterdir())


def check_workdir(workdir) -> None:
    """UserError where a working folder is in a bucket: logs that grow, digests and moves need a file system."""
    if in_bucket(workdir):
        raise UserError(
            f"--workdir={workdir} is in a bucket, and a run needs a file system: mount the bucket on every host with "
            "gcsfuse (docs/tpu.md) and give the folder there"
        )


def _storage_problem(error: Exception) -> str:
    """What the storage said, where an error is its fault, or ''. TensorStore's errors begin with a status."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        return error.strerror or text
    if not isinstance(error, ValueError) or not re.match(r"[A-Z_]{6,}: ", text):
        return ""
    found = re.search(r"([^:]+) \[os_error_code", text)
    return found[1].strip() if found else text[:200]


def steps_in(workdir) -> set[int]:
    """The steps of the checkpoints in a run's folder. One that is being saved has another name."""
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    return {int(name) for name in names if name.isdecimal() and name == str(int(name))}


def shapes_in(path, handler) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf of a checkpoint's state by its path, a/b/c; raises what keeps it from being read."""
    return shapes(handler.metadata(path / "state").tree)


def shapes(tree) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf of a tree by its path, a/b/c."""
    return {name: tuple(leaf.shape) for name, leaf in ocp.tree.to_flat_dict(tree, sep="/").items()}


def below(found: dict, name: str) -> dict:
    """The part of such shapes that is below a name, by the paths from there."""
    return {path.removeprefix(f"{name}/"): shape for path, shape in found.items() if path.startswith(f"{name}/")}


def line(error) -> str:
    """An error in one line: what was wrong."""
    while error.__cause__ is not None:  # Orbax tells where it was, its cause what is wrong
        error = error.__cause__
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:400] if text else ''}"


def said(text: str) -> str:
    """In every process what the first of them says that says anything; returns once all have been asked."""
    if jax.process_count() == 1:
        return text
    said = np.zeros(1000, np.uint8)
    code = text.encode()[: said.size]
    said[: len(code)] = np.frombuffer(code, np.uint8)
    rows = multihost_utils.process_allgather(said)
    return next((bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows if row.any()), "")
