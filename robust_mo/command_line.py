"""How every program begins, speaks, stops and ends.

Promises: a user's mistake ends in one line on stderr and exit status 2, also where it shows inside a library's flag
parsing; SIGINT and SIGTERM are noticed at safe points (`check_interrupt`) so that work can be saved, and a second one
stops at once; where whoever read what is printed has gone, the work goes on unheard; compiled programs are kept between
starts.  Our own bugs keep their traceback.
Does not know what any program does.
"""

import contextlib
import difflib
import importlib.util
import io
import itertools
import logging as python_logging
import os
import pathlib
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence

import jax
from absl import flags, logging
from ml_collections import ConfigDict

from robust_mo import hosts, runs
from robust_mo.errors import InputError, first_line, passes, said
from robust_mo.hosts import STOPPED_STATUS
from robust_mo.model import mesh as meshes
from robust_mo.model.sources import cache_folder

_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_OF_ONE_SIGNAL = 0.2  # coreutils' timeout sends it to the program, and at once again to its whole group
_SECONDS_FOR_THE_OTHERS = 15.0  # less than jax waits (hosts.py)
DEFAULT_CONFIG = pathlib.Path(__file__).resolve().parent.parent / "configs" / "default.py"


class Interrupted(Exception):
    """The user or the machine asked to stop; raised at a point where nothing is half done."""


_requested: float | None = None  # when, by time.monotonic


def _request(number, frame):
    global _requested
    if _requested is None:
        _requested = time.monotonic()
        _shout(f"\n{signal.Signals(number).name}: saving, then stopping (once more: stop at once)\n")
    elif time.monotonic() - _requested < _SECONDS_OF_ONE_SIGNAL:
        return
    else:  # no exception and no clean-up: both would wait for a checkpoint that is being written
        _shout("stopped at once; the same command goes on from what was saved\n")
        os._exit(130)
    if hosts.together():
        os.kill(os.getpid(), signal.SIGTERM)  # jax tells the other hosts


def _shout(line: str) -> None:
    """Not through sys.stderr, which may be in the middle of a line; and a terminal that is closed hears nothing."""
    with contextlib.suppress(OSError):
        os.write(2, line.encode())


def check_interrupt() -> None:
    """Raises Interrupted where SIGINT or SIGTERM has come; of several hosts on all of them, in the same call."""
    if hosts.stopping() if hosts.together() else _requested is not None:
        raise Interrupted


def define_host_flags() -> None:
    """For programs that several hosts can run together."""
    flags.DEFINE_string("coordinator_address", None, "host:port of the first of several hosts that run this together")
    flags.DEFINE_integer("num_processes", None, "how many they are; under SLURM and on TPUs these are found out")
    flags.DEFINE_integer("process_id", None, "which of them this is, from 0")


