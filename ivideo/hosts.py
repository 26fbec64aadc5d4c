"""Several processes, on one machine or many, as one program."""

import contextlib
import logging
import os
import re
import secrets
import socket
import sys
import time
import traceback

import jax
import numpy as np

from ivideo.errors import UserError

log = logging.getLogger("ivideo")
LOST = 77  # exit code where another process is not there, or went away
# What all processes find at the same moment, and what XLA says of a program rather than of another process
EVERYWHERE = (UserError, FloatingPointError)
OF_THE_PROGRAM = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED", "FAILED_PRECONDITION", "OUT_OF_RANGE")
JOIN_SECONDS = 300  # for all processes to be there
HEARTBEAT_SECONDS = 40  # without a sign of life, and the others are told that a process is lost


def join(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Makes this process one of several: before anything else of jax, in every one of them.

    Without arguments the surroundings tell (Cloud TPU, GKE, Slurm); else all three are needed: the address HOST:PORT of
    the first process, their number, and this one's, from 0. UserError where they are not in order. Where the first
    process does not come within five minutes, the others leave with exit code LOST, since machines come late; where
    another one does not, jax ends those that have come (SIGABRT).
    """
    given = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < 3:
        raise UserError(f"{' and '.join(missing)} missing: several processes need {', '.join(given)}")
    if not missing:
        if process_id >= num_processes:
            raise UserError(
                f"--process_id={process_id} of --num_processes={num_processes}: expected 0 to {num_processes - 1}"
            )
        host, _, port = coordinator.rpartition(":")
        if not host or not re.fullmatch(r"\d{1,5}", port, re.ASCII) or not 1 <= int(port) <= 65535:
            raise UserError(
                f"--coordinator={coordinator}: expected HOST:PORT of the first process, such as 10.0.0.2:8476, with a "
                "port from 1 to 65535"
            )
        log.info("process %d waits for all %d at %s", process_id, num_processes, coordinator)
        if process_id:
            _wait_for(host, int(port))
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id,
            initialization_timeout=JOIN_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )  # fmt: skip
    except (RuntimeError, ValueError) as e:
        reason = " ".join(str(e).split())[:300]
        raise UserError(
            f"the processes did not find each other ({reason}): start all of them with the same --coordinator and "
            "--num_processes, reachable on that port, or on a pod with --distributed"
        ) from e
    log.info("process %d of %d, with %d of %d devices", jax.process_index(), jax.process_count(),
             jax.local_device_count(), jax.device_count())  # fmt: skip


def _wait_for(host: str, port: int) -> None:
    """Returns when the first process is there. jax itself would end this one with a page of its own, and no advice."""
    deadline = time.monotonic() + JOIN_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as e:
            if time.monotonic() > deadline:
                log.error(
                    "--coordinator=%s:%d did not answer in %d s (%s): start the first process there with the same "
                    "address, and let the others reach that port (exit code %d)", host, port, JOIN_SECONDS, e, LOST,
                )  # fmt: skip
                sys.exit(LOST)
            time.sleep(0.5)


def check_shared(folder: str, seconds: float = 30.0) -> None:
    """UserError, in all of several processes, where they do not all see the first one's files in a folder.

    They would wait for one another without end as soon as they look at different files.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    number = int(multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32))))
    seen, first = os.path.join(folder, f".seen-{number:08x}"), jax.process_index() == 0
    new = not os.path.isdir(folder)
    if first:
        os.makedirs(folder, exist_ok=True)
        open(seen, "w").close()
    multihost_utils.sync_global_devices("written")
    deadline = time.monotonic() + seconds  # shared storage may be late
    while not os.path.exists(seen) and time.monotonic() < deadline:
        time.sleep(0.1)
    there = multihost_utils.process_allgather(np.array(os.path.exists(seen)))
    if first:
        os.remove(seen)
        if new:
            os.rmdir(folder)
    multihost_utils.sync_global_devices("removed")
    if not there.all():
        raise UserError(
            f"{folder} is not the same folder for all processes: {int((~there).sum())} of {there.size} do not see the "
            "first one's files; give one that they share (docs/tpu.md)"
        )


@contextlib.contextmanager
def leaving_together():
    """Of several processes, leaves at once after an error that the others may not have: they would wait for this one.

    With `LOST` where another process is gone, with 1 and the traceback where this one is at fault.
    """
    try:
        yield
    except EVERYWHERE:
        raise
    except Exception as e:
        if jax.process_count() == 1:
            raise
        if isinstance(e, jax.errors.JaxRuntimeError) and not str(e).startswith(OF_THE_PROGRAM):
            reason = " ".join(str(e).split())[:200]
            leave(LOST, f"another process of the run went away ({reason}): this one stops; ")
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def leave(code: int, message: str):
    """Ends the process at once, without the exit handlers, which could wait for what never comes."""
    log.error("%sthe same command goes on from what was saved (exit code %d)", message, code)
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)
