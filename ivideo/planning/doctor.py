"""What is installed, what the machine has, and whether a config's network fits it: the first page of a bug report."""

import importlib.metadata
import json
import math
import os
import platform
import shutil
import sys
import tempfile

import jax
from packaging.requirements import Requirement

from ivideo import __version__, files, stages
from ivideo.data import mixtures
from ivideo.devices import chips, sharding
from ivideo.errors import UserError
from ivideo.planning.describe import human, param_count
from ivideo.training.step import state_shapes

OK, NOTE, PROBLEM = "ok", "note", "PROBLEM"
EXTRAS = {"tpu": "libtpu", "cuda": "jax-cuda12-plugin", "serve": "gradio", "metrics": "opencv-python-headless",
          "plot": "matplotlib", "beam": "apache-beam"}  # fmt: skip
LITTLE_DISK = 10 * 2**30  # bytes; a checkpoint of a paper-sized stage takes more
KINDS = {"text.checkpoint": "the text encoder", "data.dir": "the data",
         "data.image_dir": "the images", "data.text_cache": "the text cache",
         "train.start": "the weights that training starts from"}  # fmt: skip


def doctor(config=None, *, compile_cache: str = "", as_json: bool = False) -> list[dict]:
    """Prints a line for each thing that a run needs, and returns them as dicts of status, subject and text.

    `config`: a stage's or a cascade's config; then also whether its files are there and whether its training state and
    its parameters fit the devices. `compile_cache`: the folder of compiled programs. UserError at the end if there is
    a problem. Nothing is compiled, and nothing stays on disk.
    """
    rows = [*_installed(), *_machine(), *_devices(), _folder("compiled programs", compile_cache)]
    if config is not None:
        for stage in [config.stages[name] for name in config.order] if "stages" in config else [config]:
            rows += [*_paths(stage), *_sizes(stage)]
    found = [dict(zip(("status", "subject", "text"), row, strict=True)) for row in rows]
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        for row in found:
            print(f"{row['status']:9}{row['subject']:20}{row['text']}")
    if problems := [row for row in found if row["status"] == PROBLEM]:
        raise UserError(f"{len(problems)} problem(s), the first: {problems[0]['subject']}: {problems[0]['text']}")
    return found


def _installed():
    """The versions of Python, this package and what it needs."""
    yield OK, "python", f"{platform.python_version()} at {sys.executable}, on {platform.platform()}"
    try:
        needed = [Requirement(line) for line in importlib.metadata.requires("ivideo") or []]
    except importlib.metadata.PackageNotFoundError:
        yield NOTE, "ivideo", f"{__version__}, not installed: it runs from {os.getcwd()}; pip install -e . installs it"
        return
    yield OK, "ivideo", f"{__version__} at {os.path.dirname(os.path.dirname(os.path.abspath(__file__)))}"
    for requirement in needed:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None:
            yield (
                PROBLEM,
                requirement.name,
                f"is not installed: pip install '{requirement.name}{requirement.specifier}'",
            )
        elif not requirement.specifier.contains(version, prereleases=True):
            yield PROBLEM, requirement.name, f"{version}, expected {requirement.specifier}: pip install -U ivideo"
        else:
            yield OK, requirement.name, version
    for extra, name in EXTRAS.items():
        version = _version(name)
        yield (OK, name, version) if version else (NOTE, name, f"is not installed; pip install '.[{extra}]' adds it")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine():
    """Cores, memory and disk."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield OK, "host", f"{cores} cores, {human(_host_memory(), 'KMGTP')}B of memory"
    for subject, folder in (("this folder", os.getcwd()), ("temporary files", tempfile.gettempdir())):
        free = shutil.disk_usage(folder).free
        text = f"{folder} has {human(free, 'KMGTP')}B free"
        yield (OK, subject, text) if free > LITTLE_DISK else (NOTE, subject, f"{text}: little for checkpoints")


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _devices():
    """The devices of this process."""
    devices = jax.local_devices()
    memory = _device_memory()
    text = f"{jax.device_count()} × {devices[0].device_kind}, {human(memory, 'KMGTP')}B each"
    if jax.process_count() > 1:
        text += f", {len(devices)} of them on this host"
    yield OK, "devices", text
    if devices[0].platform == "cpu":
        yield NOTE, "accelerator", "none: the demo and the tests run on the CPU, the paper's sizes do not"
    elif devices[0].platform == "tpu" and chips.of_device(devices[0]) is None:
        yield NOTE, "accelerator", "its peak is not known here, so the log has no utilisation"


def _device_memory() -> int:
    """Bytes of memory of a device. All CPU devices share the host's."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return limit or _host_memory() // len(jax.local_devices())


