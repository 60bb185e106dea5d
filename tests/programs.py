"""The programs as a user starts them, each in a process of its own."""

import multiprocessing
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import threading

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
PROGRAMS = ("train", "sample", "evaluate", "export", "study", "chat", "preflight")
_SECONDS = 600

# Its processes are children of one that has imported everything and computed nothing: they start in a second, not ten.
# Python has one such server, and whoever starts it first says what it imports: nobody else may ask for another.
forked = multiprocessing.get_context("forkserver")
forked.set_forkserver_preload(
    [*(f"robust_mo.{program}" for program in PROGRAMS), "transformers.tokenization_utils_tokenizers"]
)


class Program:
    """A program under way in a process of `forked`, with the methods of subprocess.Popen that tests use."""

    def __init__(self, name: str, arguments: list[str], cwd: pathlib.Path, env: dict[str, str]):
        self.args = [name, *arguments]
        reading, writing = zip(*(forked.Pipe(duplex=False) for _ in range(2)), strict=True)
        self._process = forked.Process(target=_main, args=(name, arguments, cwd, env, writing), daemon=True)
        self._process.start()
        for end in writing:
            end.close()
        self.stdout, self.stderr = (open(os.dup(end.fileno()), errors="replace") for end in reading)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        said: dict[int, str] = {}
        streams = (self.stdout, self.stderr)
        readers = [
            threading.Thread(target=lambda n=n: said.update({n: streams[n].read()}), daemon=True) for n in (0, 1)
        ]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join()
        return said[0], said[1]

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind:  # a test that has failed, for one because time was up, must not wait for it
            self.kill()
        self._process.join()
        self.stdout.close()
        self.stderr.close()


def start(program: str, *arguments, cwd: pathlib.Path = REPOSITORY, **environment: str) -> Program:
    """`python -m robust_mo.<program>` in a folder, with `environment` beside ours."""
    return Program(program, [str(word) for word in arguments], cwd, {**os.environ, **environment})


def run(program: str, *arguments, **environment: str) -> subprocess.CompletedProcess:
    """As `start` in the repository's folder, to the end."""
    with start(program, *arguments, **environment) as process:
        out, err = process.communicate(timeout=_SECONDS)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def start_anew(program: str, *arguments, **settings) -> subprocess.Popen:
    """A process that imports by itself, with settings of Popen; in the repository's folder."""
    command = [sys.executable, "-m", f"robust_mo.{program}", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings
    )


def run_anew(program: str, *arguments, **settings) -> subprocess.CompletedProcess:
    """As `start_anew`, to the end."""
    with start_anew(program, *arguments, **settings) as process:
        try:
            out, err = process.communicate(timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def _main(program: str, arguments: list[str], cwd: pathlib.Path, env: dict[str, str], writing: tuple) -> None:
    for number, end in enumerate(writing, start=1):
        os.dup2(end.fileno(), number)
        end.close()
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1, errors="backslashreplace")  # as Python's own
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    import jax

    for name in ("JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR"):  # which it reads while it is imported
        jax.config.update(name.lower(), env.get(name))
    sys.argv = [program, *arguments]
    sys.modules.pop(f"robust_mo.{program}", None)  # that it was imported before would be warned of
    runpy.run_module(f"robust_mo.{program}", run_name="__main__", alter_sys=True)