def run(
    main: Callable[[flags.FlagValues], None],
    define_flags: Callable[[], None],
    required: tuple[str, ...],
    default_config: pathlib.Path | None = None,
) -> None:
    """Defines and parses the flags, then calls `main` with them; ends the process.

    Flags are defined here and not where a module is imported, so that one program can call another.

    Args:
      required: flags that must be given.
      default_config: what --config stands for where it is not given; as that flag's own default the library would parse
        it, with overrides that may be another file's, before anything can be said about them.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _request)
    sys.unraisablehook = _print_unraisable
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # of a terminal that lacks a letter
            setattr(sys, name, _Unheard(stream))
    try:
        # Libraries print tracebacks of what they also raise, and what they raise we say in a line.
        logging.set_verbosity(logging.FATAL)
        # When a save fails, the writes that Orbax had begun beside the one whose failure it raises end in this log; so
        # does, of every attempt, that the hub cannot be reached.
        for name in ("asyncio", "gcsfs", "huggingface_hub"):
            python_logging.getLogger(name).setLevel(python_logging.CRITICAL)
        os.environ.setdefault("HF_HUB_VERBOSITY", "critical")  # the same, where it is imported later and sets its own
        define_flags()
        _parse_flags(required, default_config)
        # XLA uses half of what AVX-512 offers unless told; a training step of SmolLM2 takes 8% less.
        os.environ["XLA_FLAGS"] = f"--xla_cpu_prefer_vector_width=512 {os.environ.get('XLA_FLAGS', '')}"
        # Left alone, jax takes three quarters of a GPU.  What is not taken is for CUDA itself and for NCCL's buffers.
        if "XLA_CLIENT_MEM_FRACTION" not in os.environ:  # its other name, and jax refuses both
            os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
        _keep_compiled_programs()
        meshes.leave_out_absent_tpus()
        if "coordinator_address" in flags.FLAGS:
            hosts.start(*(flags.FLAGS[name].value for name in ("coordinator_address", "num_processes", "process_id")))
            if _requested is not None and hosts.together():  # before there was anyone to tell
                os.kill(os.getpid(), signal.SIGTERM)
        main(flags.FLAGS)
    except Interrupted:
        if hosts.first():
            _say(f"stopped; the same command goes on: {runs.command_line()}")
        sys.exit(int(os.environ.get(STOPPED_STATUS, 0)))
    except InputError as error:
        _end(2, f"error: {error}")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        less = "in training raise config.batch.micro_batches, in sampling lower the batch_size"
        _end(2, f"error: the device is out of memory ({' '.join(str(error).split())[:200]}): {less}")
    except MemoryError as error:
        _end(
            2, f"error: the host is out of memory ({first_line(error)}): lower config.batch.rows or config.data.length"
        )
    except OSError as error:
        _end(1 if passes(error) else 2, f"error: {said(error)}")


def _print_unraisable(found) -> None:
    # When a save has failed, tensorstore's threads still call the event loop that Orbax has closed; the failure itself
    # is raised where it can be told in a line.
    if str(found.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(found)


class _Unheard:
    """A stream that takes on what is written to it where whoever read it has gone, or the disk is full."""

    def __init__(self, stream: io.TextIOWrapper):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._lost():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._lost():
            self._stream.flush()

    @contextlib.contextmanager
    def _lost(self):
        try:
            yield
        except BlockingIOError:  # a slow reader: this line alone
            pass
        except OSError:  # from now on
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def _say(line: str) -> None:
    print(" ".join(line.split()), file=sys.stderr, flush=True)


def _end(status: int, line: str) -> None:
    _say(line)
    if hosts.together():
        # jax waits for the other hosts here and aborts where they do not come: what is wrong with one alone has to end
        # with this status all the same.
        end = threading.Timer(_SECONDS_FOR_THE_OTHERS, os._exit, (status,))
        end.daemon = True
        end.start()
    sys.exit(status)


def _parse_flags(required: tuple[str, ...], default_config: pathlib.Path | None) -> None:
    # Of --config=~/mine.py a shell leaves the ~.
    sys.argv[1:] = [re.sub("^--?config=~[^:]*", lambda m: _expanded(m[0]), argument) for argument in sys.argv[1:]]
    arguments = sys.argv[1:]
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise InputError(f"argument {argument!r} is not UTF-8: retype it, or rename the folder") from None
    if {"--help", "-h", "-help"} & set(arguments):
        needed = ", ".join(f"--{name}" for name in required)
        print(sys.modules["__main__"].__doc__.strip(), f"\n\nflags, of which {needed} must be given:")
        print(flags.FLAGS.main_module_help().replace("\n    (default: 'None')", ""))
        print(flags.FLAGS.module_help(sys.modules[__name__]))
        sys.exit(0)
    unsaid = []
    if "config" in flags.FLAGS:
        given = [match[1] for a in arguments if (match := re.match(r"--?config=(.*)", a))]
        given += [following for a, following in itertools.pairwise(arguments) if a in ("--config", "-config")]
        if default_config and not given:
            given, unsaid = [str(default_config)], [f"--config={default_config}"]
        if given:
            _check_config(given[-1], arguments)
    try:
        rest = flags.FLAGS([sys.argv[0], *unsaid, *arguments])[1:]
    except flags.UnrecognizedFlagError as error:
        known = [name for name in flags.FLAGS if len(name) > 1 and "." not in name]
        flag, dot, field = error.flagname.partition(".")  # of --confg.seed it is the first word that is unknown
        if dot and flag == "config" and flag in known:
            raise InputError(f"--{error.flagname} changes a field of --config, which is not given: add it") from None
        meant = nearest(flag, known, dot + field)
        raise InputError(f"unknown flag --{error.flagname}{meant}; see --help") from None
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError) as error:
        raise InputError(str(error)) from None
    if rest:
        raise InputError(f"unexpected argument {rest[0]!r}: flags are written --name=value; see --help")
    status = os.environ.get(STOPPED_STATUS, "0")
    if not status.isdecimal() or int(status) > 255:
        raise InputError(f"{STOPPED_STATUS} is {status!r}: give an exit status, from 0 to 255")
    if missing := [f"--{name}" for name in required if flags.FLAGS[name].value in (None, "", [], [""])]:
        raise InputError(f"{', '.join(missing)} must be given; see --help")


def _expanded(argument: str) -> str:
    flag, _, path = argument.partition("=")
    return f"{flag}={os.path.expanduser(path)}"


def _check_config(config: str, arguments: list[str]) -> None:
    """Finds what is wrong with --config and its overrides before the library does, which would not say it in a line.

    Raises:
      InputError: the file cannot be loaded, or an override names a field that it does not have.
    """
    file, colon, argument = config.partition(":")
    if colon and not argument:
        raise InputError(f"--config={config} ends in a colon: give the file's argument, or leave the colon out")
    known = runs.flatten(load_config(file, argument))
    for override in arguments:
        if (match := re.match(r"--?(?:no)?config\.([^=\s\[]+)", override)) and match[1] not in known:
            if not any(name.startswith(match[1] + ".") for name in known):
                raise InputError(f"config has no field {match[1]!r} (in {override}){nearest(match[1], list(known))}")
            raise InputError(f"config.{match[1]} is a group of fields (in {override}): name one of them")


def load_config(file: str, argument: str) -> ConfigDict:
    """What `get_config` of a config file returns; the argument is left out where it is empty.

    Raises:
      InputError: there is no such file, or it cannot be run.
    """
    if not pathlib.Path(file).is_file() or pathlib.Path(file).suffix != ".py":
        beside = sorted(other.name for other in pathlib.Path(file).parent.glob("*.py"))
        there = f"; beside it there are {', '.join(beside)}" if beside else ""
        raise InputError(f"there is no config file {file}{there}: the ones we ship are in configs/ and end in .py")
    spec = importlib.util.spec_from_file_location("config_file", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(*[argument] if argument else [])
    except InputError as error:
        raise InputError(f"--config={file}:{argument}: {error}") from None
    except ImportError as error:
        ours = str(error.name).split(".")[0] in ("configs", "robust_mo")
        remedy = "run from the folder that holds configs/" if ours else "install what it imports"
        raise InputError(f"{file}: {error}; {remedy}") from None
    except Exception as error:  # whatever a user's file may raise
        raise InputError(f"{file} cannot be run as a config file ({type(error).__name__}: {error})") from None
    if not isinstance(config, ConfigDict):
        raise InputError(f"{file}: get_config() returned {type(config).__name__}: return an ml_collections.ConfigDict")
    return config


def recorded(run: runs.RunFolder, names: Sequence[str]) -> dict:
    """A run's config, which has these fields of a training config as programs of today want them.

    Raises:
      InputError: it has not; another version may have made it.
    """
    example, config = load_config(DEFAULT_CONFIG, "").to_dict(), run.config()
    check_fields(config, {name: example[name] for name in names}, origin=str(run.path / "config.json"))
    return config


def check_fields(
    config, example, group: str = "config", file: str = "configs/default.py", origin: str = "--config"
) -> None:
    """Raises InputError where `config` lacks a field of `example` or holds a value of another type there.

    Args:
      config, example: ConfigDicts or dicts.
      group, file, origin: for the message: what `config` is called, where to look for an example, where it comes from.
    """
    given, wanted = runs.flatten(config), runs.flatten(example)
    # "a.b.c" holds a, a.b and a.b.c.
    held = {
        part
        for name in given
        for part in itertools.accumulate(name.split("."), lambda group, field: f"{group}.{field}")
    }
    if missing := [f"{group}.{name}" for name in wanted if name not in held]:
        raise InputError(f"{origin} has no {', '.join(missing[:8])}; see {file}")
    for name, value in wanted.items():
        if name not in given:
            continue  # a group that is empty in the example and may hold anything
        kinds = {float: (float, int), tuple: (tuple, list)}.get(type(value), type(value))
        if not isinstance(given[name], kinds) or isinstance(given[name], bool) != isinstance(value, bool):
            raise InputError(
                f"{group}.{name} is {given[name]!r}: give a value of type {type(value).__name__}, such as {value!r}"
            )


def check_known(config, example, group: str = "config", file: str = "configs/default.py") -> None:
    """Raises InputError where `config` has a field that `example` does not have.  A group that is empty there may hold
    anything.  Args as of `check_fields`."""
    wanted = runs.flatten(example)
    anything = tuple(f"{name}." for name, value in wanted.items() if value == {})
    for name in runs.flatten(config):
        if name not in wanted and not name.startswith(anything):
            meant = nearest(name, list(wanted)) or "; take it out"
            raise InputError(f"{group}.{name} is no setting of this program{meant} (see {file})")


def check_range(name: str, value: float, lowest: float, highest: float = float("inf")) -> None:
    """Raises InputError for a value outside [lowest, highest], also for one that is not a number."""
    if not lowest <= value <= highest:
        most = "" if highest == float("inf") else f" and at most {highest}"
        raise InputError(f"{name} is {value}: give at least {lowest}{most}")


def nearest(word: str, known: list[str], rest: str = "") -> str:
    """ ": did you mean ...?" where one of the known words looks like it, with `rest` behind it; else nothing."""
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if not found:
        last = {name.rsplit(".", 1)[-1]: name for name in known}
        found = [last[name] for name in difflib.get_close_matches(word.rsplit(".", 1)[-1], last, n=1)]
    return f": did you mean {found[0] + rest!r}?" if found else ""


def _keep_compiled_programs() -> None:
    """jax's compilation cache on disk, where the user has set up none."""
    # A full disk is told of where it loses something; here it only costs time.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "jax"))


