"""Training states on disk: written by Orbax, checked by digests of our own, never lost.

A working folder holds checkpoints/STEP/ (Orbax), digests/STEP.json (the SHA-256 of every file there) and, should one be
found damaged, damaged/STEP/.
"""

import hashlib
import json
import logging
import os
import pathlib

import grain
import orbax.checkpoint as ocp

from ivideo.data.pipeline import load_state
from ivideo.errors import UserError
from ivideo.export import check_shapes, shapes_of

log = logging.getLogger("ivideo")


class Checkpoints:
    """The newest `keep` checkpoints of a training run. Saving goes on in the background."""

    def __init__(self, workdir: str, *, keep: int):
        self.workdir = pathlib.Path(workdir).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        handlers = {"state": ocp.StandardCheckpointHandler(), "data": grain.checkpoint.CheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.workdir / "checkpoints", options=options, item_handlers=handlers)

    def save(self, step: int, state, iterator) -> None:
        """Starts saving the state and the data iterator's position; returns once they may change again."""
        self.finish()
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(iterator))
        self._manager.save(step, args=args)

    def finish(self) -> None:
        """Waits for the checkpoint being saved, then writes the digests of those that have none."""
        self._manager.wait_until_finished()
        steps = set(self._manager.all_steps())
        folder = self.workdir / "digests"
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.json"):
            if int(path.stem) not in steps:
                path.unlink()
        for step in steps:
            if not self._digest_path(step).exists():
                temporary = folder / f"{step}.tmp"
                temporary.write_text(json.dumps(digests(self._path(step)), indent=1))
                os.replace(temporary, self._digest_path(step))

    def restore(self, like, iterator=None):
        """The newest whole checkpoint as (step, state), or None where there is none; sets the iterator's position.

        A damaged checkpoint is moved to damaged/, with a warning, and the one before it is tried. UserError where the
        checkpoint is of another model, or where all are damaged.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            problem = self._damage(step)
            if problem is None:
                self._check_model(step, like)
                try:
                    args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
                    state = self._manager.restore(step, args=args)["state"]
                    if iterator is not None:
                        load_state(iterator, self._path(step) / "data")
                    return step, state
                except Exception as e:  # what a damaged file raises depends on the byte
                    problem = f"{type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''}"
            self._set_aside(step, problem)
        if steps:
            raise UserError(
                f"every checkpoint in {self.workdir / 'checkpoints'} is damaged (moved to {self.workdir / 'damaged'}): "
                "copy a whole one back, or start anew in another --workdir"
            )
        return None

    def _path(self, step):
        return self.workdir / "checkpoints" / str(step)

    def _digest_path(self, step):
        return self.workdir / "digests" / f"{step}.json"

    def _damage(self, step):
        """What is wrong with the checkpoint's files, or None. One killed before its digests were written has none."""
        if not self._digest_path(step).exists():
            return None
        wanted, found = json.loads(self._digest_path(step).read_text()), digests(self._path(step))
        for name in sorted(wanted.keys() | found.keys()):
            if name not in found:
                return f"{name} is missing"
            if wanted.get(name) != found[name]:
                return f"{name} has changed since it was written"
        return None

    def _check_model(self, step, like):
        try:
            found = shapes_of(self._manager.item_metadata(step)["state"]["params"])
        except Exception:  # damage, which restoring will name
            return
        check_shapes(f"the checkpoint {self._path(step)}", found, shapes_of(like.params))

    def _set_aside(self, step, problem):
        target = self.workdir / "damaged" / str(step)
        while target.exists():
            target = target.with_name(target.name + "_")
        target.parent.mkdir(exist_ok=True)
        os.rename(self._path(step), target)
        self._digest_path(step).unlink(missing_ok=True)
        self._manager.reload()
        log.warning("checkpoint %d is damaged (%s): moved to %s, trying the one before", step, problem, target)

    def close(self):
        """Waits for what is being saved."""
        self.finish()
        self._manager.close()


def digests(folder: pathlib.Path) -> dict[str, str]:
    """The SHA-256 of every file below a folder, by its relative path."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
