"""Several processes on this machine train and measure together: they have the numbers of one, and survive failures."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import light_network
import network_files
import numpy as np
import pytest

from configs import base
from ivideo import stages
from ivideo.data import shapes, video_io
from ivideo.devices import hosts
from ivideo.weights import config_metadata, save_params

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 20
RUN = [
    "--config=configs/base.py:small",
    f"--config.train.steps={STEPS}",
    "--config.train.checkpoint_every=5",
    "--config.train.learning_rate=3e-3",
    "--config.train.mesh.data=1",
    "--config.train.mesh.fsdp=-1",
    *light_network.ARGUMENTS,
]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(workdir, count: int, *arguments) -> list[subprocess.Popen]:
    """Starts a training run in `count` processes with four devices in total."""
    return start_main(workdir, count, [*RUN, f"--workdir={workdir}", *arguments])


def start_main(log_name, count: int, arguments) -> list[subprocess.Popen]:
    """Starts a command in `count` processes with four devices in total. Process i writes to LOG_NAME.i.log."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={4 // count}")
    env = {**os.environ, "XLA_FLAGS": flags, "PYTHONFAULTHANDLER": "1"}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)  # a process that finds a program in it does not wait for the others
    command = [sys.executable, "-m", "ivideo.main", *arguments]
    address = f"127.0.0.1:{free_port()}"
    processes = []
    for i in range(count):
        several = [f"--coordinator={address}", f"--num_processes={count}", f"--process_id={i}"] if count > 1 else []
        with open(f"{log_name}.{i}.log", "a") as log:
            processes.append(subprocess.Popen([*command, *several], cwd=ROOT, env=env, stderr=log, stdout=log))
    return processes


def wait(processes, seconds=300) -> list[int]:
    """The exit codes of all processes. Those that do not end in time print their stacks to their logs, and end."""
    deadline = time.time() + seconds
    try:
        return [process.wait(max(0.1, deadline - time.time())) for process in processes]
    except subprocess.TimeoutExpired:
        for process in processes:
            process.send_signal(signal.SIGABRT)
        return [process.wait(30) for process in processes]  # the tests then fail with the logs
    finally:
        for process in processes:
            process.kill()


def losses(workdir) -> dict[int, float]:
    """The loss of each step. Of a step that was done twice, the second one."""
    lines = (json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines}


def logs(workdir, count) -> list[str]:
    return [pathlib.Path(f"{workdir}.{i}.log").read_text() for i in range(count)]


def until_step(workdir, step, processes, seconds=300):
    deadline = time.time() + seconds
    metrics = workdir / "metrics.jsonl"
    while not metrics.exists() or len(losses(workdir)) < step:
        assert time.time() < deadline and all(p.poll() is None for p in processes), logs(workdir, len(processes))
        time.sleep(0.01)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The losses of a run of one process with four devices."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    assert wait(start(workdir, 1)) == [0], logs(workdir, 1)
    found = losses(workdir)
    assert sorted(found) == list(range(1, STEPS + 1))
    return found


def assert_same(found, wanted):
    assert sorted(found) == sorted(wanted)
    np.testing.assert_allclose([found[s] for s in wanted], [wanted[s] for s in wanted], rtol=1e-5)


@pytest.mark.parametrize("count", [2])
def test_if_a_process_dies_the_others_exit_and_the_run_continues(one, tmp_path, count):
    """They exit within a minute and say what to do. Started again, the run ends as if nothing had happened."""
    workdir = tmp_path / "run"
    processes = start(workdir, count)
    until_step(workdir, 7, processes)
    processes[-1].kill()
    began = time.time()
    *codes, killed = wait(processes, 60)
    assert time.time() - began < 60
    assert killed == -signal.SIGKILL
    for code, text in zip(codes, logs(workdir, count), strict=False):
        ours = code == 77 and "another process went away" in text and "same command continues" in text
        # jax may notice first, and then it ends the process
        assert ours or (code == -signal.SIGABRT and "another task died" in text), (code, text)

    processes = start(workdir, count)
    assert wait(processes) == [0] * count, logs(workdir, count)
    first, *others = logs(workdir, count)
    assert "going on from step 5" in first
    assert f"step {STEPS}/{STEPS}" in first
    assert not any(f"/{STEPS}" in text for text in others)  # only the first process prints the progress
    assert_same(losses(workdir), one)


@pytest.mark.parametrize("count", [4])
def test_four_processes(one, tmp_path, count):
    """The same with four processes, which takes minutes on two cores."""
    test_if_a_process_dies_the_others_exit_and_the_run_continues(one, tmp_path, count)


