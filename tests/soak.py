"""Trains with kill -9 and SIGTERM at random moments, and compares the result bit for bit with an uninterrupted run.

python tests/soak.py FOLDER [--kills=20] [--terms=5] [--seed=0] [--steps=600]

The smallest base stage is trained twice on one CPU device: in FOLDER/whole without interruption, and in FOLDER/soaked
with the same command restarted after every signal. Signals come at random steps, each later than the one before. Some
kills come during start-up, before the first step, and some while a checkpoint is being written. Exit code 0 if both
runs end with the same training state and losses, otherwise 1.
"""

import argparse
import collections
import contextlib
import dataclasses
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

# As tests/conftest.py has it: the networks are tiny, to optimise their machine code would cost more than it saves
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from ivideo.training import goodput

ROOT = pathlib.Path(__file__).resolve().parent.parent
CHECKPOINT_EVERY = 8
PREEMPTED = 75  # the exit code after SIGTERM
PATIENCE = 600  # seconds without a new step, after which a run counts as hung
EXPECTED = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: PREEMPTED}


@dataclasses.dataclass
class Signal:
    """One signal, and the moment of the run at which it is sent."""

    sign: signal.Signals
    moment: str  # 'step', 'saving' (as the first checkpoint after a step is being written), 'start-up'
    step: int = 0  # the step waited for


class SoakError(Exception):
    """A run behaved in an unexpected way."""


def plan(kills: int, terms: int, steps: int, rng: random.Random) -> list[Signal]:
    """The signals in order. Each one has an interval of the steps, and a random step in it."""
    some = (kills + 2) // 6  # of each unusual moment
    signals = [Signal(signal.SIGKILL, "start-up") for _ in range(some)]
    signals += [Signal(signal.SIGKILL, "saving") for _ in range(some)]
    signals += [Signal(signal.SIGKILL, "step") for _ in range(kills - 2 * some)]
    signals += [Signal(signal.SIGTERM, "step") for _ in range(terms)]
    rng.shuffle(signals)
    part = (steps - 2 * CHECKPOINT_EVERY) / max(len(signals), 1)
    for n, one in enumerate(signals):
        one.step = int(n * part) + rng.randrange(1, int(part) + 1)
    return signals


class Run:
    """A training run in a folder, which one command starts as often as needed."""

    def __init__(self, workdir: pathlib.Path, steps: int):
        self.workdir, self.steps = workdir, steps
        self.process = None
        self.done = []  # the metrics of each process, a list of dicts: one for every step that it did
        self.startup = 10.0  # seconds from a start to its first step, the last time that there was one

    def start(self) -> None:
        """Starts a process. Its output goes to FOLDER/NAME.N.txt."""
        options = {"steps": self.steps, "checkpoint_every": CHECKPOINT_EVERY, "learning_rate": 3e-3}
        command = [sys.executable, "-m", "ivideo.main", "--config=configs/base.py:small", f"--workdir={self.workdir}"]
        command += [f"--config.train.{key}={value}" for key, value in options.items()]
        self._before, self._size = sum(map(len, self.done)), None
        self.done.append([])
        self._said = self.workdir.with_name(f"{self.workdir.name}.{len(self.done)}.txt")
        with open(self._said, "w") as f:
            self.process = subprocess.Popen(command, cwd=ROOT, env=environment(self.workdir.parent), stderr=f)
        self._began = time.time()

    def newest(self) -> int:
        """The latest step that any process has done."""
        self.look()
        return max((line["step"] for lines in self.done for line in lines), default=0)

    def look(self) -> None:
        """Reads the new metrics of the current process."""
        path = self.workdir / "metrics.jsonl"
        if path.exists() and (size := path.stat().st_size) != self._size:
            lines = goodput.read(path)[self._before :]
            if lines and not self.done[-1]:
                self.startup = time.time() - self._began
            self._size, self.done[-1] = size, lines

    def wait_for(self, reached, what: str) -> None:
        """Waits until `reached()`. SoakError if the process ends before, or writes nothing for a long time."""
        size, since = None, time.time()
        while not reached():
            if self.process.poll() is not None:
                raise SoakError(f"the run ended with exit code {self.process.returncode} before {what}{self.said()}")
            self.look()
            if self._size != size:
                size, since = self._size, time.time()
            if time.time() - since > PATIENCE:
                raise SoakError(f"no step for {PATIENCE} s, waiting for {what}{self.said()}")
            time.sleep(0.002)

    def wait_for_the_end(self) -> None:
        """Waits until all steps are done and the process has exited."""
        self.wait_for(lambda: self.newest() == self.steps, "the last step")
        self.expect(0)

    def stop(self, one: Signal, rng: random.Random) -> None:
        """Sends the signal at its moment, and waits for the process to end."""
        if one.moment == "start-up":
            at = self._began + rng.uniform(0.05, 0.9) * self.startup
            self.wait_for(lambda: time.time() > at or self.done[-1], "a moment of its start-up")
        else:
            one.step = max(one.step, self.newest() + 1)
            self.wait_for(lambda: self.newest() >= one.step, f"step {one.step}")
        if one.moment == "saving":
            now = time.time()
            self.wait_for(lambda: self.is_saving(now), "a checkpoint is written")
            time.sleep(rng.uniform(0, 0.1))
        self.process.send_signal(one.sign)
        self.expect(EXPECTED[one.sign])
        if one.moment == "start-up" and self.done[-1]:
            one.moment = "step"

    def is_saving(self, since: float) -> bool:
        """Whether a checkpoint that was started since then is unfinished: its folder still has a temporary name."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self.workdir / "checkpoints") as entries:
            return any(not e.name.isdecimal() and e.stat().st_mtime > since for e in entries)
        return False

    def expect(self, code: int) -> None:
        """Waits for the process to end. SoakError if its exit code differs."""
        try:
            found = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise SoakError(f"the run should end with exit code {code}, and does not{self.said()}") from None
        if found != code:
            raise SoakError(f"the run should end with exit code {code}, and did with {found}{self.said()}")
        self.look()

    def said(self) -> str:
        """The end of the process's output."""
        return f"\n{self._said}:\n" + "\n".join(self._said.read_text(errors="replace").splitlines()[-20:])

    def lines(self) -> list[dict]:
        """The metrics of all processes, in order."""
        return [line for lines in self.done for line in lines]


