"""Commands as jobs of SLURM, which the library submitit submits.

Promises: a job that nears its time limit or is preempted saves and goes back into the queue, as does one whose command
dies of a signal (out of memory, kill -9), while those that wait for it go on waiting; one that ends by itself, well or
with an error, or is cancelled (scancel), has ended, and they start.  Of two jobs with one name the second waits for the
first.
Knows nothing of what the commands do, but that SIGTERM makes them save and end.
"""

import contextlib
import pathlib
import shutil
import signal
import subprocess
import sys
import time

from robust_mo.errors import InputError

_WARNING_SECONDS = 180  # so long before its time limit a job is told to save

# After the command, in the job's script.  SLURM queues a preempted job again only if the grace time was too short for
# it; 255 is submitit's own status when it has put the job back into the queue.
_AGAIN = """
status=$?
if scontrol show job "$SLURM_JOB_ID" | grep -q 'PreemptTime=[0-9]'; then
  echo "the job makes room for another: it goes back into the queue, and on from what was saved" >&2
  scontrol requeue "$SLURM_JOB_ID"
elif [ "$status" -gt 128 ] && [ "$status" -lt 255 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 10 ]; then
  echo "the job died of signal $((status - 128)): it goes back into the queue, and on from what was saved" >&2
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


class Command:
    """A command as submitit runs it, in a process of its own so that it can be a program with its own signals."""

    def __init__(self, words: list[str]):
        self._words = words
        self._process = None

    def __call__(self) -> None:
        # The warning goes to every process of a job and is for submitit alone, which calls `checkpoint` then.
        def ignore_warning():
            signal.signal(signal.SIGUSR2, signal.SIG_IGN)

        self._process = subprocess.Popen(self._words, preexec_fn=ignore_warning)
        while (status := self._process.poll()) is None:
            time.sleep(0.5)  # not wait(), which holds a lock that `checkpoint`, called on top of it, would need
        if status:
            sys.exit(status if status > 0 else 128 - status)

    def checkpoint(self):
        """Has the command save and end; returns what is to be done when the job starts again."""
        from submitit.helpers import DelayedSubmission

        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=_WARNING_SECONDS - 30)
        return DelayedSubmission(Command(self._words))


class Queue:
    """Where commands are submitted.

    Args:
      folder: for the jobs' scripts and what they print; all nodes must see it.
      settings: `partition` and `gpus`, None for the cluster's own, `cpus`, and `minutes` at one go.

    Raises:
      InputError: there is no submitit or no SLURM.
    """

    def __init__(self, folder: pathlib.Path, settings: dict):
        try:
            import submitit
        except ImportError:
            raise InputError(
                f"--executor=slurm needs the library submitit: {sys.executable} -m pip install submitit"
            ) from None
        if not (shutil.which("sbatch") and shutil.which("srun")):
            raise InputError("--executor=slurm needs SLURM's sbatch and srun: start it on a machine of the cluster")
        self._executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=1000)
        self._settings = dict(
            nodes=1,
            tasks_per_node=1,
            cpus_per_task=settings["cpus"],
            gpus_per_node=settings["gpus"],
            timeout_min=settings["minutes"],
            stderr_to_stdout=True,
            slurm_partition=settings["partition"],
            slurm_signal_delay_s=_WARNING_SECONDS,
            # Since 22.05 srun does not take what was asked of sbatch.
            slurm_setup=["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"],
            slurm_teardown=[_AGAIN],
        )
        self._numbers: dict[str, str] = {}

    def submit(self, title: str, words: list[str], after: tuple[str, ...], name: str) -> str:
        """Submits a command as the job `name`, to start when the jobs `after` have ended; returns its number.

        `title` is its name in the whole cluster.

        Raises:
          InputError: SLURM does not take it.
        """
        from submitit.core.utils import FailedJobError

        waits = [":".join(["afterany", *(self._numbers[other] for other in after)])] if after else []
        dependency = ",".join([*waits, "singleton"])
        self._executor.update_parameters(**self._settings, name=title, slurm_dependency=dependency)
        try:
            job = self._executor.submit(Command(words))
        except FailedJobError as error:
            said = str(error).strip().splitlines()[-1]
            raise InputError(
                f"SLURM does not take the job {name} ({said}): see --slurm_partition and --slurm_gpus"
            ) from None
        self._numbers[name] = job.job_id
        return job.job_id