def test_signal_to_one_process_stops_all_of_them(one, tmp_path):
    """After SIGTERM to the second of two, both save the same step and exit with 75. One process continues the run."""
    workdir = tmp_path / "two"
    processes = start(workdir, 2)
    until_step(workdir, 2, processes)  # early: jax looks for a notice once a second
    processes[1].terminate()
    assert wait(processes) == [75, 75], logs(workdir, 2)
    assert wait(start(workdir, 1)) == [0], logs(workdir, 1)
    assert_same(losses(workdir), one)


SHUFFLED = """
import sys
import jax
from configs import base
from ivideo.devices import hosts, joining
from ivideo.training import loop
address, process, workdir, options = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4:]
joining.join(address, 2, process)
config = base.get_config("small")
config.update_from_flattened_dict({name: eval(value) for name, _, value in (o.partition("=") for o in options)})
with hosts.exiting_together():
    loop.train(config, workdir, devices=[jax.devices()[i] for i in (3, 0, 2, 1)])
"""


def test_two_processes_measure_quality_together(tmp_path):
    """Each reads and measures a part of the files, and both make the samples; the numbers are those of one process."""
    i3d = network_files.write_safetensors(tmp_path / "i3d.safetensors", network_files.i3d_pytorch())
    (tmp_path / "real").mkdir()
    for n, attributes in enumerate(shapes.TRAIN[::90]):  # 5 clips: of the last part of 2, one process has no clip
        video = shapes.render(attributes, n, frames=9, height=16, width=16)
        video_io.write_video(tmp_path / "real" / f"{n}.mp4", video, fps=3)
    config = base.get_config("small")
    config.update_from_flattened_dict({**light_network.OPTIONS, "video.frames": 9})
    params = jax.tree.map(
        lambda p: np.random.default_rng(0).normal(size=p.shape).astype(np.float32) / 10, stages.param_shapes(config)
    )
    weights = str(tmp_path / "base.safetensors")
    save_params(weights, params, metadata=config_metadata(config), dtype=np.float32)
    (tmp_path / "prompts.txt").write_text("a red circle moving right on a black background\n")
    options = {"i3d": i3d, "frames": 9, "size": 32, "batch": 2, "clips": 5, "replicates": 10}
    command = ["--config=configs/base.py:small", *light_network.ARGUMENTS, "--mode=evaluate", f"--weights={weights}"]
    command += ["--config.video.frames=9", "--config.sample.batch=4"]
    command += [f"--reference={tmp_path}/real", f"--prompts_file={tmp_path}/prompts.txt"]
    command += [f"--config.evaluate.{key}={value}" for key, value in options.items()]
    found = []
    for count in (1, 2):
        out = tmp_path / f"out_{count}"
        assert wait(start_main(out, count, [*command, f"--out={out}"])) == [0] * count, logs(out, count)
        found.append(json.loads((out / "results.json").read_text()))
        assert len(list((out / "parts").rglob("*.mp4"))) == 10
    one, two = ({name: row["value"] for name, row in result["measures"].items()} for result in found)
    assert one.keys() >= {"FVD", "drift"} and one["FVD"] > 1
    assert two == pytest.approx(one, rel=1e-4)
    parts = [sorted((tmp_path / f"out_{count}" / "parts").rglob("*.npz")) for count in (1, 2)]
    assert len(parts[0]) == 6
    for path, other in zip(*parts, strict=True):
        with np.load(path) as first, np.load(other) as second:
            assert first.files == second.files
            for name in set(first.files) - {"key"}:
                assert first[name].dtype == second[name].dtype
                np.testing.assert_allclose(second[name], first[name], rtol=0, atol=1e-3, err_msg=f"{path} {name}")


