"""Several hosts that run one program together: how they meet, agree, speak and stop.

Promises: every host makes the same calls in the same order, as jax asks of them; what depends on files, which the first
host writes and the others may see later, is read by the first and told to the others (`by_first`); the first alone
prints and writes into run folders; when one dies, the others end within a minute.
On a single host all of this does nothing.  Finding each other, heartbeats and the step at which all stop are jax's own
(`jax.distributed`).
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import socket
import sys
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

from robust_mo.errors import InputError, passes, said
from robust_mo.model import mesh as meshes
from robust_mo.runs import Onlooker, RunFolder

# A host that has not been heard of for so long is dead; the same again for the rest to notice makes less than a minute.
_HEARTBEAT_SECONDS = 20
# More than meshes.waiting lets it take.
_JAX_GIVES_UP_SECONDS = 1200

# In what jax says of a coordinator that does not answer, or of Kubernetes where it does not know its address yet.
_LATER = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "Retry failed")

STOPPED_STATUS = "ROBUST_MO_STOPPED_STATUS"
"""The environment variable that holds the exit status after a stop on request, 0 where it is not set: what starts
programs again by their status has to tell a stop from the end."""

_met = False


def start(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Meets the other hosts; must come before any computation.

    Args:
      coordinator_address: "host:port" of the first; None, like the others: what jax finds out from SLURM, a TPU's
        metadata, Open MPI or Kubernetes; where it finds nothing, the program runs alone.
      num_processes, process_id: how many take part, and which of them this is.

    Raises:
      InputError: what was given cannot be used, or a device cannot be used.  Where they do not find each other, in ten
        minutes or as a cluster says sooner, the process ends with a line, and status 2 or, where it is set, that of
        STOPPED_STATUS, so that what starts it again does so: jax would end it by a signal.
    """
    if coordinator_address and not re.fullmatch(r".+:\d+", coordinator_address):
        raise InputError(f"--coordinator_address={coordinator_address}: give host:port of the first host")
    told = (
        "for the other hosts: start the same command on every one of them (launch/tpu_pod.sh does), and "
        "let them reach the first one's port, which on TPUs is 8482 since jax 0.8.1; where only the old 8476 is open, "
        "set JAX_COORDINATOR_PORT=8476 on all"
    )
    global _met
    found, stopped = {}, int(os.environ.get(STOPPED_STATUS, 2))
    if {coordinator_address, num_processes, process_id} == {None} and _only_task_of_slurm():
        # jax would give it one GPU, that of the task's number, and every program of a job the same port.
        with socket.socket() as free:
            free.bind(("localhost", 0))
            coordinator_address, num_processes, process_id = f"localhost:{free.getsockname()[1]}", 1, 0
        found = {"cluster_detection_method": "deactivate", "coordinator_bind_address": coordinator_address}
    try:
        with meshes.waiting(told, stopped):
            jax.distributed.initialize(
                coordinator_address,
                num_processes,
                process_id,
                initialization_timeout=_JAX_GIVES_UP_SECONDS,
                heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=_HEARTBEAT_SECONDS,
                **found,
            )
    except ValueError as error:
        given = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
        if set(given.values()) == {None} and "coordinator_address should be defined" in str(error):
            return
        shown = ", ".join(f"--{name}={value}" for name, value in given.items())
        raise InputError(f"{shown}: {error} give all three, or none where the cluster tells them") from None
    except RuntimeError as error:
        wrong = (
            f"the hosts do not find each other ({' '.join(str(error).split())[:200]}): start the same command on every "
            "one of them, and let them reach the first one's port"
        )
        if not any(words in str(error) for words in _LATER):
            raise InputError(wrong) from None
        print(f"error: {wrong}", file=sys.stderr)
        sys.exit(stopped)
    _met = True
    meshes.all_devices()
    if not first():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _only_task_of_slurm() -> bool:
    """Of a step that is not Open MPI's to share out."""
    step = "SLURM_STEP_NODELIST" in os.environ and "OMPI_MCA_orte_hnp_uri" not in os.environ
    return step and os.environ.get("SLURM_NTASKS") == "1"


def together() -> bool:
    """Whether this process has met others, and jax listens for SIGTERM."""
    return _met


def first() -> bool:
    """Whether this is the host that prints and writes."""
    return not together() or jax.process_index() == 0


def run_folder(path) -> RunFolder:
    """The run folder as this host may use it."""
    return RunFolder(path) if first() else Onlooker(path)


def by_first(work: Callable):
    """What `work` returns on the first host, of JSON, on every host; what it finds wrong is raised on all of them.

    Raises:
      InputError: as `work` does, or for an OSError of it that does not pass.
      OSError: one that passes, see errors.py.
    """
    if not together():
        return work()
    found = wrong = None
    passing = False
    if first():
        try:
            found = work()
        except InputError as error:
            wrong = str(error)
        except OSError as error:
            wrong, passing = said(error), passes(error)
    found, wrong, passing = agreed((found, wrong, passing))
    if wrong is not None:
        raise OSError(errno.EIO, wrong) if passing else InputError(wrong)
    return found


@contextlib.contextmanager
def first_holds(hold: Callable[[], contextlib.AbstractContextManager]):
    """Within the block the first host is within `hold()`, such as a lock; what speaks against it is raised on all."""
    with contextlib.ExitStack() as held:

        def enter() -> None:
            held.enter_context(hold())

        by_first(enter)
        yield


def agreed(value):
    """The first host's `value`, of JSON, on every host."""
    if not together():
        return value
    told = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(told))))
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(np.resize(told, size))))


def check_same(what: str, value) -> None:
    """Raises InputError on all hosts where one has another `value`, of JSON, than the first: computing together with
    different input, they would wait for one another, or mix it."""
    if not together():
        return
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    if anywhere(agreed(digest) != digest):
        raise InputError(f"not all hosts have read the same {what}: let all of them see the same files")


def anywhere(found: bool) -> bool:
    """Whether any host has found it."""
    return bool(multihost_utils.process_allgather(np.array(found)).any()) if together() else found


_calls = 0


def stopping() -> bool:
    """Whether SIGTERM has come to any of the hosts: on all of them from the same call on."""
    global _calls
    _calls += 1
    return multihost_utils.reached_preemption_sync_point(_calls)
