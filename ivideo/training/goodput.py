"""Reports how a training run spent its time, from the log that its processes append to, WORKDIR/events.jsonl.

Every second between the run's first start and its last event belongs to one kind:

productive  steps whose result the run still has. A step that was repeated counts once, with its last time. The seconds
            of a range of steps are spread evenly over the steps. The first step of a process is a productive step, but
            its time is `compiling`.
lost        steps whose result is lost: they came after the checkpoint that the next process read, or were rolled back.
            The run has repeated them, or still has to.
input       waiting for data, in productive and lost steps
compiling   the first step of each process, from the end of restoring
restoring   reading checkpoints
saving      time that the loop was blocked by writing checkpoints
startup     from a process's start to the end of its first step, without restoring and compiling. If a process did not
            finish a step, up to its last event.
down        from a process's last event to the start of the next process. This includes the work of a killed process
            after its last event, which is unknown.
other       the rest

Goodput is the share of `productive`. Each event has the machine's time of day (`time`) and its monotonic clock
(`clock`). Durations within a process are differences of the monotonic clock, and the report says by how much the time
of day was set in between. A log without `clock` has only the time of day. If that was set back, the process is taken to
have lasted as long as the events that it timed. Between two processes the times of day are compared. If the second is
earlier than the first, `down` is zero.
"""

import itertools
import json
import pathlib

from ivideo.errors import UserError

KINDS = {
    "productive": "productive steps",
    "lost": "steps done again or rolled back",
    "input": "waiting for input",
    "compiling": "compiling (first steps)",
    "restoring": "restoring",
    "saving": "saving",
    "startup": "start-up",
    "down": "down",
    "other": "other",
}
TIMED = {"compiled": "compiling", "restored": "restoring", "saved": "saving"}
# Seconds. The two clocks are not read at the same instant. If they differ by more, the time of day was set
MAX_CLOCK_DIFFERENCE = 1.0
COUNTED = {
    "processes": ("process", "processes"),
    "preemptions": ("preemption", "preemptions"),
    "kills": ("kill", "kills"),
    "failures": ("failure", "failures"),
    "rollbacks": ("rollback", "rollbacks"),
    "skipped": ("skipped update", "skipped updates"),
}


def report(workdir, as_json: bool = False) -> None:
    """Prints the goodput of the run in a folder as a table or as JSON. UserError if the folder has no run."""
    found = goodput(read_run(workdir))
    print(json.dumps(found, indent=2) if as_json else table(found))


def goodput(events: list[dict]) -> dict:
    """Seconds and shares per kind of time, and counts of incidents, from a run's events in order.

    `shares` add up to exactly 1. `steps` counts productive and lost steps. `kills` counts processes, except the last,
    that did not log their end. `skipped` counts updates with non-finite gradients among the productive steps.
    `clock_set` has the seconds of each change of a machine's time of day, negative if it was set back. A suspended
    machine looks the same.
    """
    processes = _processes(events)
    if not processes:
        raise UserError("the events have no start: pass the events of a run, as ivideo.training.report writes them")
    history = _History()
    for process in processes:
        history.follow(process)
    total, seconds = _times(processes, history)
    shares = {kind: value / total if total else 0.0 for kind, value in seconds.items() if kind != "other"}
    shares["other"] = 1 - sum(shares.values())
    ends = [process[-1]["reason"] if process[-1]["event"] == "end" else None for process in processes]
    return {
        "goodput": shares["productive"],
        "total": total,
        "seconds": seconds,
        "shares": shares,
        "steps": {"productive": len(history.kept), "lost": history.lost_steps},
        "processes": len(processes),
        "preemptions": ends.count("preempted"),
        "failures": sum(end is not None and end.startswith("failed") for end in ends),
        "kills": ends[:-1].count(None),
        "rollbacks": sum(event["event"] == "rollback" for process in processes for event in process),
        "skipped": len(history.skipped),
        "clock_set": [jump for process in processes for jump in _jumps(process)],
    }


def table(found: dict) -> str:
    """The result of `goodput` as a readable table."""
    counts = {"productive": f" ({found['steps']['productive']})", "lost": f" ({found['steps']['lost']})"}
    lines = [
        f"goodput {found['goodput']:.1%} of {_duration(found['total'])} from the first start to the last event",
        "",
        f"{'':40}{'seconds':>12}{'share':>9}",
    ]
    for kind, name in KINDS.items():
        label = name + counts.get(kind, "")
        lines.append(f"{label:40}{found['seconds'][kind]:12.1f}{found['shares'][kind]:z9.1%}")
    lines += ["", ", ".join(_count(found[key], *names) for key, names in COUNTED.items())]
    if found["clock_set"]:
        jumps = ", ".join(f"{jump:+.0f} s" for jump in found["clock_set"])
        lines.append(f"the clock was set, or the machine was suspended ({jumps}): the durations above leave that out")
    return "\n".join(lines)