def environment(folder: pathlib.Path) -> dict[str, str]:
    """A process's environment, with a shared cache of compiled programs."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3"}
    return {**os.environ, **cache}


def undisturbed(folder: pathlib.Path, steps: int) -> Run:
    """Trains without interruption."""
    run = Run(folder / "whole", steps)
    with ending(run):
        run.start()
        run.wait_for_the_end()
    return run


def soaked(folder: pathlib.Path, steps: int, signals: list[Signal], rng: random.Random) -> Run:
    """Trains to the end, through all the signals."""
    run = Run(folder / "soaked", steps)
    with ending(run):
        for one in signals:
            run.start()
            run.stop(one, rng)
            print(f"{one.sign.name} {one.moment}: {run.newest()} steps done", flush=True)
        run.start()
        run.wait_for_the_end()
    return run


@contextlib.contextmanager
def ending(run: Run):
    """Ends the process if it still runs."""
    try:
        yield
    finally:
        if run.process is not None and run.process.poll() is None:
            run.process.kill()
            run.process.wait()


def final_state(workdir: pathlib.Path) -> dict:
    """Every array of the newest checkpoint, by its path."""
    import jax
    import orbax.checkpoint as ocp

    newest = max((p for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal()), key=lambda p: int(p.name))
    state = ocp.StandardCheckpointer().restore(newest / "state")
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def first_difference(whole: Run, other: Run) -> tuple[str | None, int]:
    """(the first difference between two runs or None, the number of arrays in their final states).

    The losses of repeated steps are compared too.
    """
    losses = {line["step"]: line["loss"] for line in whole.lines()}
    for line in other.lines():
        step, loss = line["step"], line["loss"]
        if loss != losses.get(step):
            return f"the loss at step {step} is {loss!r}, in the undisturbed run {losses.get(step)!r}", 0
    if missing := losses.keys() - {line["step"] for line in other.lines()}:
        return f"no loss of step {min(missing)}", 0
    wanted, found = final_state(whole.workdir), final_state(other.workdir)
    if wanted.keys() != found.keys():
        return f"arrays in one state only: {sorted(wanted.keys() ^ found.keys())}", 0
    for name, value in wanted.items():
        if (found[name].dtype, found[name].shape) != (value.dtype, value.shape):
            return f"{name} is {found[name].dtype} {found[name].shape}, not {value.dtype} {value.shape}", 0
        if found[name].tobytes() != value.tobytes():
            return f"{name} of the final state", 0
    return None, len(wanted)


def summary(signals: list[Signal], run: Run) -> str:
    """One line per signal, then the number of signals of each kind. A process is named by its first and last step."""
    rows = [f"{'':4}{'signal':9}{'moment':10}{'its process did':>17}{'done again':>12}"]
    total = 0
    for n, (one, lines) in enumerate(zip(signals, run.done, strict=False), 1):
        again = steps_again(run.done[n - 1 :])
        did = f"{lines[0]['step']} to {lines[-1]['step']}" if lines else "-"
        rows.append(f"{n:<4}{one.sign.name:9}{one.moment:10}{did:>17}{again:12}")
        total += again
    kinds = collections.Counter(f"{one.sign.name} {one.moment}" for one in signals)
    numbers = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
    return "\n".join([*rows, "", f"{len(signals)} signals ({numbers}), {total} of {run.steps} steps done again"])


def steps_again(done: list[list[dict]]) -> int:
    """How many steps of the first process were repeated by the next process that did any."""
    first, *rest = done
    after = next((lines for lines in rest if lines), None)
    return max(first[-1]["step"] + 1 - after[0]["step"], 0) if first and after else 0


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help="folder to make")
    parser.add_argument("--kills", type=int, default=20, help="how often kill -9 (20)")
    parser.add_argument("--terms", type=int, default=5, help="how often SIGTERM (5)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--steps", type=int, default=600, help="training steps (600)")
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f"{args.folder} exists: name a new folder")
    if args.steps < (args.kills + args.terms + 2) * CHECKPOINT_EVERY:
        parser.error(f"--steps={args.steps} is too few for so many signals: {CHECKPOINT_EVERY} or more for each")
    return args


def main() -> int:
    """Returns the exit code."""
    args = arguments()
    folder = args.folder.resolve()
    folder.mkdir(parents=True)
    rng = random.Random(args.seed)
    signals = plan(args.kills, args.terms, args.steps, rng)
    try:
        whole = undisturbed(folder, args.steps)
        print(f"undisturbed: {args.steps} steps, {whole.startup:.0f} s to the first", flush=True)
        run = soaked(folder, args.steps, signals, rng)
    except SoakError as e:
        print(e)
        return 1
    difference, arrays = first_difference(whole, run)
    print("", summary(signals, run), sep="\n")
    print(f"differs: {difference}" if difference else f"equal bit for bit: {arrays} arrays, {args.steps} losses")
    if (run.workdir / "events.jsonl").exists():
        print()
        goodput.report(run.workdir)
    return 1 if difference else 0


if __name__ == "__main__":
    sys.exit(main())
