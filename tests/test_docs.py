"""README and docs: their links, names, flags, config keys and commands exist."""

import ast
import importlib
import pathlib
import re
import shlex

import pytest

from ivideo import config_files, modes, options

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("no_garbage")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
BEAM = {"runner", "project", "region", "temp_location", "sdk_container_image", "machine_type", "experiments"}
OTHERS = {  # flags of launch scripts, pip and xprof
    "port", "folder", "dry_run", "zone", "type", "spot", "version", "worker", "restarts", "image", "hosts", "help",
    "only", "again", "seeds", "values", "originals", "students", "format", "layout", "logdir", "steps",
    "implicit-dirs", "rename-dir-limit", "check", "no-deps", "no-binary", "i3d", "videos",
    "xla_cpu_experimental_ynn_fusion_type", *BEAM,
}  # fmt: skip

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page, language):
    """The code blocks of a page in a language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)


def commands():
    """The arguments of every command of ivideo.main in a page's shell blocks."""
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                if found := re.search(r"python -m ivideo\.main (.*)", line):
                    yield pytest.param(shlex.split(found[1]), id=f"{page.name}: {found[1][:60]}")


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_small_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pages
def test_small_files_and_names_exist(page):
    for text in re.findall(r"`([^`\n]+)`", page.read_text()):
        for path in re.findall(r"\b(?:ivideo|configs|launch|tests|docs)/[\w/]*\w+\.\w+\b", text):
            if path != "configs/NAME.py" and "…" not in text:
                assert (ROOT / path).exists(), f"{page.name}: {path}"
        for name in re.findall(r"\bivideo(?:\.\w+)+", text):
            if name != "ivideo.main":
                assert exists(name), f"{page.name}: {name}"


def exists(name):
    """Whether a dotted name is a module, or an attribute of one."""
    module, _, attribute = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return module != "" and exists(module) and hasattr(importlib.import_module(module), attribute)
    return True


@pages
def test_small_flags_exist(page):
    own = {flag.name for flag in options.own()}
    for name in re.findall(r"(?<![\w-])--([a-z]\w*(?:-\w+)*)(?=[=\s`\\/]|$)", page.read_text(), re.M):
        assert name in own | OTHERS, f"{page.name}: --{name}"


@pages
def test_small_programs_compile(page):
    for block in blocks(page, "python"):
        ast.parse(block)


def test_small_the_sampling_program_runs(capsys):
    (block,) = blocks(ROOT / "docs" / "sampling.md", "python")
    exec(block, {})
    shape, mean, deviation = re.fullmatch(r"(\(.*\)) (\S+) (\S+)\n", capsys.readouterr().out).groups()
    assert shape == "(4, 16, 24, 40, 3)"
    assert abs(float(mean)) < 0.02 and abs(float(deviation) - 1) < 0.1


@pytest.mark.parametrize("command", commands())
def test_small_commands_have_valid_configs(command):
    """The config exists and has every key that the command sets."""
    if any(argument in ("--mode=show", "--mode=replay") for argument in command):
        return  # they need no config
    (spec,) = (argument.removeprefix("--config=") for argument in command if argument.startswith("--config="))
    config = config_files.load_config(spec)
    for argument in command:
        if found := re.match(r"--config\.([\w.]+)=", argument):
            value = config
            for name in found[1].split("."):
                assert name in value, argument
                value = value[name]


@pytest.mark.parametrize("command", commands())
def test_small_commands_have_flags_of_their_mode(command):
    values = [argument for argument in command if argument.startswith("--") and not argument.startswith("--config.")]
    names = [re.match(r"--(\w+)", value)[1] for value in values]
    (mode,) = [value.removeprefix("--mode=") for value in values if value.startswith("--mode=")] or ["train"]
    assert modes.unread(mode, names) == []


@pages
def test_small_config_keys_exist(page):
    """Every `config.…` of a page is a key, or a group of keys, of a stage."""
    config = config_files.load_config("configs/ssr1.py")
    for key in re.findall(r"(?<!--)\bconfig((?:\.[a-z]\w*)+)", re.sub(r"config\.json", "", page.read_text())):
        value = config
        for name in key[1:].split("."):
            assert name in value, f"{page.name}: config{key}"
            value = value[name]


def texts(tree):
    """The strings of a module, with … where an f-string inserts a value."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_small_messages_of_distillation_that_docs_explain_exist():
    """The longest words of each message in the first column of the page's last table, between … and numbers."""
    said = "\n".join(text for path in (ROOT / "ivideo").rglob("*.py") for text in texts(ast.parse(path.read_text())))
    table = (ROOT / "docs" / "distillation.md").read_text().rpartition("|---|---|\n")[2]
    messages = [span for line in table.splitlines() for span in re.findall(r"`([^`]+)`", line.split(" | ")[0])]
    assert len(messages) > 5
    words = {message: max(re.split(r"…|\d\S*|--\w+=", message), key=len).strip() for message in messages}
    assert [message for message in messages if words[message] not in said] == []


def test_small_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < 120


@pytest.mark.parametrize(
    "name",
    [
        "compare_predictions",
        "compare_sizes",
        "draw_docs",
        "draw_gallery",
        "figures",
        "fvd_sensitivity",
        "measure_reading",
        "photograph_page",
        "time_notebook",
        "tpu_table",
    ],
)
def test_small_python_launch_scripts_import_what_exists(name):
    """Names that they take from the package are there; plotting is an extra that need not be."""
    for node in ast.walk(ast.parse((ROOT / "launch" / f"{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "ivideo":
            for alias in node.names:
                assert exists(f"{node.module}.{alias.name}"), f"{node.module}.{alias.name}"
