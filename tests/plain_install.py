"""Runs every mode once in an environment made by `pip install .`, from an empty folder outside the clone.

python tests/plain_install.py [--python=PYTHON]

Extras, such as pytest, would hide missing dependencies of a plain install. PYTHON is from an environment that has the
package already; without it, the script makes one. Exit code 0 if every command succeeds, otherwise 1.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import venv

import light_network
import quick_compiles

ROOT = pathlib.Path(__file__).resolve().parent.parent
SMALL = "--config=configs/base.py:small"
RUN = [SMALL, "--workdir=run", "--config.train.checkpoint_every=2", "--config.train.sample_every=2"]
PREPARE = """
from ivideo.data.shapes_set import prepare_shapes
import os
os.symlink(prepare_shapes("prepared", num_train=8, num_held_out=2, frames=16, height=16, width=16), "clips")
"""
CLIPS = ["--config.data.source=tfds", "--config.data.dir=clips", "--config.data.workers=1"]
# (name, arguments, exit code, what is said); all of ivideo.main but where they begin with -c
COMMANDS = [
    ("train", [*RUN, "--config.train.steps=4"], 0, "step 4/4"),
    ("resume", [*RUN, "--config.train.steps=6"], 0, "going on from step 4"),
    ("goodput", [SMALL, "--mode=goodput", "--workdir=run"], 0, "goodput"),
    ("sample", [SMALL, "--mode=sample", "--workdir=run", "--prompt=a red star", "--out=star.mp4"], 0, ""),
    ("sample a gif", [SMALL, "--mode=sample", "--workdir=run", "--prompt=a red star", "--out=star.gif"], 0, ""),
    ("evaluate", [SMALL, "--mode=evaluate", "--workdir=run", "--clips=2"], 0, "held-out"),
    ("export", [SMALL, "--mode=export", "--workdir=run", "--out=base.safetensors"], 0, ""),
    ("describe", [SMALL, "--mode=describe"], 0, "base"),
    ("benchmark", [SMALL, "--mode=benchmark"], 0, "training step"),
    ("encode_text", [SMALL, "--mode=encode_text", "--captions=captions.txt", "--out=texts"], 0, ""),
    ("check_data", [SMALL, "--mode=check_data", "--config.data.num_clips=20"], 0, "20 clips read"),
    ("prepare a set", ["-c", PREPARE], 0, ""),
    ("check_data of a set", [SMALL, "--mode=check_data", *CLIPS], 0, "8 clips read, 0 of them unreadable"),
    ("train on a set", [SMALL, *CLIPS, "--workdir=other", "--config.train.steps=2"], 0, "step 2/2"),
    ("compile", [SMALL, "--mode=compile", "--topology=v5e:4x4"], 2, "pip install '.[tpu]'"),
    ("beam", [SMALL, "--mode=encode_text", "--beam=--runner=DirectRunner", "--captions=captions.txt", "--out=beam"], 2,
     "pip install '.[beam]'"),
    ("serve", [SMALL, "--mode=serve"], 2, "pip install '.[serve]'"),
]  # fmt: skip
# Not train_text: it has no small variant, and imports nothing that the others do not


def main() -> int:
    """Makes the environment and runs the commands. Prints one line per command, and the output of failed ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", help="of an environment where the package is installed")
    python, failed = parser.parse_args().python, 0
    with tempfile.TemporaryDirectory(prefix="ivideo_plain_") as folder:
        if python is None:
            venv.create(os.path.join(folder, "environment"), with_pip=True)
            python = os.path.join(folder, "environment", "bin", "python")
            subprocess.run([python, "-m", "pip", "install", "--quiet", str(ROOT)], check=True)
        home = os.path.join(folder, "home")
        os.mkdir(home)
        pathlib.Path(home, "captions.txt").write_text("a red star moving right on a teal background\n")
        version = "from importlib import metadata; print(metadata.version('jaxlib'))"
        found = subprocess.run([python, "-c", version], check=True, capture_output=True, text=True)
        flags = quick_compiles.flags(found.stdout)
        for name, arguments, code, said in COMMANDS:
            began = time.monotonic()
            problem = run(python, home, flags, arguments, code, said)
            failed += bool(problem)
            print(f"{'failed' if problem else 'ok':7}{time.monotonic() - began:6.1f} s  {name}", flush=True)
            if problem:
                print(problem, flush=True)
    return int(failed > 0)


def run(python, home, flags, arguments, code, said) -> str:
    """What a command did wrong, or ''."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    env |= {"JAX_PLATFORMS": "cpu", "HOME": home, "XLA_FLAGS": flags}
    command = [python, *([] if arguments[0] == "-c" else ["-m", "ivideo.main"]), *arguments]
    command += light_network.ARGUMENTS if SMALL in arguments else []
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=900)
    output = done.stdout + done.stderr
    problems = [f"exit code {done.returncode}, expected {code}"] if done.returncode != code else []
    problems += [f"it does not say {said!r}"] if said not in output else []
    # A report that cannot be written is a warning, and a traceback may be one of a thread
    problems += [f"it says {text!r}" for text in ("cannot be written", "Traceback") if text in output]
    lines = [line for line in done.stderr.splitlines() if "using the package's own file" not in line]
    problems += ["it says more than a line"] if code and len(lines) > 1 else []
    return "\n".join([*problems, output]) if problems else ""


if __name__ == "__main__":
    sys.exit(main())
