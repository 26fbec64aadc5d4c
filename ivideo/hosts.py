"""Several processes, on one machine or many, as one program."""

import logging

import jax

from ivideo.errors import UserError

log = logging.getLogger("ivideo")
JOIN_SECONDS = 300  # for all processes to be there
HEARTBEAT_SECONDS = 40  # without a sign of life, and the others are told that a process is lost


def join(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Makes this process one of several: before anything else of jax, in every one of them.

    Without arguments the surroundings tell (Cloud TPU, GKE, Slurm); else all three are needed: the address HOST:PORT of
    the first process, their number, and this one's, from 0. UserError where they disagree, or where not all processes
    come within five minutes.
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
        if not host or not port.isdigit():
            raise UserError(
                f"--coordinator={coordinator}: expected HOST:PORT of the first process, such as 10.0.0.2:8476"
            )
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
