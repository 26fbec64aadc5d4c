"""How several processes find each other, before jax connects them.

jax treats every process that connects to its port as one of the run, so a process of another run would end a healthy
run. Therefore process 0 itself listens at that port until all processes have connected; then jax's service takes the
port. Each other process sends one line of JSON with its identity. The answer is to go on, to wait, or an error.
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

JOIN_SECONDS = 300  # for all processes to connect, and for a busy port to become free
STRANGER_SECONDS = 30  # a process of another run that waits longer, in place of a missing one, has a wrong --workdir
HEARTBEAT_SECONDS = 40  # after this long without a heartbeat, a process counts as lost


def join(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None, *, run: str = ""
) -> None:
    """Makes this process one of several. Every process calls it before it uses jax.

    Without arguments, jax reads them from the environment (Cloud TPU, GKE, Slurm). Otherwise all three are needed: the
    address HOST:PORT of process 0, the number of processes, and this process's number, from 0. `run` distinguishes this
    run from others that may connect to the same port; it is, for instance, the run's folder. UserError where the
    arguments are wrong, or contradict those of the other processes. If some processes do not connect within five
    minutes, or the port stays busy, this process exits with code `hosts.LOST`: a machine may still be starting, so the
    launcher tries again.
    """
    flags = {"--coordinator": coordinator, "--num_processes": num_processes, "--process_id": process_id}
    missing = [name for name, value in flags.items() if value is None]
    if missing and len(missing) < 3:
        raise UserError(f"{' and '.join(missing)} missing: a run of several processes needs {', '.join(flags)}")
    if not missing:
        if process_id >= num_processes:
            raise UserError(
                f"--process_id={process_id} of --num_processes={num_processes}: expected 0 to {num_processes - 1}"
            )
        host, port = _address(coordinator)
        log.info("process %d waits for all %d at %s", process_id, num_processes, coordinator)
        if process_id:
            _connect(host, port, _hello(process_id, num_processes, run))
        else:
            _gather(port, num_processes, run)
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id,
            initialization_timeout=JOIN_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )  # fmt: skip
    except ValueError as e:
        raise UserError(
            f"the processes did not find each other ({_one_line(e)}): start all of them with the same --coordinator "
            "and --num_processes, or on a pod with --distributed"
        ) from e
    except jax.errors.JaxRuntimeError as e:
        hosts.exit_at_once(hosts.LOST, f"the processes cannot connect to each other ({_one_line(e)}): ")
    hosts.watch()
    log.info("process %d of %d, with %d of %d devices", jax.process_index(), jax.process_count(),
             jax.local_device_count(), jax.device_count())  # fmt: skip


def _address(coordinator):
    host, _, port = coordinator.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal()) or not 0 < int(port) < 2**16:
        raise UserError(
            f"--coordinator={coordinator}: expected HOST:PORT of process 0, such as 10.0.0.2:8476, with a port from 1 "
            "to 65535"
        )
    return host.strip("[]"), int(port)


def _hello(number, count, run):
    return {"ivideo": "joins", "process": number, "count": count, "run": run, "host": socket.gethostname()}


def _gather(port, count, run):
    """Called by process 0: returns when all other processes have connected, after answering them."""
    deadline = time.monotonic() + JOIN_SECONDS
    waiting = {}  # process number: (connection, host)
    strangers = {}  # (process, host, run) of another run: the time of its first connection
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(port, deadline))
        while len(waiting) < count - 1:
            if time.monotonic() > deadline:
                absent = ", ".join(str(n) for n in range(1, count) if n not in waiting)
                _exit_lost(f"process {absent} of {count} did not connect to port {port} of {socket.gethostname()} in "
                           f"{JOIN_SECONDS} s: start all processes, and let them reach that port")  # fmt: skip
            try:
                connection = stack.enter_context(server.accept()[0])
            except TimeoutError:
                continue
            hello = _read(connection, seconds=5)
            waiting = {number: entry for number, entry in waiting.items() if not _is_closed(entry[0])}
            if hello.keys() != _hello(0, 0, "").keys():  # not a process of ivideo
                connection.close()
            elif hello["run"] != run and not _keeps_coming(hello, strangers, waiting):
                _send(connection, wait=f"another run ({run}) uses that port: give each run its own")
                connection.close()
            elif problem := _problem(hello, count, run, waiting):
                for other, _ in [*waiting.values(), (connection, "")]:
                    _send(other, error=problem)
                raise UserError(problem)
            else:
                waiting[hello["process"]] = connection, hello["host"]
        for connection, _ in waiting.values():
            _send(connection, go=True)


def _keeps_coming(hello, strangers, waiting):
    """Whether a process of another run has tried for `STRANGER_SECONDS`, and this run lacks a process of its number."""
    key = hello["process"], hello["host"], hello["run"]
    if key not in strangers:
        strangers[key] = time.monotonic()
        log.warning("process %s of another run (%s) on %s connected: it has to wait", key[0], key[2], key[1])
    return hello["process"] not in waiting and time.monotonic() - strangers[key] > STRANGER_SECONDS


def _problem(hello, count, run, waiting):
    """The error for a process whose arguments contradict this run's, or an empty string."""
    number, host = hello["process"], hello["host"]
    if hello["run"] != run:
        return (
            f"process {number} ({host}) has --workdir={hello['run']}, and process 0 ({socket.gethostname()}) "
            f"--workdir={run}: give all processes the same --workdir, or each run its own port"
        )
    if hello["count"] != count:
        return (
            f"process {number} ({host}) has --num_processes={hello['count']}, and process 0 ({socket.gethostname()}) "
            f"--num_processes={count}: give all processes the same number"
        )
    taken = {0: socket.gethostname(), **{other: entry[1] for other, entry in waiting.items()}}
    if number in taken:
        return f"two processes have --process_id={number}, on {taken[number]} and on {host}: give each its own"
    return ""


