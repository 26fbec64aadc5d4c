"""A plain install brings everything that the package imports, including imports inside functions."""

import ast
import importlib
import importlib.metadata
import pathlib
import re
import sys

import pytest

from ivideo.errors import UserError
from ivideo.evaluation import distillation
from ivideo.planning import doctor

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("no_garbage")
# Optional modules; a message names the extra if one is missing
EXTRAS = {"apache_beam": "beam", "cv2": "metrics", "gradio": "serve", "matplotlib": "plot"}
PARTS = {"jaxlib": "jax", "pyarrow": "tensorflow-datasets"}  # packages that a declared one is never without
# What a declared package imports late without declaring it: (module that imports, what it imports, its distribution)
LATE = [("tensorboardX/summary.py", "PIL", "pillow"), ("tensorflow_datasets", "importlib_resources", None)]


def imported():
    """The top-level modules that the package imports, wherever in a file, by the files that do."""
    found = {}
    for path in sorted((ROOT / "ivideo").rglob("*.py")):
        source = path.read_text()
        names = set(re.findall(r"""import_module\(["'](\w+)""", source))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module)
        for name in names:
            found.setdefault(name.split(".")[0], []).append(path.name)
    return {name: files for name, files in found.items() if name not in sys.stdlib_module_names | {"ivideo", "configs"}}


def required():
    """Names of the packages that a plain install asks for."""
    source = (ROOT / "setup.py").read_text()
    listed = re.search(r"install_requires=\[(.*?)\n    \]", source, re.S)[1]
    return {normal(name) for name in re.findall(r'^\s*"([\w.-]+)', listed, re.M)}


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_small_every_import_is_declared():
    distributions = importlib.metadata.packages_distributions()
    for module, files in imported().items():
        if module in EXTRAS:
            continue
        package = PARTS.get(module) or normal(distributions[module][0])
        assert package in required(), f"{files} import {module}, and setup.py does not require {package}"
    assert {normal(package or module) for _, module, package in LATE} <= required()


def test_small_an_extra_that_is_missing_is_said_in_one_line(monkeypatch, capsys):
    """jax itself imports a TPU's compiler; mode compile names that extra."""
    assert {name for name in imported() if name in EXTRAS} == set(EXTRAS)
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    monkeypatch.delitem(sys.modules, "ivideo.text.beam", raising=False)
    with pytest.raises(UserError) as error:
        importlib.import_module("ivideo.text.beam")
    assert str(error.value) == "Apache Beam is not installed: run `pip install '.[beam]'` in the clone"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    distillation.draw([], "plot.png")
    expected = "plot.png is not drawn, because matplotlib is not installed: run `pip install '.[plot]'` in the clone\n"
    assert capsys.readouterr().out == expected


def test_small_doctor_knows_every_extra():
    """Those for tests alone apart."""
    extras = re.findall(r'^        "(\w+)": \[', (ROOT / "setup.py").read_text(), re.M)
    assert len(extras) == 8
    assert set(doctor.EXTRAS) == set(extras) - {"test", "reference"}
