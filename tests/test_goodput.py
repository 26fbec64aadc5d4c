"""The goodput report, against logs evaluated by hand."""

import json
import math
import pathlib
import subprocess
import sys

import pytest

from ivideo.errors import UserError
from ivideo.training import goodput

ROOT = pathlib.Path(__file__).parent.parent


class Log:
    """Makes a run's events. Time starts at 1000. The machine's time of day is `ahead` of the monotonic clock."""

    def __init__(self, clock=True):
        self.events, self.now, self.ahead, self.clock = [], 1000.0, 0.0, clock

    def add(self, event, after=0.0, **fields):
        self.now += after
        clock = {"clock": self.now} if self.clock else {}
        self.events.append({"event": event, "time": self.now + self.ahead, **clock, **fields})
        return self

    def set_clock(self, seconds):
        self.ahead += seconds
        return self

    def start(self, after=0.0):
        return self.add("start", after, step=0, processes=1, devices=8)

    def restored(self, step, seconds, after):
        return self.add("restored", after, step=step, seconds=seconds)

    def compiled(self, step, seconds, startup=0.0):
        return self.add("compiled", startup + seconds, step=step, seconds=seconds)

    def steps(self, first, last, seconds, waiting=0.0):
        return self.add("steps", seconds, first=first, last=last, seconds=seconds, input_seconds=waiting)

    def saved(self, step, seconds):
        return self.add("saved", seconds, step=step, seconds=seconds)

    def end(self, step, reason, after=0.0):
        return self.add("end", after, step=step, reason=reason)


def check(events, *, total, steps, **seconds):
    """Checks the result of `goodput` and returns it. `seconds` has every kind that is not zero."""
    found = goodput.goodput(events)
    assert found["total"] == pytest.approx(total)
    assert found["seconds"] == pytest.approx(dict.fromkeys(goodput.KINDS, 0.0) | seconds)
    assert min(found["seconds"].values()) >= 0
    assert sum(found["shares"].values()) == 1
    assert min(found["shares"].values()) > -1e-9
    assert math.isclose(sum(found["seconds"].values()), found["total"])
    assert found["goodput"] == found["shares"]["productive"] == pytest.approx(seconds.get("productive", 0) / total)
    assert (found["steps"]["productive"], found["steps"]["lost"]) == steps
    return found


def counts(found):
    """The counts of incidents, in the order of `goodput.COUNTED`."""
    return tuple(found[name] for name in goodput.COUNTED)


def first_process(startup=0.0):
    """A first process of 10 steps: 20 s of compiling, 9 s of steps with 1 s of waiting, 0.5 s of saving."""
    return Log().start().compiled(1, 20.0, startup).steps(2, 10, 9.0, waiting=1.0).saved(10, 0.5)


def test_small_clean_run():
    log = first_process(startup=3.0).steps(11, 20, 10.0).saved(20, 0.5).end(20, "finished", after=1.0)
    expected = {"productive": 18.0, "input": 1.0, "compiling": 20.0, "saving": 1.0, "startup": 3.0, "other": 1.0}
    assert counts(check(log.events, total=44.0, steps=(20, 0), **expected)) == (1, 0, 0, 0, 0, 0)


def test_small_killed_run_repeats_steps():
    """Steps 11 to 16 take 12 s and are lost. The next process repeats 12 to 16 in 5 s; step 11 is its compilation."""
    log = first_process().steps(11, 16, 12.0)
    log.start(after=7.0).restored(10, seconds=2.0, after=5.0).compiled(11, 4.0).steps(12, 16, 5.0).steps(17, 20, 4.0)
    log.end(20, "finished")
    seconds = {"productive": 8.0 + 5.0 + 4.0, "lost": 12.0, "input": 1.0, "compiling": 24.0, "saving": 0.5}
    found = check(log.events, total=66.5, steps=(20, 6), restoring=2.0, startup=3.0, down=7.0, **seconds)
    assert counts(found) == (2, 0, 1, 0, 0, 0)