def _listen(port, deadline):
    """The socket that the other processes connect to. Waits while another program uses the port."""
    dual = socket.has_dualstack_ipv6()  # as jax's own service, which listens here later
    warned = False
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
                _exit_lost(f"{busy} after {JOIN_SECONDS} s: give another port with --coordinator")
            if not warned:
                log.warning("%s: waiting up to %d s, since another run may use it", busy, JOIN_SECONDS)
                warned = True
            time.sleep(0.5)


def _connect(host, port, hello):
    """Called by every process but process 0: returns when process 0 answers that all processes have connected."""
    deadline = time.monotonic() + JOIN_SECONDS
    warned_of = ""
    while True:
        try:
            with socket.create_connection((host, port), timeout=5) as connection:
                _send(connection, **hello)
                answer = _read(connection, seconds=deadline - time.monotonic())
            problem = "another program answers there, perhaps another run"
        except OSError as e:
            answer, problem = {}, e.strerror or str(e)
        if answer.get("go"):
            return
        if "error" in answer:
            raise UserError(answer["error"])
        problem = answer.get("wait", problem)
        if time.monotonic() > deadline:
            _exit_lost(
                f"--coordinator={host}:{port} did not answer in {JOIN_SECONDS} s ({problem}): start process 0 there "
                "with the same address, and let the other processes reach that port"
            )
        if "another" in problem and problem != warned_of:
            log.warning("--coordinator=%s:%d: %s; waiting up to %d s", host, port, problem, JOIN_SECONDS)
            warned_of = problem
        time.sleep(0.5)


def _send(connection, **message):
    with contextlib.suppress(OSError):  # if the other process is gone, the next check of connections finds out
        connection.sendall(json.dumps(message).encode() + b"\n")


def _read(connection, *, seconds):
    """Reads one line, a JSON object; returns an empty dict where there is none."""
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


def _one_line(error):
    return " ".join(str(error).split())[:300]


def _exit_lost(message):
    """Exits. The processes are not connected yet, so there is none to notify."""
    log.error("%s (exit code %d)", message, hosts.LOST)
    sys.exit(hosts.LOST)