class Progress:
    """Now and then one line: what is done, how fast, how long it will still take; nothing in the first seconds.

    Time is counted from the first report on: what comes before is compiling.
    """

    def __init__(self, what: str, total: int, unit: str):
        self._what, self._total, self._unit = what, total, unit
        self._start, self._first, self._shown = None, 0, time.monotonic()

    def __call__(self, done: int, note: str = "") -> None:
        """Reports that `done` of the total are done."""
        now = time.monotonic()
        if self._start is None:
            self._start, self._first = now, done
        if now - self._shown < _SECONDS_BETWEEN_LINES or done == self._total:
            return
        self._shown = now
        new, seconds = done - self._first, now - self._start
        left = f"{clock((self._total - done) * seconds / new)} left" if new else "first ones under way"
        print(f"{self._what} {done}/{self._total} {self._unit}  {note}  {left}", flush=True)


def evaluation_progress() -> Callable[[str, int, int, int], None]:
    """What evals/subject.py calls: one Progress for each evaluator, and a point where an interrupt is noticed."""
    lines: dict[str, Progress] = {}
    rates: dict[str, tuple[float, int]] = {}  # from when on, and how many there were

    def on_progress(name: str, done: int, total: int, tokens: int) -> None:
        check_interrupt()
        begun, before = rates.setdefault(name, (time.monotonic(), tokens))
        rate = (tokens - before) / max(time.monotonic() - begun, 1e-3)
        lines.setdefault(name, Progress(f"  {name}", total, "prompts"))(done, f"{rate:.0f} tokens/s")

    return on_progress


def clock(seconds: float) -> str:
    """75 -> '1m15s'"""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