def _folder(subject: str, folder: str):
    """Whether files can be written to a folder, which need not exist yet."""
    if not folder:
        return NOTE, subject, "are not kept, so every command compiles again; --compile_cache=FOLDER keeps them"
    existing = folder
    while existing and not os.path.isdir(existing):
        existing = os.path.dirname(existing)
    try:
        with tempfile.TemporaryFile(dir=existing or "."):
            pass
    except OSError as e:
        return PROBLEM, subject, f"{folder} cannot be written ({e.strerror}): choose another --compile_cache"
    return OK, subject, f"are kept in {folder}"


def _paths(config):
    """Whether the files and folders that a stage's config names can be found, in buckets too."""
    for key, what in KINDS.items():
        group, name = key.split(".")
        value = config[group][name]
        for path in mixtures.folders(value) if name in ("dir", "image_dir") else [value]:
            if path:
                yield _path(config.stage, f"config.{key} = {path}", path, what)


def _path(stage, where, path, what):
    """The line for a file or folder, which `where` names."""
    try:
        there = files.exists(path) or bool(files.list_names(path))
    except FileNotFoundError:
        there = False
    except (UserError, OSError) as e:
        return PROBLEM, stage, f"{where} does not answer ({' '.join(str(e).split())[:200]})"
    return (OK, stage, f"{where} is there") if there else (PROBLEM, stage, f"{where} is not there: it should be {what}")


def _sizes(config):
    """Whether what a stage keeps in training and in sampling fits this machine's devices."""
    memory = _device_memory()
    params = param_count(stages.param_shapes(config))
    for what, needed, key in (("training", _state_bytes, "train"), ("sampling", _param_bytes, "sample")):
        try:
            mesh = sharding.make_mesh(config[key].mesh)
        except UserError as e:
            yield NOTE, config.stage, f"{what}: {e}"
            continue
        size = needed(config, mesh)
        text = (
            f"{what}: {human(params)} parameters; at least {human(size, 'KMGTP')}B of {human(memory, 'KMGTP')}B per "
            f"device on {mesh.size} device(s), without activations"
        )
        yield (OK, config.stage, text) if size < memory else (
            NOTE, config.stage, f"{text}: too large; a smaller variant (:demo), or more devices (--mode=compile)"
        )  # fmt: skip


def _state_bytes(config, mesh) -> int:
    """Bytes per device of the training state and the gradients."""
    state = state_shapes(config)
    return _bytes_per_device((state, state.params), mesh)


def _param_bytes(config, mesh) -> int:
    """Bytes per device of the parameters in the dtype that sampling computes in."""
    dtype = jax.numpy.dtype(config.model.dtype)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), stages.param_shapes(config))
    return _bytes_per_device(shapes, mesh)


def _bytes_per_device(shapes, mesh) -> int:
    where = sharding.param_shardings(mesh, shapes)
    sizes = jax.tree.map(lambda leaf, s: math.prod(s.shard_shape(leaf.shape)) * leaf.dtype.itemsize, shapes, where)
    return sum(jax.tree.leaves(sizes))
