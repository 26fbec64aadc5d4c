"""Several processes compare what they are going to do, before anything is compiled.

All of it goes through jax's key-value store and its barriers, which end with an error where a process is missing.
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

WAIT_SECONDS = 600  # for the slowest process to come to the same place
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "grain", "orbax-checkpoint")
_turns = itertools.count()  # every process compares the same things in the same order


def agree(find_values: Callable[[], dict]) -> None:
    """UserError in a process whose values, by name, are not those of the first one; returns when all have compared.

    It names the first value that differs, and on which host: `hosts.exiting_together` tells that to all processes. In a
    program of one process `find_values` is not called.
    """
    if not hosts.is_distributed():
        return
    values = {name: str(value) for name, value in find_values().items()}
    (number, _), key = hosts.process(), f"ivideo/agree/{next(_turns)}"
    host = socket.gethostname()
    if number == 0:
        hosts.store().key_value_set(key, json.dumps({"host": host, "values": values}))
    else:
        first = json.loads(_get(key))
        wanted = first["values"]
        for name in [*wanted, *(values.keys() - wanted.keys())]:
            mine, theirs = (_short(there.get(name, "missing")) for there in (values, wanted))
            if values.get(name) != wanted.get(name):
                raise UserError(
                    f"the processes differ: {name} is {mine} on process {number} ({host}) and {theirs} on process 0 "
                    f"({first['host']}); start all of them with the same command, code and data"
                )
    _wait(key)


def from_first_process(function: Callable):
    """What `function` returns in the first process, which alone calls it, in all of them. It goes through JSON."""
    if not hosts.is_distributed():
        return function()
    (number, _), key = hosts.process(), f"ivideo/first/{next(_turns)}"
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
    """Every value of a resolved config, by its name as a flag."""

    def leaves(value, name):
        if hasattr(value, "items"):
            for key, below in value.items():
                yield from leaves(below, f"{name}.{key}")
        else:
            yield name, repr(value)

    return dict(leaves(config, "config"))


def program_values() -> dict:
    """Versions of what computes, and the digest of every file of this package's code."""
    folder = pathlib.Path(__file__).parents[1]
    versions = {f"the version of {name}": metadata.version(name) for name in LIBRARIES}
    versions["the version of ivideo"] = __version__
    code = {
        f"the code of ivideo/{path.relative_to(folder)}": hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        for path in sorted(folder.rglob("*.py"))
    }
    return versions | code


def folder_digest(folder: str) -> str:
    """What tells a folder's files from others, by their names and sizes; nothing is read. The folder may be none."""
    if not folder:
        return "none"
    found = sorted((str(path.relative_to(folder)), path.stat().st_size) for path in _files(folder))
    digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()[:12]
    return f"{len(found)} files of {sum(size for _, size in found):,} bytes (digest {digest} of names and sizes)"


def _files(folder):
    return (path for path in pathlib.Path(folder).rglob("*") if path.is_file())


def check_shared(folder: str, seconds: float = 30.0) -> None:
    """UserError where not all of several processes see the first one's files in a folder.

    They would wait for one another without end as soon as they look at different files.
    """
    if not hosts.is_distributed():
        return
    (number, count), key = hosts.process(), f"ivideo/shared/{next(_turns)}"
    if number == 0:
        new = not os.path.isdir(folder)
        os.makedirs(folder, exist_ok=True)
        name = f".seen-{secrets.token_hex(4)}"
        open(os.path.join(folder, name), "w").close()
        hosts.store().key_value_set(key, name)
    seen = os.path.join(folder, _get(key))
    deadline = time.monotonic() + seconds  # shared storage may be late
    while not (there := os.path.exists(seen)) and time.monotonic() < deadline:
        time.sleep(0.1)
    said = "" if there else f"process {number} ({socket.gethostname()})"
    hosts.store().key_value_set(f"{key}/{number}", said)
    if number == 0:
        blind = [process for i in range(count) if (process := _get(f"{key}/{i}"))]
        os.remove(seen)
        if new:
            os.rmdir(folder)
        if blind:
            raise UserError(
                f"{folder} is not the same folder for all processes: {len(blind)} of {count} do not see the first "
                f"one's files, {blind[0]} first; give one that they share (docs/tpu.md)"
            )
    _wait(key)