def test_small_part_of_a_range_of_steps_is_lost():
    """Steps 5 to 10 take 2 s each, and those after 8 are lost. Waiting for input counts as such in lost steps too."""
    log = Log().start().compiled(1, 1.0).steps(2, 4, 3.0).steps(5, 10, 15.0, waiting=3.0)
    log.start().restored(8, seconds=0.0, after=0.0)
    check(log.events, total=19.0, steps=(8, 2), productive=3.0 + 8.0, lost=4.0, input=3.0, compiling=1.0)


def test_small_killed_before_the_first_checkpoint():
    """Nothing is restored, so all steps are repeated. A process that is killed before its first step loses nothing."""
    log = Log().start().compiled(1, 2.0).steps(2, 5, 4.0).start(after=1.0).add("start", 3.0, step=0)
    seconds = {"productive": 4.0, "compiling": 2.0, "down": 4.0}
    assert counts(check(log.events, total=10.0, steps=(5, 0), **seconds)) == (3, 0, 2, 0, 0, 0)
    log.compiled(1, 2.0).steps(2, 3, 2.0)
    seconds = {"productive": 2.0, "lost": 4.0, "compiling": 4.0, "down": 4.0}
    check(log.events, total=14.0, steps=(3, 5), **seconds)


def test_small_preempted_run():
    """It saves before it stops, so no step is lost. The next process fails, and the last one is still running."""
    log = first_process().steps(11, 12, 2.0).saved(12, 0.5).end(12, "preempted", after=0.5)
    log.start(after=60.0).restored(12, seconds=2.0, after=2.0).compiled(13, 4.0).steps(14, 20, 7.0)
    log.end(15, "failed: FloatingPointError").start(after=10.0)
    seconds = {"productive": 8.0 + 2.0 + 7.0, "input": 1.0, "compiling": 24.0, "saving": 1.0, "restoring": 2.0}
    found = check(log.events, total=115.5, steps=(20, 0), down=70.0, other=0.5, **seconds)
    assert counts(found) == (3, 1, 0, 1, 0, 0)


def test_small_processes_without_a_step():
    """One finds the run finished, and one fails early: all their time but restoring is start-up."""
    log = (
        first_process().end(10, "finished").start().restored(10, seconds=1.0, after=2.0).end(10, "finished", after=0.5)
    )
    log.start().end(0, "failed: UserError", after=4.0)
    expected = {"productive": 8.0, "input": 1.0, "compiling": 20.0, "saving": 0.5, "restoring": 1.0, "startup": 5.5}
    check(log.events, total=36.0, steps=(10, 0), **expected)


def test_small_rollback():
    """The second spike is in repeated steps. A skipped update that was rolled back does not count."""
    log = first_process().add("skipped", step=7).add("skipped", step=14).steps(11, 15, 5.0)
    log.add("rollback", 0.5, step=15, to=10).steps(11, 13, 6.0).add("rollback", 0.5, step=13, to=10)
    log.add("skipped", step=18).steps(11, 20, 10.0).end(20, "finished")
    seconds = {"productive": 18.0, "lost": 11.0, "input": 1.0, "compiling": 20.0, "saving": 0.5, "other": 1.0}
    assert counts(check(log.events, total=51.5, steps=(20, 8), **seconds)) == (1, 0, 0, 0, 2, 2)


def test_small_clocks_of_several_processes():
    """The log has no `clock`. The second machine's time is behind by more than the gap, and is set back later."""
    log = Log(clock=False).start().compiled(1, 20.0).steps(2, 10, 9.0, waiting=1.0).saved(10, 0.5).steps(11, 16, 6.0)
    log.start(after=-30.0).restored(10, seconds=1.0, after=1.0).compiled(11, 4.0).steps(12, 20, 9.0)
    log.now -= 20.0
    log.steps(21, 24, 4.0).end(24, "finished")
    expected = {"productive": 8.0 + 9.0 + 4.0, "lost": 6.0, "input": 1.0, "compiling": 24.0}
    check(log.events, total=35.5 + 18.0, steps=(24, 6), restoring=1.0, saving=0.5, **expected)


