"""The command line finds a config, reads paths and prints help, in any folder and for any kind of installation."""

import importlib.util
import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest
from absl import flags

from ivideo import arguments, checks, config_files, files, main, options
from ivideo.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
SMALL = "configs/base.py:small"


@pytest.fixture
def folder(tmp_path, monkeypatch, command_line):
    """An empty folder as the current one; flags and what a config imports are afterwards as before."""
    for name in ("configs", *(f"configs.{path.stem}" for path in (ROOT / "configs").glob("*.py"))):
        if name in sys.modules:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parsed(*args):
    arguments.parse(["ivideo", *args])
    return flags.FLAGS.config


@pytest.mark.parametrize(
    "args",
    [
        [f"--config={SMALL}", "--config.train.steps=1000"],
        ["--config", SMALL, "--config.train.steps=1e3"],
        [f"-config={SMALL}", "-config.train.steps", "1000"],
        ["-config", SMALL, "--config.train.steps=1_000"],
        ["--config.train.steps=1000", f"--config={SMALL}"],
        ["--config=configs/ssr1.py", f"--config={SMALL}", "--config.train.steps=1000"],
        [f"--config={SMALL}", f"--config={SMALL}", "--config.train.steps=1000"],
    ],
)
def test_small_every_way_to_name_a_config(folder, args, caplog):
    config = parsed(*args)
    assert (config.stage, config.variant, config.train.steps) == ("base", "small", 1000)
    assert ("using the last one, configs/base.py:small" in caplog.text) == ("ssr1" in args[0])


def test_small_the_packages_own_config_where_there_is_none(folder, caplog):
    with caplog.at_level(logging.INFO, "ivideo"):
        assert config_files.load_config("configs/tsr1.py:small").stage == "tsr1"
    assert f"configs/tsr1.py does not exist here: using the package's own file, {ROOT}/configs/tsr1.py" in caplog.text
    (folder / "configs").mkdir()
    (folder / "configs" / "tsr1.py").write_text((ROOT / "configs" / "tsr1.py").read_text().replace("2000", "7"))
    caplog.clear()
    assert config_files.load_config("configs/tsr1.py:demo").train.steps == 7  # one's own goes before it
    assert not caplog.text


def test_small_a_copied_config_finds_its_neighbours(folder):
    copy = folder / "10:30" / "mine.py"  # a colon in the path is not of the variant
    copy.parent.mkdir()
    shutil.copy(ROOT / "configs" / "base.py", copy)
    assert config_files.load_config("10:30/mine.py:small").seed == 0  # of the package's common.py
    common = (ROOT / "configs" / "common.py").read_text()
    copy.with_name("common.py").write_text(common.replace("config.seed = 0", "config.seed = 7"))
    sys.modules.pop("configs.common")
    assert config_files.load_config(f"{copy}:small").seed == 7
    assert config_files.load_config(f"{copy}").variant == "paper"


def test_small_a_config_is_read_as_it_is_now(folder):
    """Of the same size and second as before, as scripts write them for a sweep."""
    for steps in (10, 20):
        (folder / "sweep.py").write_text(
            "from configs import base\n"
            f'def get_config(): config = base.get_config("small"); config.train.steps = {steps}; return config'
        )
        os.utime("sweep.py", (1e9, 1e9))
        assert config_files.load_config("sweep.py").train.steps == steps


def test_small_a_linked_config_finds_the_neighbours_of_its_target(folder):
    (folder / "there").mkdir()
    for name in ("base.py", "common.py"):
        text = (ROOT / "configs" / name).read_text().replace("config.seed = 0", "config.seed = 7")
        (folder / "there" / name).write_text(text)
    (folder / "here.py").symlink_to(folder / "there" / "base.py")
    assert config_files.load_config("here.py:small").seed == 7


