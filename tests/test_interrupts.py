"""Ctrl-C, SIGTERM and a lost ssh connection while sampling: one line is printed, and finished videos stay."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from deadlines import killed_after

from configs import base
from ivideo import stages
from ivideo.data import video_io
from ivideo.sampling import interrupts
from ivideo.weights import config_metadata, save_params

ROOT = pathlib.Path(__file__).parent.parent


def test_small_signals_raise_and_ignored_signals_stay_ignored():
    before = {s: signal.getsignal(s) for s in interrupts.SIGNALS}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with interrupts.raise_on_signal():
            os.kill(os.getpid(), signal.SIGHUP)
            assert interrupts.run_interruptibly(lambda: 5) == 5
            with pytest.raises(ZeroDivisionError):
                interrupts.run_interruptibly(lambda: 1 / 0)
            for number in (signal.SIGINT, signal.SIGTERM):
                with pytest.raises(interrupts.Interrupted) as caught:
                    interrupts.run_interruptibly(lambda: (os.kill(os.getpid(), number), time.sleep(5)))  # noqa: B023
                assert caught.value.number == number
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])
    assert {s: signal.getsignal(s) for s in interrupts.SIGNALS} == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_interrupted_command_prints_one_line(number, tmp_path):
    config = base.get_config("small")
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: (0.1 * rng.normal(size=p.shape)).astype(np.float32), stages.param_shapes(config))
    save_params(str(tmp_path / "base.safetensors"), params, metadata=config_metadata(config))
    (tmp_path / "prompts.txt").write_text("\n".join(f"star {n}" for n in range(500)))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "ivideo.main", "--config=configs/base.py:small", "--mode=sample"]
    command += [f"--weights={tmp_path}", f"--prompts_file={tmp_path}/prompts.txt", f"--out={out}"]
    command += ["--config.sample.batch=2"]
    env = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with killed_after(300, process):
        for _ in range(3):
            process.stdout.readline()
        process.send_signal(number)
        message = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    written = sorted(path.name for path in out.iterdir())
    assert 3 <= len(written) < 500
    done = f"ivideo: interrupted: {len(written)} of 500 videos are written"
    assert message == f"{done}; the same command with --resume makes the others\n"
    for name in written:
        assert video_io.count_frames(out / name) == 4