def start_shuffled(workdirs) -> list[subprocess.Popen]:
    """Starts two processes with two devices each. As on a torus, neither has consecutive parts of a batch."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    env = {**os.environ, "XLA_FLAGS": flags}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    values = [option.removeprefix("--config.") for option in RUN[1:]]
    address, processes = f"127.0.0.1:{free_port()}", []
    for i, workdir in enumerate(workdirs):
        command = [sys.executable, "-c", SHUFFLED, address, str(i), str(workdir)]
        with open(f"{workdir}.{i}.log", "a") as log:
            processes.append(subprocess.Popen([*command, *values], cwd=ROOT, env=env, stderr=log, stdout=log))
    return processes


def test_processes_whose_parts_are_not_consecutive(one, tmp_path):
    workdir = tmp_path / "run"
    assert wait(start_shuffled([workdir, workdir])) == [0, 0], logs(workdir, 2)
    assert_same(losses(workdir), one)


def test_folders_that_are_not_shared_are_refused(tmp_path):
    """Each process has its own folder, as on machines without shared storage."""
    workdirs = [tmp_path / "a", tmp_path / "b"]
    assert wait(start_shuffled(workdirs), 100) == [2, 2]
    for i, workdir in enumerate(workdirs):
        text = pathlib.Path(f"{workdir}.{i}.log").read_text()
        assert "is not the same folder for all processes: 1 of 2 do not see the files of process 0, the first" in text
    assert not any(workdir.exists() for workdir in workdirs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--coordinator=127.0.0.1:1"], "--num_processes and --process_id missing"),
        (["--coordinator=here", "--num_processes=2", "--process_id=1"], "--coordinator=here: expected HOST:PORT"),
        (["--coordinator=h:65536", "--num_processes=2", "--process_id=1"], "with a port from 1 to 65535"),
        (["--coordinator=127.0.0.1:1", "--num_processes=2", "--process_id=2"], "expected 0 to 1"),
    ],
)
def test_small_wrong_process_flags_are_one_line(arguments, message, tmp_path):
    command = [sys.executable, "-m", "ivideo.main", *RUN, f"--workdir={tmp_path}/run", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def other_code(tmp_path) -> str:
    """A copy of the package in which one file has one more line."""
    shutil.copytree(ROOT / "ivideo", tmp_path / "other" / "ivideo", ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "other" / "ivideo" / "training" / "step.py", "a") as f:
        f.write("# changed\n")
    return str(tmp_path / "other")


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--config.seed=1", "config.seed is 1 on process 1"),
        ("--config.train.learning_rate=0.1", "config.train.learning_rate is 0.1 on process 1"),
        ("--config.train.batch_size=16", "config.train.batch_size is 16 on process 1"),
        ("--config.train.steps=21", "config.train.steps is 21 on process 1"),
        ("--config.train.checkpoint_every=6", "config.train.checkpoint_every is 6 on process 1"),
        ("--config.data.text_cache=/none", "config.data.text_cache is '/none' on process 1"),
        ("--config.data.dir=/none", "config.data.dir is '/none' on process 1"),
        ("--profile_steps=1,2", "--profile_steps is 1,2 on process 1"),
        ("other code", "the code of ivideo/training/step.py is "),
    ],
)
def test_processes_that_differ_all_name_the_difference(tmp_path, argument, said):
    """They do so before anything is compiled or written."""
    workdir, address, processes = tmp_path / "run", f"127.0.0.1:{free_port()}", []
    for i in range(2):
        several = [f"--coordinator={address}", "--num_processes=2", f"--process_id={i}"]
        command = [sys.executable, "-m", "ivideo.main", *RUN, f"--workdir={workdir}", *several]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        if i == 1 and argument == "other code":
            env["PYTHONPATH"] = other_code(tmp_path) + os.pathsep + env["PYTHONPATH"]
        elif i == 1:
            command.append(argument)
        with open(f"{workdir}.{i}.log", "w") as log:  # not in the checkout, whose code would be found first
            command[3] = f"--config={ROOT}/configs/base.py:small"
            processes.append(subprocess.Popen(command, cwd=tmp_path, env=env, stderr=log, stdout=log))
    assert wait(processes, 100) == [2, 2]
    for text in logs(workdir, 2):
        assert said in text and "on process 0 (" in text, text
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("fails", "way", "code", "said"),
    [
        (1, "user_error", 2, "wrong input"),
        (0, "user_error", 2, "wrong input"),
        (1, "caption", 2, "has no embedding of 'a cat'"),
        (1, "clip", 2, "a clip of 8 bytes"),
        (1, "bug", 1, "KeyError: 'a bug'"),
        (1, "device_memory", 1, "RESOURCE_EXHAUSTED"),
        (1, "host_memory", 1, "MemoryError: Unable to allocate 1 GiB"),
        (1, "disk", 2, "No space left on device"),
        (1, "non_finite", 2, "loss is nan at step 4"),
        (1, "worker", 75, "the same command"),
        (0, "worker", 75, "the same command"),
        (1, "terminate", 75, "the same command"),
    ],
)
def test_error_in_one_process_ends_all_of_them_with_its_exit_code(tmp_path, fails, way, code, said):
    """All processes print its message, long before a step counts as hung. A failure that would repeat is final."""
    processes, address, workdir = [], f"127.0.0.1:{free_port()}", tmp_path / "run"
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    # Python adds the script's folder to the path, not this one
    env = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    program = [sys.executable, str(ROOT / "tests" / "failing_process.py"), address]
    for i in range(2):
        with open(f"{workdir}.{i}.log", "w") as log:
            command = [*program, str(i), str(workdir), way, str(fails)]
            processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stderr=log, stdout=log))
    assert wait(processes) == [code, code], logs(workdir, 2)
    for i, text in enumerate(logs(workdir, 2)):
        assert said in text, text
        assert (f"process {fails} (" in text) == (i != fails and code != 75), text
    assert hosts.is_final(code) == (code in (1, 2))