def test_small_clock_that_is_set_while_a_process_starts(tmp_path, capsys):
    """It is set a day forward before the first step and an hour back after it. Neither counts as time of the run."""
    log = Log().start().add("restored", 2.0, step=0, seconds=1.0).set_clock(86400).compiled(1, 20.0, startup=3.0)
    log.steps(2, 10, 9.0).set_clock(-3600).saved(10, 0.5).end(10, "finished", after=1.0)
    expected = {"productive": 9.0, "compiling": 20.0, "restoring": 1.0, "saving": 0.5, "startup": 4.0, "other": 1.0}
    found = check(log.events, total=35.5, steps=(10, 0), **expected)
    assert found["clock_set"] == [86400.0, -3600.0]
    goodput.report(write(tmp_path, lines(log.events)))
    last = capsys.readouterr().out.splitlines()[-1]
    assert (
        last
        == "the clock was set, or the machine was suspended (+86400 s, -3600 s): the durations above leave that out"
    )


def test_small_clock_differences_below_a_second_are_not_reported():
    log = Log().start()
    for step in range(1, 200, 2):
        log.set_clock(0.4).steps(step, step + 1, 1.0)
    assert goodput.goodput(log.events)["clock_set"] == []


def test_small_shares_add_up_despite_rounding():
    log = Log()
    for n in range(50):
        log.start(after=0.1).restored(7 * n, 0.3, after=0.7).compiled(7 * n + 1, 1.1)
        log.steps(7 * n + 2, 7 * n + 10, math.pi, waiting=0.1).saved(7 * n + 7, 1 / 3)
    found = goodput.goodput(log.events)
    assert sum(found["shares"].values()) == 1
    assert 0 <= found["seconds"]["other"] < 1e-9


def test_small_single_start():
    """A run without any time has shares too."""
    found = goodput.goodput(Log().start().events)
    assert (found["total"], found["goodput"], sum(found["shares"].values())) == (0, 0, 1)


def write(folder, text):
    (folder / "events.jsonl").write_text(text)
    return folder


def lines(events):
    return "".join(json.dumps(event) + "\n" for event in events)


def test_small_partial_lines(tmp_path):
    """A killed process leaves a partial line, at the end or before the next start, on its own line or not."""
    done, torn = lines(first_process().events), '{"event": "steps", "time": 12'
    assert goodput.read_run(write(tmp_path, done + torn)) == first_process().events
    again = Log().start(after=40.0).events
    for between in ("", "\n"):
        assert goodput.read_run(write(tmp_path, done + torn + between + lines(again))) == first_process().events + again
    failed = Log().start().end(0, 'failed: {"step": 3}').events
    assert goodput.read_run(write(tmp_path, torn + lines(failed) + "\0\0\n7\n")) == failed


def test_small_report(tmp_path, capsys):
    log = first_process().steps(11, 16, 12.0).start(after=7.0)
    goodput.report(write(tmp_path, lines(log.events)))
    text = capsys.readouterr().out
    assert text.splitlines()[0] == "goodput 41.2% of 0:00:48 from the first start to the last event"
    rows = {row[:40].strip(): row[40:].split() for row in text.splitlines()[3:-2]}
    assert rows["productive steps (16)"] == ["20.0", "41.2%"]
    assert rows["down"] == ["7.0", "14.4%"]
    assert len(rows) == len(goodput.KINDS)
    assert text.splitlines()[-1] == "2 processes, 0 preemptions, 1 kill, 0 failures, 0 rollbacks, 0 skipped updates"
    goodput.report(tmp_path, as_json=True)
    assert json.loads(capsys.readouterr().out) == goodput.goodput(log.events)


def test_small_report_without_a_run(tmp_path):
    with pytest.raises(UserError, match=r"events.jsonl does not exist: give the --workdir of a training run"):
        goodput.report(tmp_path)
    for text in ("", "\n", '{"event": "sta', '{"step": 1}\n'):
        with pytest.raises(UserError, match=r"events.jsonl has no start event: give the --workdir of a training run"):
            goodput.report(write(tmp_path, text))


def test_small_goodput_needs_no_jax():
    code = "import sys; import ivideo.training.goodput; assert not {'jax', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