BROKEN = {
    "no_file": ('def get_config():\n  open("/none")', "FileNotFoundError: [Errno 2] No such file or directory: "),
    "syntax": ("x = 1\ndef get_config(:", "invalid syntax"),
    "import": ("\nimport nothing_like_it", "ModuleNotFoundError: No module named 'nothing_like_it'"),
    "key": ('def get_config():\n  return {}["a"]', "KeyError: 'a'"),
    "name": ("def get_config():\n  return nothing", "NameError: name 'nothing' is not defined"),
    "locked": (
        'from configs import base\ndef get_config(): c = base.get_config("small"); c.train.stepps = 3',
        "Key \"stepps\" does not exist and cannot be added since the config is locked",
    ),
    "user": ('def get_config():\n  raise ValueError("too\\n  large")', "too large"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_small_an_error_inside_of_a_config_is_its_reason(folder, name):
    text, reason = BROKEN[name]
    (folder / "x.py").write_text(text)
    with pytest.raises(UserError) as e:
        config_files.load_config("x.py")
    assert str(e.value).startswith("--config=x.py: ") and reason in str(e.value)
    assert str(e.value).endswith(f"({folder}/x.py, line 2)") and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--config"], "--config has no value: give a config file"),
        (["--config="], "--config has no value"),
        (["--config=configs/none.py"], "no config at 'configs/none.py': give a config file, .* has base.py"),
        (["--config=."], r"\. is a folder: give a config file"),
        (["--config=~nobody-1/x.py"], "~nobody-1 has no home folder; write ./~nobody-1/x.py"),
        (["--config=configs/common.py"], r"it has no get_config\(\)"),
        (["--config=configs/base.py:huge"], "variant 'huge' is unknown: choose from paper, demo, colab, small"),
        (["--config=dict.py"], r"get_config\(\) returned dict, expected an ml_collections.ConfigDict"),
        (["--config=dict.py:x"], r"get_config\(\) takes 0 positional arguments but 1 was given"),
        (["--config.train.steps=3"], "--config.train.steps is set, but there is no --config"),
        ([f"--config={SMALL}", "--config.train.step=3"], r"no key train.step \(--config.train.step\): similar keys"),
        ([f"--config={SMALL}", "--noconfig.train.cosine"], r"no key train.cosine"),
        ([f"--config={SMALL}", "--config.sample.guidance.weight=3"], "no key sample.guidance.weight .* sample.weight"),
        (["--config=configs/cascade.py:small", "--config.stages.ssr1.sample.step=3"], "keys are stages.ssr1.sample"),
        ([f"--config={SMALL}", "--config.train.steps=2.5e0"], "--config.train.steps=2.5e0: expected a whole number"),
        ([f"--config={SMALL}", "--config.train.steps=many"], "--config.train.steps=many: expected a whole number"),
        ([f"--config={SMALL}", "--config.sample=3"], "--config.sample=3: .* not a dict"),
        (["--out=~nobody-1/x.mp4"], "~nobody-1 has no home folder"),
        (["--flagfile=none.txt"], "none.txt"),
        (["--seed=18446744073709551616"], "--seed=18446744073709551616"),
    ],
)  # fmt: skip
def test_small_mistakes_in_arguments_are_one_line(folder, args, said):
    (folder / "dict.py").write_text("def get_config(): return {}")
    with pytest.raises(UserError, match=said) as e:
        parsed(*args)
    assert "\n" not in str(e.value)


