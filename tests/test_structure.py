"""Rules of the code: imports go downward, configs are locked, and every config key is used."""

import ast
import contextlib
import functools
import graphlib
import pathlib
import re

import pytest

from configs import base, cascade, common
from ivideo.devices import sharding

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("no_garbage")
STAGES = cascade.STAGES
CONFIGS = [(stage, variant) for variant, sizes in common.CASCADE.items() for stage in sizes]

# Folders and the files beside them, lowest first. Each imports from lower levels and from its own folder, nothing else.
LEVELS = [
    {"diffusion", "errors", "demo", "modes", "values"},
    {"files"},
    {"devices", "prompts", "recipe"},
    {"data", "models"},
    {"weights"},
    {"text", "stages"},
    {"checks", "config_files"},
    {"training"},
    {"sampling"},
    {"evaluation", "planning", "serving"},
    {"arguments", "completion"},
    {"options"},
    {"main"},
]


def modules():
    """Every file of the package, with the name that `LEVELS` knows its folder or itself by."""
    for path in sorted((ROOT / "ivideo").rglob("*.py")):
        if path != ROOT / "ivideo" / "__init__.py":
            yield path.relative_to(ROOT / "ivideo").parts[0].removesuffix(".py"), path


def dotted(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path):
    """Full names of what a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def level(name):
    found = [i for i, names in enumerate(LEVELS) if name in names]
    assert len(found) == 1, f"ivideo/{name} has no place among the levels of {__file__}"
    return found[0]


def test_small_imports_go_downward():
    for name, path in modules():
        for imported in imports(path):
            parts = imported.split(".")
            if parts[0] == "ivideo" and parts[1] not in ("__version__", name):
                assert level(parts[1]) < level(name), (
                    f"{path.relative_to(ROOT)} imports {imported}, which is not below it"
                )


@pytest.mark.parametrize(
    ("folder", "line", "allowed"),
    [
        ("diffusion", "from ivideo import errors", False),  # of the same level
        ("diffusion", "from ivideo.models.unet import VideoUNet", False),
        ("models", "import ivideo.stages", False),
        ("training", "def late():\n    from ivideo.sampling import generate", False),
        ("training", "from ivideo import stages\nfrom ivideo.training import step", True),
        ("sampling", "from ivideo.diffusion import samplers", True),
    ],
)
def test_small_an_import_upward_is_refused(folder, line, allowed, tmp_path, monkeypatch):
    (tmp_path / "ivideo" / folder).mkdir(parents=True)
    (tmp_path / "ivideo" / folder / "new.py").write_text(line)
    monkeypatch.setattr("test_structure.ROOT", tmp_path)
    with contextlib.nullcontext() if allowed else pytest.raises(AssertionError, match="is not below it"):
        test_small_imports_go_downward()


def test_small_no_two_modules_need_each_other():
    files = {dotted(path): path for _, path in modules()}
    needs = {
        name: {i if i in files else i.rpartition(".")[0] for i in imports(path)} & files.keys() - {name}
        for name, path in files.items()
    }
    list(graphlib.TopologicalSorter(needs).static_order())  # CycleError names the circle


def test_small_the_maths_imports_only_arrays():
    """No flax, no config and no input or output in the paper's formulas; networks add flax."""
    arrays = {"jax", "numpy", "functools", "fractions", "math", "collections", "typing"}
    for name, path in modules():
        outside = {i.split(".")[0] for i in imports(path)} - {"ivideo"}
        if name == "diffusion":
            assert outside <= arrays, path
        if name == "models":
            assert outside <= {*arrays, "flax"}, path
    for path in (ROOT / "configs").glob("*.py"):
        assert {i.split(".")[0] for i in imports(path)} <= {"ml_collections", "configs"}, path


def test_small_a_reader_finds_everything_by_its_folder():
    """Each folder says what it holds; no file is too long to read."""
    for folder in {path.parent for _, path in modules()} - {ROOT / "ivideo"}:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder
    for path in [*ROOT.glob("*/*.py"), *ROOT.glob("*/*/*.py")]:
        if path.parts[len(ROOT.parts)] in ("ivideo", "configs", "launch"):
            assert len(path.read_text().splitlines()) <= 400, path


def test_small_only_main_reads_flags_and_only_sharding_names_axes():
    for name, path in modules():
        if name not in ("arguments", "completion", "main", "options"):
            assert "absl" not in {i.split(".")[0] for i in imports(path)}, path
        if dotted(path) != "ivideo.devices.sharding":
            assert "PartitionSpec" not in path.read_text(), path


def leaves(config, prefix=""):
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


@functools.cache
def dotted_names() -> str:
    """Every name with a dot in it that the package's files have, such as config.train.steps, one per line."""
    files = (path.read_text() for name, path in modules() if name != "checks")
    return "\n".join(sorted({name for text in files for name in re.findall(r"\w+(?:\.\w+)+", text)}))


@pytest.mark.parametrize(("stage", "variant"), CONFIGS)
def test_small_every_config_key_is_read(stage, variant):
    """A key that no line of the package mentions is a promise that nothing keeps."""
    source = dotted_names()
    # read as a whole: model's become the fields of VideoUNet, text's those of T5Encoder
    fields = set(re.findall(r"^    (\w+): ", (ROOT / "ivideo/models/unet.py").read_text(), re.M))
    sizes = set(re.search(r"SIZES = \((.*?)\)", (ROOT / "ivideo/text/__init__.py").read_text())[1].split('"'))
    unread = []
    for key in leaves(STAGES[stage].get_config(variant)):
        group, _, name = key.rpartition(".")
        if group == "model":
            read = name in fields and f"self.{name}" in (ROOT / "ivideo/models/unet.py").read_text()
        elif group == "text" and name in sizes:
            read = True
        elif group.endswith(".mesh"):
            read = name in sharding.AXES and f"config.{group}" in source
        else:
            read = re.search(
                rf"(config|text_config)\.{re.escape(key.removeprefix('text.'))}\b|\bt\.{name}\b", source
            ) or (re.search(rf"config\.{re.escape(key)}\b", source))
        if not read:
            unread.append(key)
    assert not unread


@pytest.mark.parametrize(("stage", "variant"), CONFIGS)
def test_small_configs_are_locked_and_valid(stage, variant):
    from ivideo import checks

    config = STAGES[stage].get_config(variant)
    assert (config.stage, config.variant) == (stage, variant)
    checks.check(config)
    with pytest.raises(AttributeError):
        config.train.batchsize = 1


def test_small_every_stage_file_is_tested():
    files = {p.stem for p in (ROOT / "configs").glob("*.py")} - {"__init__", "common", "common_machines", "cascade"}
    assert files == set(STAGES)


def test_small_default_variant_is_the_paper():
    assert base.get_config() == base.get_config("paper")
    with pytest.raises(ValueError, match="variant 'big' is unknown: choose from paper, demo, colab, small"):
        base.get_config("big")
