"""Where a run's time went, from the log that its processes append to, WORKDIR/events.jsonl.

Every second between the run's first start and its last event is of one kind:

productive  steps whose result the run still has, each counted once: the last time it was done. The seconds of a range
            of steps are spread evenly over them. The first step of a process is one of them, its time `compiling`.
lost        steps whose result is gone: done after the checkpoint that the next process read, or rolled back. They are
            done again, or still have to be.
input       waiting for data, in productive and lost steps alike
compiling   the first step of each process: from the end of restoring
restoring   reading checkpoints
saving      the loop held up by writing checkpoints
startup     from a process's start to the end of its first step, where that is neither restoring nor compiling; of one
            that has not come so far, to its last event
down        between a process's last event and the next one's start. What a killed process did after its last event is
            not known: it is here.
other       the rest

Goodput is the share of `productive`. Within a process, time is measured by a clock that nobody sets (`clock`, which is
`time.monotonic`); the report says by how much the machine's clock was set meanwhile. Logs without it have the machine's
clock alone (`time`); a process whose clock was set back lasted at least as long as the events that it timed. Between
processes the machines' clocks are compared: should the next one's be behind, nothing is `down`.
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
JUMP = 1.0  # seconds by which two clocks may differ from one event to the next: they are not read at the same moment
COUNTED = {
    "processes": ("process", "processes"),
    "preemptions": ("preemption", "preemptions"),
    "kills": ("kill", "kills"),
    "failures": ("failure", "failures"),
    "rollbacks": ("rollback", "rollbacks"),
    "skipped": ("skipped update", "skipped updates"),
}


def report(workdir, as_json: bool = False) -> None:
    """Prints the goodput of the run in a folder as a table, or as JSON. UserError where there is none."""
    found = goodput(read_run(workdir))
    print(json.dumps(found, indent=2) if as_json else table(found))


def goodput(events: list[dict]) -> dict:
    """Seconds and shares by kind of time, and what happened how often, from a run's events in their order.

    `shares` add up to 1 exactly. `steps` counts the productive and the lost ones; `kills` are starts whose predecessor
    left no end, `skipped` updates with non-finite gradients among the productive steps. `clock_set` has the seconds by
    which the clock of a machine was set each time, backwards less than 0; a machine that slept looks the same.
    """
    processes = _processes(events)
    if not processes:
        raise UserError("the events hold no start: give those of a run, as ivideo.training.report writes them")
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
    """What `goodput` found, for people."""
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
        lines.append(f"the clock was set, or the machine slept ({jumps}): the durations above leave that out")
    return "\n".join(lines)


def read_run(workdir) -> list[dict]:
    """The events of the run in a folder. UserError where there is no log, or no start in it."""
    path = pathlib.Path(workdir) / "events.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the --workdir of a training run, which writes it")
    try:
        events = [event for event in read(path) if "event" in event]
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e}): give the --workdir of a training run") from e
    if not any(event["event"] == "start" for event in events):
        raise UserError(f"{path} holds no run, its first event would be a start: give the --workdir of a training run")
    return events


def read(path) -> list[dict]:
    """The objects of a file with one flat JSON object a line.

    A process killed while it wrote leaves a line torn, and the next one goes on behind it in the same line: what is
    torn is left out, what is behind it is read.
    """
    with open(path, encoding="utf-8", errors="replace") as f:
        found = (_parse(line.strip()) for line in f)
        return [value for value in found if value is not None]


def _parse(line: str) -> dict | None:
    # Inside a string a quote is \", and objects hold no objects: this begins the last object of the line
    for part in (line, line[line.rfind('{"') :]):
        try:
            value = json.loads(part)
        except ValueError:
            continue
        return value if isinstance(value, dict) else None
    return None


def _processes(events: list[dict]) -> list[list[dict]]:
    """The events of each process, its start first."""
    processes = []
    for event in events:
        if event["event"] == "start":
            processes.append([])
        if processes:
            processes[-1].append(event)
    return processes


def _times(processes: list[list[dict]], history) -> tuple[float, dict[str, float]]:
    """The seconds of a run in all, and by kind."""
    parts = [_timed(process) for process in processes]
    seconds = {kind: sum(part.get(kind, 0.0) for part in parts) for kind in KINDS}
    gaps = (after[0]["time"] - before[-1]["time"] for before, after in itertools.pairwise(processes))
    seconds["down"] = sum(max(gap, 0.0) for gap in gaps)
    seconds["productive"], seconds["lost"] = sum(history.kept.values()), history.lost
    spans = (_span(process[0], process[-1]) for process in processes)
    total = seconds["down"] + sum(max(span, sum(part.values())) for span, part in zip(spans, parts, strict=True))
    # The steps' seconds add up in another order above: rounding can leave less than nothing
    seconds["other"] = max(total - sum(seconds.values()), 0.0)
    return total, seconds


def _timed(process: list[dict]) -> dict[str, float]:
    """Seconds of one process by kind; those of its steps, productive or not, as `steps`."""
    seconds = dict.fromkeys(("input", *TIMED.values()), 0.0)
    steps = before = 0.0  # before: what is accounted for until the first step was done
    first = next((event for event in process if event["event"] == "compiled"), process[-1])
    for event in process:
        if event["event"] in TIMED:
            seconds[TIMED[event["event"]]] += event["seconds"]
        elif event["event"] == "steps":
            seconds["input"] += event["input_seconds"]
            steps += event["seconds"] - event["input_seconds"]
        if event is first:
            before = sum(seconds.values()) + steps
    return {**seconds, "steps": steps, "startup": max(_span(process[0], first) - before, 0.0)}


def _span(first: dict, last: dict) -> float:
    """Seconds from one event of a process to another."""
    clock = "clock" if "clock" in first and "clock" in last else "time"
    return last[clock] - first[clock]


def _jumps(process: list[dict]) -> list[float]:
    """Seconds by which the machine's clock went further than time did, from one event of a process to the next."""
    jumps = (after["time"] - before["time"] - _span(before, after) for before, after in itertools.pairwise(process))
    return [jump for jump in jumps if abs(jump) > JUMP]


class _History:
    """Which steps a run has, as one reads on in its events."""

    def __init__(self):
        self.kept = {}  # step -> seconds, waiting for input not included
        self.skipped = set()
        self.lost, self.lost_steps = 0.0, 0

    def follow(self, process: list[dict]) -> None:
        """Reads the events of one process."""
        # The step it goes on from. One that finds no checkpoint begins anew; one killed before changes nothing
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
