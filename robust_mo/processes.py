"""Commands as processes of this machine, so many at a time.

Promises: a command begins when those that it comes after have ended, well or not; what it prints goes into a file of
its own; whatever ends `run` early, each command is told to save and end, once, and waited for.
Knows nothing of what the commands do, but that SIGTERM makes them save and end.
"""

import os
import pathlib
import subprocess
import time
from collections.abc import Callable, Mapping

# Names of how much of a GPU's memory a process of jax takes; every program of ours has set one (command_line.py).
_GPU_SHARE = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")


def run(
    commands: Mapping[str, tuple[list[str], tuple[str, ...]]],
    at_once: int,
    folder: pathlib.Path,
    on_wait: Callable[[], None],
    on_change: Callable[[str, int | None], None],
) -> None:
    """Returns when all commands have ended.

    Args:
      commands: name -> (words, names of those that must have ended before).
      at_once: how many run beside one another, and share the memory of a GPU if there is one.
      folder: for what they print, NAME.txt.
      on_wait: called again and again; may raise to stop.
      on_change: called with (name, None) when a command begins, with (name, exit status) when it has ended.
    """
    shares = {name: f"{float(os.environ[name]) / at_once:.3f}" for name in _GPU_SHARE if name in os.environ}
    environment = os.environ | shares
    folder.mkdir(parents=True, exist_ok=True)
    waiting, running = dict(commands), {}
    try:
        while waiting or running:
            for name, (words, after) in list(waiting.items()):
                if len(running) < at_once and not any(other in waiting or other in running for other in after):
                    with (folder / f"{name}.txt").open("ab") as printed:
                        # In a session of its own, so that Ctrl-C reaches it once, through us.
                        running[name] = subprocess.Popen(
                            words, env=environment, stdout=printed, stderr=printed, start_new_session=True
                        )
                    del waiting[name]
                    on_change(name, None)
            on_wait()
            time.sleep(0.2)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    on_change(name, process.returncode)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
