"""Allows one training run at a time per working folder, also on storage that several machines share.

The run keeps a lock file, WORKDIR/running.json, with its host and process. As a heartbeat, it updates the file's
modification time every few seconds. Another run that finds the file watches whether that time changes. Only changes
count, so the machines' clocks may differ. If the time stays the same, the first run was killed and the folder is free.
On the same machine the second run looks for the process instead, without waiting.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time

from ivideo.devices import hosts
from ivideo.errors import UserError
from ivideo.files import write_json

log = logging.getLogger("ivideo")

NAME = "running.json"
BEAT_SECONDS = 5.0
# A run counts as dead after this long without a heartbeat. NFS and gcsfuse may show a file as it was a minute ago
STALE_SECONDS = 75.0
SETTLE_SECONDS = 0.5  # two runs that take over a folder at the same time wait this long to see which one has it
POLLS_PER_BEAT = 10  # how often another run looks for a heartbeat


@contextlib.contextmanager
def held(folder: str, *, first: bool = True):
    """Locks a folder for the block. In a run of several processes, only the `first` one locks it.

    UserError if another run has the lock (the message says which run and since when), or if the folder cannot be
    written to. If another run takes the folder over, because this one had no heartbeat for `STALE_SECONDS`, this
    process prints one line and exits.
    """
    if not first:
        yield
        return
    new = not os.path.isdir(folder)
    with _refusing(folder):
        os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, NAME)
    own = _own_identity()
    ended = threading.Event()
    try:
        with _refusing(folder):
            _acquire(path, own)
        heartbeats = threading.Thread(target=_send_heartbeats, args=(path, own, ended), daemon=True)
        heartbeats.start()
        try:
            yield
        finally:
            ended.set()
            heartbeats.join(BEAT_SECONDS)  # with a limit, because the storage may hang
            found, _ = _read(path)
            if found == own:
                with contextlib.suppress(OSError):
                    os.remove(path)
    finally:
        if new:
            with contextlib.suppress(OSError):  # it is not empty
                os.rmdir(folder)


@contextlib.contextmanager
def _refusing(folder: str):
    """Inside the block, an error of the file system is a UserError."""
    try:
        yield
    except OSError as e:
        raise UserError(
            f"--workdir={folder} cannot be written to ({e.strerror or e}): make it writable, make room on its disk, or "
            "give another folder"
        ) from e


def _own_identity() -> dict:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "token": secrets.token_hex(8),
        "machine": _machine(),
        "started": _started(os.getpid()),
    }


def _machine() -> str:
    """Identifies the machine's boot and the container's PID namespace, within which a PID is unique. '' if unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as f:
            return f"{f.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """A process's start time in the kernel's units, since PIDs are reused. '' if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            state, *rest = f.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]  # a zombie is a dead process that still has its PID


def _acquire(path: str, own: dict) -> None:
    """Creates the lock file, or takes over the file of a dead run. UserError if the other run is alive."""
    while True:
        with contextlib.suppress(FileExistsError), open(path, "x", encoding="utf-8") as f:
            try:
                f.write(json.dumps(own))
                return
            except OSError:  # such as a full disk
                os.remove(path)
                raise
        found, beat = _read(path)
        if beat is None:
            continue  # the other run has just ended
        if _alive(path, found, beat):
            raise UserError(
                f"{os.path.dirname(path)} is in use by {_describe(found)}: stop that run, or give another --workdir"
            )
        if _read(path) != (found, beat):
            continue  # another run has just taken it, or released it
        log.info("%s was left by %s, which is no longer running", path, _describe(found))
        write_json(path, own)
        time.sleep(SETTLE_SECONDS)
        if _read(path)[0] == own:
            return


def _read(path: str) -> tuple[dict, int | None]:
    """Returns the content of the lock file and its modification time, or ({}, None) if there is no file.

    The content is {} while the file is being written.
    """
    try:
        with open(path, encoding="utf-8") as f:
            text, beat = f.read(), os.fstat(f.fileno()).st_mtime_ns
    except FileNotFoundError:
        return {}, None
    try:
        found = json.loads(text)
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}, beat


def _alive(path: str, found: dict, beat: int) -> bool:
    """Whether the run that wrote the lock file is alive. If it is on another machine, waits for a heartbeat."""
    if found.get("machine") and found["machine"] == _machine():
        return bool(found["started"]) and _started(found["pid"]) == found["started"]
    log.info("%s was written by %s: waiting up to %g s for its heartbeat", path, _describe(found), STALE_SECONDS)
    deadline = time.monotonic() + STALE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / POLLS_PER_BEAT)
        now = _read(path)[1]
        if now != beat:
            return now is not None
    return False


def _describe(found: dict) -> str:
    if "pid" not in found:
        return "an unknown run"
    return f"process {found['pid']} on {found['host']} since {found['since']}"


def _send_heartbeats(path: str, own: dict, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        # Unreachable storage is not reported here: the next checkpoint reports it and ends the run
        with contextlib.suppress(OSError):
            found, beat = _read(path)
            if beat is None:
                write_json(path, own)
            elif found and found != own:
                reason = f"was taken over by {_describe(found)}, because this run had no heartbeat: it stops"
                hosts.exit_at_once(hosts.MISTAKE, f"{os.path.dirname(path)} {reason}; once that run is over, ")
            os.utime(path)
