"""launch/gke.sh: manifests of JobSets, which exit codes start again, and xpk."""

import re
import shlex
import signal
import subprocess

import pytest
from launch_scripts import LAUNCH, MANIFEST, RUN, XPK, fake, launch, printed


def test_small_manifest_of_a_jobset():
    yaml = pytest.importorskip("yaml")
    done = launch("gke.sh", "render", "ssr2", *MANIFEST, *RUN, 'a "quoted" word')
    found = yaml.safe_load(done.stdout)
    assert (found["kind"], found["metadata"]["name"]) == ("JobSet", "ssr2")
    assert found["spec"]["failurePolicy"]["maxRestarts"] == 50
    (rule,) = found["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert re.fullmatch("[A-Za-z][A-Za-z0-9_,:]*", rule["name"])  # what JobSet takes
    (job,) = found["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == 16
    (rule,) = spec["podFailurePolicy"]["rules"]
    codes = {"containerName": "ivideo", "operator": "In", "values": [1, 2, 130]}
    assert rule == {"action": "FailJob", "onExitCodes": codes}
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "8x8",
    }
    (container,) = pod["containers"]
    assert container["name"] == "ivideo"
    assert container["args"] == ["-m", "ivideo.main", "--distributed", *RUN[1:], 'a "quoted" word']
    assert container["resources"]["limits"] == {"google.com/tpu": 4}


def test_small_arguments_arrive_through_a_manifest():
    """Quotes, line breaks and what Kubernetes would take for a variable."""
    yaml = pytest.importorskip("yaml")
    words = ["--workdir=/mnt/a: b # c", 'a "b" \\n', "two\nlines\tand\r", "$(HOME) $HOME", "- é {x}", ""]
    done = launch("gke.sh", "render", "ssr2", *MANIFEST, "--", *words)
    assert done.returncode == 0, done.stderr
    pod = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    # as Kubernetes reads them
    assert [word.replace("$$", "$") for word in pod["containers"][0]["args"][3:]] == words
    assert pod["containers"][0]["args"][-3] == "$$(HOME) $HOME"
    done = launch("gke.sh", "render", "ssr2", *MANIFEST, "--", "a\x1bb")
    assert (done.returncode, done.stdout) == (2, "")
    assert "contains a control character" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("accelerator", "topology", "hosts", "chips"),
    [
        ("tpu-v6e-slice", "8x8", 16, 4),
        ("tpu-v6e-slice", "2x4", 1, 8),
        ("tpu-v5-lite-podslice", "1x1", 1, 1),
        ("tpu-v5p-slice", "4x4x8", 32, 4),
        ("tpu7x", "2x2x1", 1, 4),
    ],
)
def test_small_slices_that_there_are(accelerator, topology, hosts, chips):
    options = [f"--accelerator={accelerator}", f"--topology={topology}", f"--hosts={hosts}", f"--chips={chips}"]
    done = launch("gke.sh", "render", "a", "--image=i", *options, *RUN)
    assert done.returncode == 0, done.stderr


def test_small_codes_that_are_started_again_are_those_of_the_program():
    """134 is SIGABRT, by which jax ends a process whose run has lost another."""
    from ivideo.devices import hosts
    from ivideo.training import guards

    def codes(test):
        script = f'. {LAUNCH}/lib.sh; for code in $(seq 0 255); do ! {test} "$code" || echo "$code"; done'
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        return {int(code) for code in done.stdout.split()}

    wanted = {guards.PREEMPTED, guards.HUNG, hosts.LOST, 128 + signal.SIGABRT}
    assert codes("is_resumable") == wanted
    assert codes("is_final") == {code for code in range(256) if hosts.is_final(code)}
    (command,) = printed("gke.sh", "xpk", "a", "--image=i", *XPK, *RUN)
    assert f"--restart-on-exit-codes={','.join(str(code) for code in sorted(wanted))}" in command


def test_small_apply_hands_the_manifest_to_kubectl(tmp_path):
    env = fake(tmp_path, "kubectl", f'cat > "{tmp_path}/manifest"')
    assert launch("gke.sh", "apply", "ssr2", *MANIFEST, *RUN, env=env).returncode == 0
    assert (tmp_path / "kubectl.log").read_text() == "apply -f -\n"
    assert (tmp_path / "manifest").read_text() == launch("gke.sh", "render", "ssr2", *MANIFEST, *RUN).stdout


def test_small_xpk():
    (command,) = printed("gke.sh", "xpk", "ssr2", "--image=i", *XPK, *RUN)
    assert command[:4] == ["xpk", "workload", "create", "--workload=ssr2"]
    assert {"--cluster=c", "--zone=z", "--tpu-type=v6e-64", "--docker-image=i", "--max-restarts=50"} < set(command)
    assert shlex.split(command[-1])[-1] == "--workdir=/mnt/runs/a b"
