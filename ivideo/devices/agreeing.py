"""Checks that all processes of a program run the same code, config and data, before anything is compiled.

Everything goes through jax's key-value store and its barriers, which raise an error if a process is missing.
"""

import hashlib
import itertools
import json
import os
import pathlib
import secrets
import socket
import time
from collections.abc import Callable
from importlib import metadata

from ivideo import __version__
from ivideo.devices import hosts
from ivideo.errors import UserError

WAIT_SECONDS = 600  # for the slowest process to reach the same call
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "grain", "orbax-checkpoint")
_calls = itertools.count()  # makes keys unique: every process makes the same calls in the same order


def agree(find_values: Callable[[], dict]) -> None:
    """Compares every process's values, by name, with those of process 0; returns when all processes have compared.

    UserError in a process whose values differ. It names the first value that differs and the host, and
    `hosts.exiting_together` passes it on to all processes. A program of one process does not call `find_values`.
    """
    if not hosts.is_distributed():
        return
    values = {name: str(value) for name, value in find_values().items()}
    (number, _), key = hosts.process(), f"ivideo/agree/{next(_calls)}"
    host = socket.gethostname()
    if number == 0:
        hosts.store().key_value_set(key, json.dumps({"host": host, "values": values}))
    else:
        first = json.loads(_get(key))
        expected = first["values"]
        for name in [*expected, *(values.keys() - expected.keys())]:
            mine, theirs = (_short(side.get(name, "missing")) for side in (values, expected))
            if values.get(name) != expected.get(name):
                raise UserError(
                    f"the processes differ: {name} is {mine} on process {number} ({host}) and {theirs} on process 0 "
                    f"({first['host']}); start all of them with the same command, code and data"
                )
    _wait(key)


def from_first_process(function: Callable):
    """Calls `function` in process 0 alone, and returns its result, sent as JSON, in all processes."""
    if not hosts.is_distributed():
        return function()
    (number, _), key = hosts.process(), f"ivideo/first/{next(_calls)}"
    if number == 0:
        hosts.store().key_value_set(key, json.dumps(function()))
    return json.loads(_get(key))


def _short(text):
    return text if len(text) <= 200 else f"{text[:200]}…"


def _get(key):
    return hosts.store().blocking_key_value_get(key, WAIT_SECONDS * 1000)


def _wait(key):
    hosts.store().wait_at_barrier(f"{key}/all", WAIT_SECONDS * 1000)


def config_values(config) -> dict:
    """Every value of a resolved config, by the name of its flag."""

    def leaves(value, name):
        if hasattr(value, "items"):
            for key, below in value.items():
                yield from leaves(below, f"{name}.{key}")
        else:
            yield name, repr(value)

    return dict(leaves(config, "config"))


def program_values() -> dict:
    """The versions of the libraries that compute, and a digest of every source file of this package."""
    folder = pathlib.Path(__file__).parents[1]
    versions = {f"the version of {name}": metadata.version(name) for name in LIBRARIES}
    versions["the version of ivideo"] = __version__
    code = {
        f"the code of ivideo/{path.relative_to(folder)}": hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        for path in sorted(folder.rglob("*.py"))
    }
    return versions | code


def folder_digest(folder: str) -> str:
    """Identifies a folder's files by their names and sizes, without reading them; 'none' for no folder."""
    if not folder:
        return "none"
    files = sorted((str(path.relative_to(folder)), path.stat().st_size) for path in _files(folder))
    digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:12]
    return f"{len(files)} files of {sum(size for _, size in files):,} bytes (digest {digest} of names and sizes)"


def _files(folder):
    return (path for path in pathlib.Path(folder).rglob("*") if path.is_file())


def check_shared(folder: str, seconds: float = 30.0) -> None:
    """UserError where some process does not see the files that process 0 writes to a folder.

    Processes that look at different files would wait for each other forever.
    """
    if not hosts.is_distributed():
        return
    (number, count), key = hosts.process(), f"ivideo/shared/{next(_calls)}"
    if number == 0:
        created = not os.path.isdir(folder)
        os.makedirs(folder, exist_ok=True)
        name = f".seen-{secrets.token_hex(4)}"
        open(os.path.join(folder, name), "w").close()
        hosts.store().key_value_set(key, name)
    probe = os.path.join(folder, _get(key))
    deadline = time.monotonic() + seconds  # shared storage may show new files late
    while not (visible := os.path.exists(probe)) and time.monotonic() < deadline:
        time.sleep(0.1)
    answer = "" if visible else f"process {number} ({socket.gethostname()})"
    hosts.store().key_value_set(f"{key}/{number}", answer)
    if number == 0:
        blind = [process for i in range(count) if (process := _get(f"{key}/{i}"))]
        os.remove(probe)
        if created:
            os.rmdir(folder)
        if blind:
            raise UserError(
                f"{folder} is not the same folder for all processes: {len(blind)} of {count} do not see the files of "
                f"process 0, the first of them {blind[0]}; give a folder on shared storage (docs/tpu.md)"
            )
    _wait(key)
