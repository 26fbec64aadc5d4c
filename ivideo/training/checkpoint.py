"""Saves and restores training states with Orbax, and checks them with digests of our own.

A working folder has checkpoints/STEP/ (Orbax), digests/STEP.json (`ivideo.training.digests`), and damaged/STEP/ for
checkpoints that were found damaged. All processes share the folder. Each process writes its part of a checkpoint with
Orbax; only the first one writes digests and moves folders. Sampling reads a run with `ivideo.training.average`, which
changes nothing.
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

TEMPORARY = ".orbax-checkpoint-tmp"  # part of the name of a folder that Orbax has not finished
SAVE_SECONDS = 3600  # time limit for all processes to write one checkpoint: shared storage can be slow
MESSAGE_BYTES = 1000  # longest text that processes exchange


class Checkpoints:
    """The newest `keep` checkpoints of a training run. Checkpoints are saved in the background.

    Every process of a program creates one, and calls the same methods in the same order.
    """

    def __init__(self, workdir: str, *, keep: int):
        check_workdir(workdir)
        self.workdir = epath.Path(os.path.abspath(workdir))
        self._keep, self._is_first = keep, jax.process_index() == 0
        self._digester = concurrent.futures.ThreadPoolExecutor(1)
        self._digest_task = None  # the newest task of the digester
        self._failed = False  # whether writing a checkpoint has failed
        self._position = self.workdir / "rollback.json"
        self._manager = self._open()

    def save(self, step: int, state, iterator) -> None:
        """Starts saving the state and the data iterator's position, and returns once both may change again.

        UserError if the previous checkpoint could not be written, for example because the disk is full.
        """
        if self._is_first and not self._path(step).exists():
            # A user may have deleted a checkpoint of this step: its digests would make the new one look damaged
            digests.forget(self.workdir, step)
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(iterator))
        with self._saving():
            saved = self._manager.save(step, args=args)
        if not saved:
            log.warning("step %d is not saved: there is one of step %d already", step, self._manager.latest_step())
        elif self._is_first:
            self._digest_task = self._digester.submit(self._write_digests, step)

    def finish(self) -> None:
        """Waits for the current checkpoint and its digests. UserError if it could not be written."""
        with self._saving():
            self._manager.wait_until_finished()
        if self._digest_task is not None:
            self._digest_task.result()

    def check(self) -> None:
        """UserError if writing the current checkpoint has failed so far. Returns at once."""
        with self._saving():
            self._manager.check_for_errors()

    def keep_position(self, step: int, iterator) -> None:
        """Saves the iterator's current position, from which a restart from checkpoint `step` will read on."""
        if self._is_first:
            write_json(self._position, {"step": step, "data": iterator.get_state()})

    def restore(self, like, iterator=None):
        """Restores the newest undamaged checkpoint as (step, state), or None, and sets the iterator's position.

        `like`: the state's shapes with the new shardings, which may differ from those that were saved. A damaged
        checkpoint is moved to damaged/ with a warning, and the previous one is tried. With an iterator, which means at
        the start of training, the remains of a killed save are deleted: they have nothing that a finished checkpoint
        lacks. UserError if the checkpoint belongs to another model or optimizer, or if all checkpoints are damaged.
        """
        self.finish()
        if self._is_first:
            self._clean_up(temporary=iterator is not None)
        while (step := self._manager.latest_step()) is not None:
            state, problem = None, first_message(digests.compare(self.workdir, step) if self._is_first else "")
            if problem in (digests.WHOLE, digests.UNCHECKED):
                state, problem = self._load(step, like, iterator, whole=problem == digests.WHOLE)
                problem = first_message(problem)
            if not problem:
                return int(step), state
            if self._is_first:
                self._move_to_damaged(str(step), problem)
                log.warning("trying the checkpoint before %d", step)
            first_message("")  # all processes wait until it is moved
            self._reopen()
        # This also holds at the next start, with damaged/ only: it must not silently begin anew
        if first_message("damaged" if self._is_first and self._has_damaged() else ""):
            raise UserError(
                f"every checkpoint in {self.workdir / 'checkpoints'} is damaged (moved to {self.workdir / 'damaged'}): "
                "copy an undamaged one back, or start anew in another --workdir"
            )
        return None

    def close(self) -> None:
        """Waits for the current checkpoint, unless writing one has failed."""
        if not self._failed:
            self.finish()
            self._manager.close()
        self._digester.shutdown()

    def _open(self):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep,
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(timeout_secs=SAVE_SECONDS),
            single_host_load_and_broadcast=True,  # all processes see the same steps, even if storage shows them late
            lightweight_initialize=True,  # does not read metadata
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "data": grain.checkpoint.CheckpointHandler()}
        return ocp.CheckpointManager(self.workdir / "checkpoints", options=options, item_handlers=handlers)

    @contextlib.contextmanager
    def _saving(self):
        """Turns a storage error of Orbax into a UserError, and deletes the partial checkpoint."""
        try:
            yield
        except (OSError, ValueError) as e:
            self._failed, problem = True, _storage_problem(e)
            if not problem:
                raise
            folder = self.workdir / "checkpoints"
            if self._is_first:
                for partial in folder.glob(f"*{TEMPORARY}*"):
                    shutil.rmtree(partial, ignore_errors=True)
            steps = steps_in(self.workdir)
            raise UserError(
                f"a checkpoint could not be saved in {folder} ({problem}): free some space there, or make "
                f"the folder writable; the same command continues from {f'step {max(steps)}' if steps else 'the start'}"
            ) from e

    def _reopen(self):
        """Reads the folder again. The manager's own `reload` would read metadata, which may be damaged."""
        self._manager.close()
        self._manager = self._open()

    def _path(self, step):
        return self.workdir / "checkpoints" / str(step)

    def _write_digests(self, step):
        """Waits for a checkpoint and writes its digests. Runs in a thread, because it can take longer than steps."""
        try:
            self._manager.wait_until_finished()
            self._position.unlink(missing_ok=True)  # the new checkpoint has its own position
            digests.write(self.workdir, step, kept=self._manager.all_steps())
        except Exception as e:
            # Otherwise saving failed, which the main thread raises, or newer checkpoints have replaced this one
            if self._path(step).exists():
                log.warning("checkpoint %d has no digests (%s): only Orbax's own checks remain", step, error_line(e))

    def _load(self, step, like, iterator, *, whole):
        """Returns (state, '') or (None, problem). Every process loads its own part."""
        path = self._path(step)
        handler = ocp.StandardCheckpointHandler()  # the manager has barriers: one failing process would block all
        metadata_error = None
        try:
            found = checkpoint_shapes(path, handler)
        except Exception as e:  # restoring may succeed without this metadata
            metadata_error = e
        else:
            check_shapes(f"the checkpoint {path}", subtree(found, "params"), subtree(shapes(like), "params"))
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
        except (MemoryError, jax.errors.JaxRuntimeError):  # not the files' fault
            raise
        except Exception as e:  # damaged files raise many types
            if whole:
                e.add_note(f"the digests of {path} are right, so it is not moved to damaged/")
                raise
            return None, error_line(metadata_error or e)

    def _clean_up(self, *, temporary):
        """Moves files that are no checkpoints out of the way: Orbax would ignore them, and later fail to save."""
        for path in sorted((self.workdir / "checkpoints").iterdir()):
            is_number, is_folder = path.name.isdecimal(), path.is_dir()
            if TEMPORARY in path.name:
                if temporary:
                    log.info("deleting %s: a save was killed before its end", path)
                    shutil.rmtree(path, ignore_errors=True)
            elif is_number and not is_folder:
                self._move_to_damaged(path.name, "it is a file, not a folder")
            elif is_folder and not (is_number and path.name == str(int(path.name))):
                self._move_to_damaged(path.name, "its name is not a step")

    def _move_to_damaged(self, name, problem):
        target = self.workdir / "damaged" / name
        while target.exists():
            target = target.with_name(target.name + "_")
        target.parent.mkdir(exist_ok=True)
        (self.workdir / "checkpoints" / name).rename(target)
        digests.forget(self.workdir, name)
        log.warning("checkpoint %s is damaged (%s): moved to %s", name, problem, target)

    def _has_damaged(self):
        """Whether damaged/ has checkpoints."""
        folder = self.workdir / "damaged"
        return folder.exists() and any(TEMPORARY not in path.name for path in folder.iterdir())


