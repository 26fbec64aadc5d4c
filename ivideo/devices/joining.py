"""How several processes find each other, before jax connects them.

jax takes whoever comes to its port for a process of the run, and ends a healthy run when one of another run does. So
the first process answers at that port itself until all have come, and jax's service takes the port over after that.
Each of the others says who it is, in a line of JSON, and is told to go on, to wait, or what is wrong.
"""

import contextlib
import json
import logging
import os
import socket
import sys
import time

import jax

from ivideo.devices import hosts
from ivideo.errors import UserError

log = logging.getLogger("ivideo")

JOIN_SECONDS = 300  # for all processes to come, and for a busy port to become free
STRANGER_SECONDS = 30  # that a process of another run waits where one of this run is missing: then it may be a mistake
HEARTBEAT_SECONDS = 40  # without a sign of life, and the others are told that a process is lost


def join(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None, *, run: str = ""
) -> None:
    """Makes this process one of several: before anything else of jax, in every one of them.

    Without arguments the surroundings tell (Cloud TPU, GKE, Slurm); else all three are needed: the address HOST:PORT of
    the first process, their number, and this one's, from 0. `run` tells this run from others that may come to the same
    port, such as its working folder. UserError where the arguments are wrong, or do not fit those of the other
    processes. Where not all processes come within five minutes, or the port stays busy, the process leaves with exit
    code `hosts.LOST`, since machines come late.
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
        host, port = _address(coordinator)
        log.info("process %d waits for all %d at %s", process_id, num_processes, coordinator)
        if process_id:
            _come(host, port, _hello(process_id, num_processes, run))
        else:
            _gather(port, num_processes, run)
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id,
            initialization_timeout=JOIN_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )  # fmt: skip
    except ValueError as e:
        raise UserError(
            f"the processes did not find each other ({_line(e)}): start all of them with the same --coordinator and "
            "--num_processes, or on a pod with --distributed"
        ) from e
    except jax.errors.JaxRuntimeError as e:
        hosts.exit_at_once(hosts.LOST, f"the processes cannot connect to each other ({_line(e)}): ")
    hosts.watch()
    log.info("process %d of %d, with %d of %d devices", jax.process_index(), jax.process_count(),
             jax.local_device_count(), jax.device_count())  # fmt: skip


def _address(coordinator):
    host, _, port = coordinator.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 2**16:
        raise UserError(
            f"--coordinator={coordinator}: expected HOST:PORT of the first process, such as 10.0.0.2:8476, with a port "
            "from 1 to 65535"
        )
    return host.strip("[]"), int(port)


def _hello(number, count, run):
    return {"ivideo": "joins", "process": number, "count": count, "run": run, "host": socket.gethostname()}


def _gather(port, count, run):
    """In the first process: returns when all others have come, and know it."""
    deadline = time.monotonic() + JOIN_SECONDS
    here = {}  # by its number, the connection and the host of each process that waits
    strangers = {}  # when each process of another run came first
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(port, deadline))
        while len(here) < count - 1:
            if time.monotonic() > deadline:
                absent = ", ".join(str(n) for n in range(1, count) if n not in here)
                _lost(f"process {absent} of {count} did not come to port {port} of {socket.gethostname()} in "
                      f"{JOIN_SECONDS} s: start all processes, and let them reach that port")  # fmt: skip
            try:
                connection = stack.enter_context(server.accept()[0])
            except TimeoutError:
                continue
            hello = _read(connection, seconds=5)
            here = {number: there for number, there in here.items() if not _is_closed(there[0])}
            if hello.keys() != _hello(0, 0, "").keys():  # no process of ours
                connection.close()
            elif hello["run"] != run and not _stays(hello, strangers, here):
                _send(connection, wait=f"another run ({run}) uses that port: give each its own")
                connection.close()
            elif problem := _mistake(hello, count, run, here):
                for other, _ in [*here.values(), (connection, "")]:
                    _send(other, error=problem)
                raise UserError(problem)
            else:
                here[hello["process"]] = connection, hello["host"]
        for connection, _ in here.values():
            _send(connection, go=True)


def _stays(hello, strangers, here):
    """Whether a process of another run has come for long, in the place of one that is missing here."""
    key = hello["process"], hello["host"], hello["run"]
    if key not in strangers:
        strangers[key] = time.monotonic()
        log.warning("process %s of another run (%s) on %s came: it is told to wait", key[0], key[2], key[1])
    return hello["process"] not in here and time.monotonic() - strangers[key] > STRANGER_SECONDS


def _mistake(hello, count, run, here):
    """What is wrong with a process that comes, or an empty string."""
    number, host = hello["process"], hello["host"]
    if hello["run"] != run:
        return (
            f"process {number} ({host}) has --workdir={hello['run']}, and process 0 ({socket.gethostname()}) "
            f"--workdir={run}: give all processes the same, or each run its own port"
        )
    if hello["count"] != count:
        return (
            f"process {number} ({host}) has --num_processes={hello['count']}, and process 0 ({socket.gethostname()}) "
            f"--num_processes={count}: give all of them the same"
        )
    taken = {0: socket.gethostname(), **{other: there[1] for other, there in here.items()}}
    if number in taken:
        return f"two processes have --process_id={number}, on {taken[number]} and on {host}: give each its own"
    return ""


def _listen(port, deadline):
    """The socket that the others come to. Waits for a port that another program uses."""
    dual = socket.has_dualstack_ipv6()  # as jax's service after it
    said = False
    while True:
        try:
            server = socket.create_server(
                ("", port), family=socket.AF_INET6 if dual else socket.AF_INET, backlog=4096, dualstack_ipv6=dual
            )
            server.settimeout(0.2)
            return server
        except OSError as e:
            busy = f"port {port} of {socket.gethostname()} cannot be used ({os.strerror(e.errno)})"
            if time.monotonic() > deadline:
                _lost(f"{busy} after {JOIN_SECONDS} s: give another one with --coordinator")
            if not said:
                log.warning("%s: waiting %d s for it; another run may have it", busy, JOIN_SECONDS)
                said = True
            time.sleep(0.5)


def _come(host, port, hello):
    """In the other processes: returns when the first one says that all have come."""
    deadline = time.monotonic() + JOIN_SECONDS
    said = ""
    while True:
        try:
            with socket.create_connection((host, port), timeout=5) as connection:
                _send(connection, **hello)
                answer = _read(connection, seconds=deadline - time.monotonic())
            problem = "another program answers there, maybe another run"
        except OSError as e:
            answer, problem = {}, e.strerror or str(e)
        if answer.get("go"):
            return
        if "error" in answer:
            raise UserError(answer["error"])
        problem = answer.get("wait", problem)
        if time.monotonic() > deadline:
            _lost(
                f"--coordinator={host}:{port} did not answer in {JOIN_SECONDS} s ({problem}): start the first process "
                "there with the same address, and let the others reach that port"
            )
        if "another" in problem and problem != said:
            log.warning("--coordinator=%s:%d: %s; waiting up to %d s", host, port, problem, JOIN_SECONDS)
            said = problem
        time.sleep(0.5)


def _send(connection, **message):
    with contextlib.suppress(OSError):  # a process that went away is missed by the next look
        connection.sendall(json.dumps(message).encode() + b"\n")


def _read(connection, *, seconds):
    """The JSON object of one line; empty where there is none."""
    connection.settimeout(max(seconds, 0.1))
    try:
        with connection.makefile("rb") as file:
            message = json.loads(file.readline(10_000))
            return message if isinstance(message, dict) else {}
    except (OSError, ValueError):
        return {}


def _is_closed(connection):
    connection.settimeout(0)
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def _line(error):
    return " ".join(str(error).split())[:300]


def _lost(message):
    """Leaves: there is no program of several processes yet that would have to be told."""
    log.error("%s (exit code %d)", message, hosts.LOST)
    sys.exit(hosts.LOST)
