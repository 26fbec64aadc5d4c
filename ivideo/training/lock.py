"""One training run at a time in a working folder, on storage that several machines may share.

The run keeps a file in the folder, WORKDIR/running.json, that says who it is. It sets the file's time anew every few
seconds: that is its heartbeat. Another run that finds the file looks whether its time changes. No clocks are compared,
so clocks that differ do no harm. Where the time does not change, the first run was killed, and the folder is free. On
the same machine its process is looked for instead, which takes no time.
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
# Without a heartbeat, and the run is taken for dead. NFS and gcsfuse may show what a file was a minute ago
STALE_SECONDS = 75.0
SETTLE_SECONDS = 0.5  # for two that take over the same folder to see which of them has it


@contextlib.contextmanager
def held(folder: str, *, first: bool = True):
    """Holds a folder for the block. Of several processes the first one does, for all of them.

    UserError where another run has it, which says who and since when. Should another run take the folder over, since
    this one gave no sign of life for `STALE_SECONDS`, this process ends with a line.
    """
    if not first:
        yield
        return
    new = not os.path.isdir(folder)
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, NAME)
    me = _myself()
    over = threading.Event()
    try:
        _take(path, me)
        beating = threading.Thread(target=_beat, args=(path, me, over), daemon=True)
        beating.start()
        try:
            yield
        finally:
            over.set()
            beating.join(BEAT_SECONDS)  # storage that hangs holds nobody up
            found, _ = _look(path)
            if found == me:
                with contextlib.suppress(OSError):
                    os.remove(path)
    finally:
        if new:
            with contextlib.suppress(OSError):  # something is in it
                os.rmdir(folder)


def _myself() -> dict:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "token": secrets.token_hex(8),
        "machine": _machine(),
        "started": _started(os.getpid()),
    }


def _machine() -> str:
    """What numbers of processes belong to: this start of this machine, and a container's own numbers; '' if unknown."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as f:
            return f"{f.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """When a process began, in the kernel's units: a number may be given to another one later. '' if there is none."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            state, *rest = f.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else rest[18]  # of a dead one that its parent has not asked for yet, the number is left


def _take(path: str, me: dict) -> None:
    while True:
        with contextlib.suppress(FileExistsError), open(path, "x", encoding="utf-8") as f:
            try:
                f.write(json.dumps(me))
                return
            except OSError:  # such as a full disk
                os.remove(path)
                raise
        found, beat = _look(path)
        if beat is None:
            continue  # it is free again
        if _alive(path, found, beat):
            raise UserError(
                f"{os.path.dirname(path)} is in use by {_who(found)}: stop that run, or give another --workdir"
            )
        if _look(path) != (found, beat):
            continue  # somebody else has just taken it, or given it back
        log.info("%s was left by %s, which is gone", path, _who(found))
        write_json(path, me)
        time.sleep(SETTLE_SECONDS)
        if _look(path)[0] == me:
            return


def _look(path: str) -> tuple[dict, int | None]:
    """What the file says, {} while it is being written, and its time, None where there is no file."""
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
    """Whether the run that left the file is there. Waits for a heartbeat where only that can tell."""
    if found.get("machine") and found["machine"] == _machine():
        return bool(found["started"]) and _started(found["pid"]) == found["started"]
    log.info("%s has been used by %s: looking for a sign of life, up to %g s", path, _who(found), STALE_SECONDS)
    deadline = time.monotonic() + STALE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 10)
        now = _look(path)[1]
        if now != beat:
            return now is not None
    return False


def _who(found: dict) -> str:
    if "pid" not in found:
        return "a run that has not said who it is"
    return f"process {found['pid']} on {found['host']} since {found['since']}"


def _beat(path: str, me: dict, over: threading.Event) -> None:
    while not over.wait(BEAT_SECONDS):
        # Storage that is away is not the lock's to report: a checkpoint that cannot be saved ends the run
        with contextlib.suppress(OSError):
            found, beat = _look(path)
            if beat is None:
                write_json(path, me)
            elif found and found != me:
                reason = f"was taken over by {_who(found)}, since this run gave no sign of life: it stops"
                hosts.exit_at_once(hosts.MISTAKE, f"{os.path.dirname(path)} {reason}; once that run is over, ")
            os.utime(path)
