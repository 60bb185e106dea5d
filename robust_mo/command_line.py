"""How every program begins, speaks, stops and ends.

Promises: a user's mistake ends in one line on stderr and exit status 2, also where it shows inside a library's flag
parsing; SIGINT and SIGTERM are noticed at safe points (`check_interrupt`) so that work can be saved, and a second one
stops at once; compiled programs are kept between starts.  Our own bugs keep their traceback.
Does not know what any program does.
"""

import contextlib
import difflib
import os
import re
import signal
import sys
import time
from collections.abc import Callable

from absl import flags
from ml_collections import ConfigDict, config_flags

from robust_mo.errors import InputError

_SECONDS_BETWEEN_LINES = 5.0


class Interrupted(Exception):
    """The user or the machine asked to stop; raised at a point where nothing is half done."""


_requested = False


def _request(number, frame):
    global _requested
    if _requested:
        raise KeyboardInterrupt
    _requested = True
    print(f"\n{signal.Signals(number).name}: saving, then stopping (once more: stop at once)", file=sys.stderr)


def interrupt_requested() -> bool:
    return _requested


def check_interrupt() -> None:
    """Raises Interrupted where SIGINT or SIGTERM has come."""
    if _requested:
        raise Interrupted


def run(main: Callable[[flags.FlagValues], None], define_flags: Callable[[], None], required: tuple[str, ...]) -> None:
    """Defines and parses the flags, then calls `main` with them; ends the process.

    Flags are defined here and not where a module is imported, so that one program can call another.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _request)
    try:
        define_flags()
        flags.mark_flags_as_required(required)
        _parse_flags()
        _keep_compiled_programs()
        main(flags.FLAGS)
    except Interrupted:
        from robust_mo.runs import command_line

        _end(0, f"stopped; the same command goes on: {command_line()}")
    except KeyboardInterrupt:
        _end(130, "stopped at once; the same command goes on from what was saved")
    except InputError as error:
        _end(2, f"error: {error}")
    except BrokenPipeError:
        # Whoever read our output has gone; nothing can be said any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _end(2, f"error: {where}{error.strerror or error}")


def _end(status: int, line: str) -> None:
    print(" ".join(line.split()), file=sys.stderr, flush=True)
    sys.exit(status)


def _parse_flags() -> None:
    arguments = sys.argv[1:]
    if {"--help", "-h", "-help"} & set(arguments):
        module = sys.modules["__main__"]
        print(module.__doc__.strip(), "\n\nflags:")
        print(flags.FLAGS.main_module_help())
        sys.exit(0)
    try:
        rest = flags.FLAGS(sys.argv)[1:]
    except InputError:
        raise
    except flags.UnrecognizedFlagError as error:
        known = [name for name in flags.FLAGS if len(name) > 1]
        raise InputError(f"unknown flag --{error.flagname}{_nearest(error.flagname, known)}; see --help") from None
    except (KeyError, AttributeError) as error:
        raise InputError(_explain_override(arguments, error)) from None
    except FileNotFoundError as error:
        raise InputError(f"{error.filename or error}: no such config file; configs/ holds the ones we ship") from None
    except ImportError as error:
        raise InputError(f"the config file cannot be imported ({error}): run from the folder that holds configs/") from None
    except (flags.Error, TypeError, ValueError) as error:
        raise InputError(str(error)) from None
    if rest:
        raise InputError(f"unexpected argument {rest[0]!r}: flags are written --name=value; see --help")


def _explain_override(arguments: list[str], error: Exception) -> str:
    """Names the mistyped part of a `--config.a.b=v`, and what was probably meant."""
    for argument in arguments:
        if match := re.match(r"--?(?:no)?config\.([\w.\[\]]+)", argument):
            config = _config_of(arguments)
            known = list(flatten(config)) if config is not None else []
            if match[1] not in known:
                return f"config has no field {match[1]!r} (in {argument}){_nearest(match[1], known)}"
    return f"cannot read the config: {error}"


def _config_of(arguments: list[str]) -> ConfigDict | None:
    """The config without any override, to compare names with."""
    files = [a.split("=", 1)[1] for a in arguments if re.match(r"--?config=", a)]
    holder = flags.FlagValues()
    default = flags.FLAGS["config"].default if "config" in flags.FLAGS else None
    config_flags.DEFINE_config_file("config", default, flag_values=holder)
    with contextlib.suppress(Exception):
        holder(["", *(f"--config={file}" for file in files)])
        return holder["config"].value
    return None


def _nearest(word: str, known: list[str]) -> str:
    found = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if not found:
        last = {name.rsplit(".", 1)[-1]: name for name in known}
        found = [last[name] for name in difflib.get_close_matches(word.rsplit(".", 1)[-1], last, n=1)]
    return f": did you mean {found[0]!r}?" if found else ""


def flatten(config: ConfigDict | dict, prefix: str = "") -> dict[str, object]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict | dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat


def _keep_compiled_programs() -> None:
    """jax's compilation cache on disk, unless the user has set one up."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    import jax

    from robust_mo.model.sources import cache_folder

    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "jax"))


class Progress:
    """Now and then one line: what is done, how fast, how long it will still take; nothing in the first seconds.

    Args:
      first: what was done before this process began.
    """

    def __init__(self, what: str, total: int, unit: str, first: int = 0):
        self._what, self._total, self._unit, self._first = what, total, unit, first
        self._start = self._shown = time.monotonic()

    def __call__(self, done: int, note: str = "") -> None:
        """Reports that `done` of the total are done; raises Interrupted where that was asked for."""
        check_interrupt()
        now = time.monotonic()
        if now - self._shown < _SECONDS_BETWEEN_LINES:
            return
        self._shown = now
        rate = (done - self._first) / (now - self._start)
        left = f"{clock((self._total - done) / rate)} left" if rate else "first ones under way"
        print(f"{self._what} {done}/{self._total} {self._unit}  {note}  {left}", flush=True)


def evaluation_progress() -> Callable[[str, int, int, int], None]:
    """What evals/subject.py calls: one Progress for each evaluator."""
    lines: dict[str, Progress] = {}

    def on_progress(name: str, done: int, total: int, tokens: int) -> None:
        lines.setdefault(name, Progress(f"  {name}", total, "prompts"))(done, f"{tokens} tokens")

    return on_progress


def clock(seconds: float) -> str:
    """75 -> '1m15s'"""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