def test_small_home_is_expanded_in_every_path(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    own = [flag.name for flag in options.own()]
    paths = {name for name in own if flags.FLAGS[name].parser is arguments.PATH}
    texts = {name for name in own if flags.FLAGS[name].flag_type() == "string"}
    assert {"workdir", "out", "input", "prompts_file", "captions", "compile_cache"} <= paths
    assert texts <= {
        "config",
        "prompt",
        "from_stage",
        "to_stage",
        "topology",
        "profile_steps",
        "coordinator",
        "what",
        "video_filter",
    }
    shutil.copy(ROOT / "configs" / "base.py", folder / "mine.py")
    keys = ("text.checkpoint", "text.tokenizer", "data.dir", "data.image_dir", "data.text_cache", "train.start")
    keys += ("evaluate.i3d", "evaluate.inception", "evaluate.clip")
    groups = {group: inside for group, inside in checks.KEYS.items() if isinstance(inside, dict)}
    found = {f"{group}.{key}" for group in groups for key, kind in groups[group].items() if kind in checks.PATHS}
    assert found == set(keys)
    given = [*(f"--{name}=~/x" for name in paths), *(f"--config.{key}=~/y/z" for key in keys)]
    config = parsed("--config=~/mine.py:small", *given)
    checks.expand_home(config)
    assert {getattr(flags.FLAGS, name) for name in paths} == {f"{folder}/x"}
    assert {config[group][key] for group, key in (name.split(".") for name in keys)} == {f"{folder}/y/z"}
    config.data.dir = "~/a:3,/b:1,~/c:2"
    checks.expand_home(config)
    assert config.data.dir == f"{folder}/a:3,/b:1,{folder}/c:2"
    for path in ("", "gs://bucket/~", "a/~", "./~x"):
        assert files.expand_home(path) == path


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpshort", "--helpfull", "--helpxml"])
def test_small_help_is_not_an_error(folder, flag, capsys):
    with pytest.raises(SystemExit) as e:
        main.main(["ivideo", flag, "--config=configs/none.py"])
    assert e.value.code == 0
    said = capsys.readouterr()
    assert "help" in said.out and not said.err


def test_small_arguments_alone_are_checked(folder, monkeypatch, capsys):
    """absl's --only_check_args is in --helpfull: a run must not begin."""
    monkeypatch.setattr(main, "_set_compilation_cache", lambda several: None)
    monkeypatch.setattr("ivideo.training.loop.train", lambda *_, **__: pytest.fail("a run began"))
    args = ["ivideo", f"--config={SMALL}", "--only_check_args", f"--workdir={folder / 'w'}"]
    assert main.main(args) == 0
    assert main.main([*args, "--config.train.steps=0"]) == 2
    assert "config.train.steps = 0: expected a whole number, 1 or more" in capsys.readouterr().err
    assert not list(folder.iterdir())


def test_small_a_user_without_a_home_gets_no_folder_of_that_name(folder, monkeypatch):
    """As in a container that runs as a user of its own: compiled programs are then not kept."""
    flags.FLAGS["mode"].value, flags.FLAGS["compile_cache"].value = "train", None
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os.path, "expanduser", lambda path: path)
            main._set_compilation_cache(several=False)
        assert jax.config.jax_compilation_cache_dir is None
        monkeypatch.setenv("HOME", str(folder))
        main._set_compilation_cache(several=False)
        assert jax.config.jax_compilation_cache_dir == f"{folder}/.cache/ivideo"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="pip's build needs setuptools")
def test_installed_package_has_its_configs(tmp_path):
    """From another folder, with nothing of the clone in sight."""
    lib, elsewhere = tmp_path / "lib", tmp_path / "elsewhere"
    elsewhere.mkdir()
    build = ["build", f"--build-base={tmp_path / 'build'}", f"--build-lib={lib}"]
    subprocess.run([sys.executable, "setup.py", "-q", *build], cwd=ROOT, check=True, capture_output=True)
    packed = {path.name for path in (lib / "ivideo" / "configs").glob("*.py")}
    assert packed == {path.name for path in (ROOT / "configs").glob("*.py")}
    shutil.copy(lib / "ivideo" / "configs" / "ssr1.py", elsewhere / "copied.py")
    program = """
import sys
from ivideo import config_files, main
names = ("configs/base.py", "configs/cascade.py", "copied.py")
print([config_files.load_config(f"{name}:small").stage for name in names])
sys.exit(main.main(["ivideo", "--config", "configs/tsr1.py:small", "--mode=describe", "--json"]))
"""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(lib)}
    done = subprocess.run([sys.executable, "-c", program], cwd=elsewhere, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    stages, _, described = done.stdout.partition("\n")
    assert stages == "['base', 'cascade', 'ssr1']"
    assert json.loads(described)["stage"] == "tsr1"
    assert f"using the package's own file, {lib}/ivideo/configs/tsr1.py" in done.stderr


def test_output_that_nobody_reads_is_no_error():
    command = [sys.executable, "-m", "ivideo.main", f"--config={SMALL}", "--mode=describe"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    run = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.close()
    assert run.stderr.read() == b"" and run.wait() == 141