def check_workdir(workdir) -> None:
    """UserError if a working folder is in a bucket: growing logs, digests and renaming need a file system."""
    if in_bucket(workdir):
        raise UserError(
            f"--workdir={workdir} is in a bucket, and a run needs a file system: mount the bucket on every host with "
            "gcsfuse (docs/tpu.md) and give the folder there"
        )


def _storage_problem(error: Exception) -> str:
    """The storage's message if the storage caused an error, otherwise ''. TensorStore's errors begin with a status."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        return error.strerror or text
    if not isinstance(error, ValueError) or not re.match(r"[A-Z_]{6,}: ", text):
        return ""
    # TensorStore adds its notes, such as the array's spec, in any order
    found = re.search(r"\[os_error_code='?(\d+)", text)
    return os.strerror(int(found[1])) if found else text[:200]


def steps_in(workdir) -> set[int]:
    """The steps of the finished checkpoints in a run's folder. An unfinished one has another name."""
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    return {int(name) for name in names if name.isdecimal() and name == str(int(name))}


def checkpoint_shapes(path, handler) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf of a checkpoint's state, by path a/b/c. Raises Orbax's error if it cannot be read."""
    return shapes(handler.metadata(path / "state").tree)


def shapes(tree) -> dict[str, tuple[int, ...]]:
    """The shape of every leaf of a tree, by path a/b/c."""
    return {name: tuple(leaf.shape) for name, leaf in ocp.tree.to_flat_dict(tree, sep="/").items()}


def subtree(shapes_by_path: dict, name: str) -> dict:
    """The entries below a name, by their path from there."""
    prefix = f"{name}/"
    return {path.removeprefix(prefix): shape for path, shape in shapes_by_path.items() if path.startswith(prefix)}


def error_line(error) -> str:
    """The type and message of an error's first cause, as one line."""
    while error.__cause__ is not None:  # Orbax's own message has the place, its cause the problem
        error = error.__cause__
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:400] if text else ''}"


def first_message(text: str) -> str:
    """Returns, in every process, the first text that is not empty. Waits until all processes have called it."""
    if jax.process_count() == 1:
        return text
    message = np.zeros(MESSAGE_BYTES, np.uint8)
    code = text.encode()[: message.size]
    message[: len(code)] = np.frombuffer(code, np.uint8)
    rows = multihost_utils.process_allgather(message)
    return next((bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows if row.any()), "")
