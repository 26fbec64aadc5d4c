"""Finds and loads config files, and the package's own configs."""

import importlib.machinery
import importlib.util
import logging
import os
import re
import sys
import traceback
import types

import ml_collections

from ivideo import files, stages
from ivideo.errors import UserError

log = logging.getLogger("ivideo")
EXAMPLE = "give a config file, such as --config=configs/base.py:demo"
DISTILLED = re.compile(r"(?:(?P<variant>.+)_)?distilled(?:_(?P<phase>\w+))?(?:=(?P<stages>[\w,]+))?")


def load_config(spec: str) -> ml_collections.ConfigDict:
    """Loads the config FILE or FILE:VARIANT, such as configs/base.py:demo, or with _distilled that of its student.

    If a relative configs/NAME.py does not exist, the package's own file is loaded. `from configs import NAME` in the
    file searches its own folder, for a symbolic link also the folder of its target, and then the package's configs.
    UserError if there is no such file, if it fails (with the reason and the line), or if it returns no ConfigDict.
    """
    path, variant = _find_config(spec)
    student = DISTILLED.fullmatch(variant[0]) if variant else None
    if student:
        variant = [student["variant"]] if student["variant"] else []
    path = os.path.abspath(path)
    folders = [os.path.dirname(path), os.path.dirname(os.path.realpath(path)), package_configs()]
    _make_importable("configs", folders)
    try:
        # Not an import: Python would use a stale compiled copy of a file that was written twice within a second
        module = types.ModuleType("config")
        module.__file__ = path
        exec(compile(files.read_bytes(path), path, "exec"), module.__dict__)
        if not hasattr(module, "get_config"):
            raise UserError(f"it has no get_config(): {EXAMPLE}")
        config = module.get_config(*variant)
    except Exception as e:
        raise UserError(f"--config={spec}: {_reason(e, folders)}") from e
    if not isinstance(config, ml_collections.ConfigDict):
        kind = type(config).__name__
        raise UserError(f"--config={spec}: get_config() returned {kind}, expected an ml_collections.ConfigDict")
    return _distilled(config, spec, student) if student else config


def _distilled(config, spec: str, student: re.Match):
    """The config of the student that a variant with _distilled names, or of the cascade of such."""
    names = student["stages"].split(",") if student["stages"] else []
    known = list(config.get("stages", {}))
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--config={spec}: {unknown[0]!r} is no stage of it, expected some of {', '.join(known)}")
    try:
        return stages.distilled(config, student["phase"] or "", only=names)
    except (UserError, ValueError, AttributeError, KeyError) as e:
        raise UserError(f"--config={spec}: {one_line(e)}") from e


def package_configs() -> str:
    """The folder of the package's own configs: inside an installed package, next to it in a clone."""
    package = os.path.dirname(os.path.abspath(__file__))
    inside = os.path.join(package, "configs")
    return inside if os.path.isdir(inside) else os.path.join(os.path.dirname(package), "configs")


def package_config_names() -> list[str]:
    """The names of the package's own config files."""
    return sorted(name for name in os.listdir(package_configs()) if re.fullmatch(r"(?!common)[a-z]\w*\.py", name))


def _find_config(spec: str) -> tuple[str, list[str]]:
    """Splits a config spec into a file and [variant] or []. The path itself may contain colons."""
    spec = files.expand_home(spec)
    path, colon, variant = spec.rpartition(":")
    candidates = [(spec, [])] + ([(path, [variant])] if colon else [])
    for path, variant in candidates:
        if os.path.isfile(path):
            return path, variant
    for path, variant in candidates:
        own = os.path.join(package_configs(), os.path.basename(path))
        if os.path.normpath(os.path.dirname(path)) == "configs" and os.path.isfile(own):
            log.info("%s does not exist here: using the package's own file, %s", path, own)
            return own, variant
    path = candidates[-1][0]
    what = f"{path} is a folder" if os.path.isdir(path) else f"no config at {path!r}"
    raise UserError(f"{what}: {EXAMPLE}; the package has {', '.join(package_config_names())}")


def _make_importable(name: str, folders: list[str]) -> None:
    """Makes `from NAME import …` search these folders in order, whatever Python's path is."""
    spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations.extend(folders)
    sys.modules[name] = importlib.util.module_from_spec(spec)


def _reason(error: Exception, folders: list[str]) -> str:
    """Why a config file failed: the error as one line, and the last line of its traceback that is in `folders`."""
    message = one_line(error).split(" Other fields present")[0]
    if isinstance(error, SyntaxError):
        return f"{message.split(' (')[0]} ({error.filename}, line {error.lineno})"
    if not isinstance(error, ValueError):
        message = f"{type(error).__name__}: {message}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if os.path.dirname(f.filename) in folders]
    return f"{message} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else message


def one_line(error: Exception) -> str:
    """The error's message as one line."""
    return " ".join(str(error).split())[:400]