def read_run(workdir) -> list[dict]:
    """The events of the run in a folder. UserError if there is no log, or if the log has no start."""
    path = pathlib.Path(workdir) / "events.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the --workdir of a training run")
    try:
        events = [event for event in read(path) if "event" in event]
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e}): give the --workdir of a training run") from e
    if not any(event["event"] == "start" for event in events):
        raise UserError(f"{path} has no start event: give the --workdir of a training run")
    return events


def read(path) -> list[dict]:
    """The objects of a file with one flat JSON object per line.

    A process that is killed while it writes leaves a partial line, and the next process continues on that line. The
    partial object is left out, the object after it is read.
    """
    with open(path, encoding="utf-8", errors="replace") as f:
        found = (_parse(line.strip()) for line in f)
        return [value for value in found if value is not None]


def _parse(line: str) -> dict | None:
    # The second try is the line's last object: strings escape their quotes and objects are flat, so only an object can
    # begin with {"
    for text in (line, line[line.rfind('{"') :]):
        try:
            value = json.loads(text)
        except ValueError:
            continue
        return value if isinstance(value, dict) else None
    return None


def _processes(events: list[dict]) -> list[list[dict]]:
    """The events per process, each beginning with a start."""
    processes = []
    for event in events:
        if event["event"] == "start":
            processes.append([])
        if processes:
            processes[-1].append(event)
    return processes


def _times(processes: list[list[dict]], history) -> tuple[float, dict[str, float]]:
    """Returns the total seconds of a run, and the seconds per kind."""
    timed = [_timed(process) for process in processes]
    seconds = {kind: sum(process.get(kind, 0.0) for process in timed) for kind in KINDS}
    gaps = (after[0]["time"] - before[-1]["time"] for before, after in itertools.pairwise(processes))
    seconds["down"] = sum(max(gap, 0.0) for gap in gaps)
    seconds["productive"], seconds["lost"] = sum(history.kept.values()), history.lost
    spans = (_span(process[0], process[-1]) for process in processes)
    total = seconds["down"] + sum(max(span, sum(process.values())) for span, process in zip(spans, timed, strict=True))
    # Rounding could make the rest slightly negative
    seconds["other"] = max(total - sum(seconds.values()), 0.0)
    return total, seconds


def _timed(process: list[dict]) -> dict[str, float]:
    """Seconds of one process per kind. `steps` are the seconds of its steps, whether productive or lost."""
    seconds = dict.fromkeys(("input", *TIMED.values()), 0.0)
    steps = 0.0
    known = 0.0  # seconds that belong to another kind than start-up, until the end of the first step
    first = next((event for event in process if event["event"] == "compiled"), process[-1])
    for event in process:
        if event["event"] in TIMED:
            seconds[TIMED[event["event"]]] += event["seconds"]
        elif event["event"] == "steps":
            seconds["input"] += event["input_seconds"]
            steps += event["seconds"] - event["input_seconds"]
        if event is first:
            known = sum(seconds.values()) + steps
    return {**seconds, "steps": steps, "startup": max(_span(process[0], first) - known, 0.0)}


def _span(first: dict, last: dict) -> float:
    """Seconds from one event of a process to another."""
    clock = "clock" if "clock" in first and "clock" in last else "time"
    return last[clock] - first[clock]


def _jumps(process: list[dict]) -> list[float]:
    """Seconds by which the time of day was set between two events of a process, compared with the monotonic clock."""
    jumps = (after["time"] - before["time"] - _span(before, after) for before, after in itertools.pairwise(process))
    return [jump for jump in jumps if abs(jump) > MAX_CLOCK_DIFFERENCE]


class _History:
    """The steps that a run has kept and lost, from its events so far."""

    def __init__(self):
        self.kept = {}  # step -> seconds, waiting for input not included
        self.skipped = set()
        self.lost, self.lost_steps = 0.0, 0

    def follow(self, process: list[dict]) -> None:
        """Adds the events of one process."""
        # The step that the process continues from, 0 without a checkpoint. A process that was killed before it restored
        # or did a step changes nothing
        at = next((event["step"] for event in process if event["event"] == "restored"), 0)
        if any(event["event"] in ("restored", "compiled", "steps") for event in process):
            self._back_to(at)
        for event in process:
            if event["event"] == "compiled":
                self._done(at + 1, at + 1, 0.0)
            elif event["event"] == "steps":
                self._done(event["first"], event["last"], event["seconds"] - event["input_seconds"])
            elif event["event"] == "rollback":
                self._back_to(event["to"])
            elif event["event"] == "skipped":
                self.skipped.add(event["step"])

    def _back_to(self, step: int) -> None:
        for late in [s for s in self.kept if s > step]:
            self._lose(late)
        self.skipped = {s for s in self.skipped if s <= step}

    def _done(self, first: int, last: int, seconds: float) -> None:
        for step in range(first, last + 1):
            self._lose(step)
            self.kept[step] = seconds / (last + 1 - first)

    def _lose(self, step: int) -> None:
        if step in self.kept:
            self.lost += self.kept.pop(step)
            self.lost_steps += 1


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
