"""The run folder: the unit of truth of every program.

    config.json          the config, with the command, git revision and versions that began the run
    records.jsonl        one line per measurement: step, name, value, count?, low?, high?, seed, revision, time
    transcripts/*.jsonl  every graded answer, one file per evaluator and step
    data.jsonl, data.md  of a training run: the conversations it is trained on, and a page about them
    checkpoints/         written by training/checkpoints.py
    events.out.tfevents* written by training/curves.py

Promises: nothing that was measured is overwritten; a run with the same config resumes, one with another config is
refused with both values shown; two processes never train or measure in one folder at once; files appear whole or not
at all; a line cut short by a kill is ignored and mended.  Where a measurement was repeated after a kill, the newest
line counts.
A folder may lie in a bucket (gs://...), which has no locks: there it is the user who keeps two processes apart; and
measurements may be half a minute late there, later where it does not take them, and are lost where a kill comes first.
Knows nothing of jax, models or what is measured.
"""

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time

from etils import epath

from robust_mo.errors import InputError, InUse, first_line, unreached


def place(path) -> "pathlib.Path | epath.Path":
    """A file or folder on this machine's disks, or in a bucket: epath.Path has the methods of pathlib.Path.

    Raises:
      InputError: a URL of another kind, or what reads a bucket is not installed.
    """
    kind, _, _ = str(path).partition("://")
    if kind == str(path) or isinstance(path, pathlib.Path):
        return pathlib.Path(os.path.expanduser(path))  # of --workdir=~/runs a shell leaves the ~
    if kind != "gs":
        raise InputError(f"{path} is neither a folder nor gs://BUCKET/...: mount it, and give where it is")
    if importlib.util.find_spec("gcsfs") is None:
        raise InputError(f"{path} is in a bucket: .venv/bin/python -m pip install gcsfs")
    return epath.Path(path)


def absolute(path):
    return path.absolute() if isinstance(path, pathlib.Path) else path


class GrowingObject:
    """A file in a bucket, where nothing can be added to one: all that was written is put there again now and then.

    Where that fails it is told, and tried again half a minute later; `close` raises where it goes on failing.
    """

    def __init__(self, path, content: bytes = b"", every: float = 30.0):
        self._path, self._content, self._every = path, bytearray(content), every
        self._put_at, self._late = -every, False

    def write(self, data: bytes) -> None:
        self._content += data
        self._late = True
        if time.monotonic() - self._put_at > self._every:
            self.put()

    def put(self) -> None:
        if self._late and (why := self._refused()):
            print(f"{self._path} cannot be written now: {why}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Tries three times.  Raises InputError where the bucket does not take it."""
        why = None
        for wait in (1, 5, 0):
            if not self._late or (why := self._refused()) is None:
                return
            time.sleep(wait)
        raise InputError(f"{self._path} cannot be written: {why}")

    def _refused(self) -> str | None:
        """Why the bucket does not take what was written; None where it did."""
        self._put_at = time.monotonic()
        try:
            self._path.write_bytes(bytes(self._content))
        except Exception as error:  # of the bucket's library: many kinds
            return first_line(error)
        self._late = False
        return None


class RunFolder:
    """One folder.  Opening it writes nothing; `claim` makes it this process's own."""

    def __init__(self, path):
        self.path = place(path)
        self._measured: GrowingObject | None = None  # in a bucket, what records.jsonl is to hold
        self.checkpoints = self.path / "checkpoints"
        self.transcripts = self.path / "transcripts"

    def exists(self) -> bool:
        with reaching(self.path):
            return (self.path / "config.json").is_file()

    def description(self) -> dict:
        """config.json as written: {"program", "config", "command", "revision", "versions", "started",
        "model_started"?}."""
        return read_json(self.path / "config.json")

    def config(self) -> dict:
        """The run's config.

        Raises:
          InputError: the file holds none.
        """
        config = self.description().get("config")
        if not isinstance(config, dict):
            raise InputError(
                f"{self.path / 'config.json'} holds no run's 'config': restore it or choose another folder"
            )
        return config

    @contextlib.contextmanager
    def claim(self, program: str, config: dict, seed: int, model_started: str | None = None):
        """Makes the folder (or finds it), checks the config, and holds the folder's lock while in the block.

        Args:
          model_started: of the model from which this one starts, see training/models.stamp.

        A folder in which nothing has been done yet, since its config could not be used, takes another config.

        Raises:
          InputError: another process holds the folder, it belongs to a run with another config, or is in a bucket that
            cannot be reached.
          OSError: the folder cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            if self.path.is_symlink() and not self.path.exists():
                raise InputError(
                    f"{self.path} is a link to {os.readlink(self.path)}, which is not there: make that folder"
                ) from None
            raise InputError(f"{self.path} is, or lies in, a file: give a folder as --workdir") from None
        except Exception as error:  # of the bucket's library: many kinds
            if isinstance(self.path, pathlib.Path):
                raise
            reason = first_line(error)
            raise InputError(f"{self.path} cannot be reached: {reason}") from None
        self._seed = seed
        with locked(self.path / "lock", f"{self.path} is in use by another process: wait, or choose another --workdir"):
            if self.exists() and (self._begun() or "program" not in self.description()):
                self.check_same(program, config)
                self.check_model(model_started)
            else:
                write_json(
                    self.path / "config.json",
                    {
                        "program": program,
                        "config": config,
                        "command": command_line(),
                        "revision": git_revision(),
                        "versions": versions(),
                        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                        **({"model_started": model_started} if model_started else {}),
                    },
                )
            try:
                yield self
            except BaseException:
                self.put()
                raise
            if self._measured:
                self._measured.close()

    def _begun(self) -> bool:
        """Whether anything lies here that a run makes once its config has been found to be of use."""
        known = ("config.json", "lock")
        with reaching(self.path):
            early = [f for f in self.path.iterdir() if f.name not in known and "tfevents" not in f.name]
            return any(not f.is_dir() or any(f.iterdir()) for f in early)

    def check_same(self, program: str, config: dict) -> None:
        """Raises InputError where the folder belongs to another program or config."""
        config = json.loads(json.dumps(config))
        before = self.description()
        if "program" not in before:
            raise InputError(f"{self.path} holds a config.json that no run has written: choose another --workdir")
        if before["program"] != program:
            raise InputError(
                f"{self.path} holds a run of robust_mo.{before['program']}, not of robust_mo.{program}: "
                "choose another --workdir"
            )
        there, here = flatten(self.config()), flatten(config)
        told = [(n, *(json.dumps(side.get(n, "absent")) for side in (there, here))) for n in sorted({*there, *here})]
        changed = [(name, old, new) for name, old, new in told if old != new]
        # Older revisions kept the paths of data as they were typed.
        spelt = {name for name, new in here.items() if isinstance(new, str) and new == _spelt(there.get(name))}
        changed = [difference for difference in changed if difference[0] not in spelt]
        if differences := [difference for difference in changed if not _MAY_CHANGE.search(difference[0])]:
            shown = "; ".join(f"{name} is {old} there and {new} here" for name, old, new in differences[:4])
            more = f" (and {len(differences) - 4} more)" if len(differences) > 4 else ""
            raise InputError(f"{self.path} holds a run with another config: {shown}{more}; choose another --workdir")
        for name, old, new in changed:
            print(f"{self.path}: {name} was {old} and is {new} from here on", flush=True)

    def check_model(self, started: str | None) -> None:
        """Raises InputError where the model that this run began from has been made again since, as far as its stamp
        tells; that files are missing, whoever reads them says.

        Args:
          started: training/models.stamp of what now lies at its place.
        """
        then, config = self.description().get("model_started"), self.config()
        if then and started != then and (started or not then.startswith("files ")):
            raise InputError(
                f"{self.path} began from another {config.get('model') or config['source']} ({then}) than lies there "
                f"now ({started or 'no run'}): bring the former back, or choose another --workdir"
            )

    def record(self, step: int, name: str, value: float, *, count=None, low=None, high=None) -> None:
        """Appends one measurement.  `low` and `high` bound its 95% interval, `count` is the sample it rests on."""
        line = {"step": int(step), "name": name, "value": _number(value)}
        if count is not None:
            line["count"] = int(count)
        if low is not None:
            line["low"], line["high"] = _number(low), _number(high)
        line.update(seed=self._seed, revision=git_revision(), time=round(time.time(), 3))
        file = self.path / "records.jsonl"
        if isinstance(file, pathlib.Path):
            append_line(file, line)
            return
        if self._measured is None:
            self._measured = GrowingObject(file, file.read_bytes() if file.exists() else b"")
        self._measured.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")

    def put(self) -> None:
        """Sees to it that what was recorded lies in the folder, in a bucket too."""
        if self._measured:
            self._measured.put()

    def records(self) -> list[dict]:
        """All measurements in the order of steps; of those repeated for a step and name, the newest."""
        self.put()
        file = self.path / "records.jsonl"
        lines = read_lines(file)
        if wrong := [line for line in lines if not _is_measurement(line)]:
            raise InputError(
                f"{file} has a line that is no measurement, without 'step', 'name' or 'value' or with one of a wrong "
                f"type: {json.dumps(wrong[0])[:100]}; restore it from a copy"
            )
        latest = {(line["step"], line["name"]): line for line in lines}
        return sorted(latest.values(), key=lambda line: line["step"])

    def last(self) -> dict[str, dict]:
        """The newest measurement of every name."""
        return {line["name"]: line for line in self.records()}

    def finish(self, step: int) -> None:
        """Notes that nothing is left to do, before what only going on would need may go.

        Raises:
          InputError: a bucket does not take it.
        """
        self.record(step, "run/finished", 1)
        if self._measured:
            self._measured.close()
        else:
            _reach_the_disk(self.path / "records.jsonl")

    def finished(self) -> bool:
        return any(line["name"] == "run/finished" for line in self.records())

    def transcript_file(self, evaluator: str, step: int) -> pathlib.Path:
        return self.transcripts / f"{evaluator}-{step:06d}.jsonl"

    def write_transcript(self, evaluator: str, step: int, lines: list[dict]) -> None:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(self.transcript_file(evaluator, step), text)


# May change from one start to the next, in a study for its runs too: where the work is done and in what portions, and
# how often it is saved and told.  Sums may differ by it in their last digits.
_MAY_CHANGE = re.compile(
    r"(^|\.)(mesh\.|batch\.micro_batches$|evaluation\.batch_size$|remat$|loss_chunk$|log_every$|checkpoint\.)"
)


def _spelt(path) -> str | None:
    return os.path.abspath(os.path.expanduser(path)) if isinstance(path, str) and path else None


def _is_measurement(line: dict) -> bool:
    numbers = [line.get(name) for name in ("value", "count", "low", "high")]
    return (
        type(line.get("step")) is int
        and type(line.get("name")) is str
        and "value" in line
        and ("low" in line) == ("high" in line)
        and all(isinstance(number, int | float | None) for number in numbers)
    )


class Onlooker(RunFolder):
    """A folder that another process, which does the same work, has claimed and writes: here it is only read."""

    def record(self, step: int, name: str, value: float, *, count=None, low=None, high=None) -> None:
        pass

    def finish(self, step: int) -> None:
        pass

    def write_transcript(self, evaluator: str, step: int, lines: list[dict]) -> None:
        pass


@contextlib.contextmanager
def locked(file, held: str):
    """Holds a lock on `file`, which is made if need be, while in the block; in a bucket, nothing.

    Raises:
      InUse: another process holds it; `held` is the message.
    """
    if not isinstance(place(file), pathlib.Path):
        yield
        return
    with open(file, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InUse(held) from None
        except OSError as error:
            raise InputError(
                f"{file} cannot be locked ({error.strerror}): its file system takes no locks; mount it with them "
                "(Lustre: -o flock) or choose another folder"
            ) from None
        # Whoever held it before may have removed the file after we opened it.
        if not (os.path.exists(file) and os.path.samestat(os.fstat(lock.fileno()), os.stat(file))):
            raise InUse(held)
        yield


def flatten(config, prefix: str = "") -> dict[str, object]:
    """{"a": {"b": 1}, "c": {}} -> {"a.b": 1, "c": {}}, of a dict or an ml_collections.ConfigDict."""
    flat = {}
    for name, value in config.items():
        if hasattr(value, "items"):
            flat.update(flatten(value, f"{prefix}{name}.") or {prefix + name: {}})
        else:
            flat[prefix + name] = value
    return flat


def _number(value):
    """A float that JSON can hold: None stands for what is not a number."""
    value = float(value)
    return value if math.isfinite(value) else None


def read_json(path) -> dict:
    """The object in a JSON file.

    Raises:
      InputError: it is no JSON object.
    """
    try:
        with reaching(path):
            value = json.loads(place(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): write or copy it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} is not a JSON object: write or copy it again")
    return value


def write_json(path, value) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


@contextlib.contextmanager
def reaching(path):
    """What a bucket's library raises in the block where it does not come there, as an OSError that may pass."""
    try:
        yield
    except Exception as error:  # of many kinds, few of them OSErrors
        if not unreached(error):
            raise
        raise OSError(
            errno.EIO, f"the bucket is not reached now, try again ({first_line(error)})", str(path)
        ) from error


@contextlib.contextmanager
def naming(path):
    """An OSError from the block names `path`: a full disk shows in a write, which knows no name."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def write_bytes(path, data: bytes) -> None:
    """Writes the file beside its place and moves it there: it is whole or absent, as objects in a bucket always are."""
    path = place(path)
    with reaching(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(path, pathlib.Path):
        with reaching(path):
            path.write_bytes(data)
        return
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with naming(path), os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(handle)  # or the name may outlast a power cut and what it names not
        os.chmod(temporary, 0o644)
        with naming(path):
            os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _reach_the_disk(path) -> None:
    with naming(path), open(path, "rb") as file:
        os.fsync(file.fileno())


def append_line(path, value: dict) -> None:
    """Appends one JSON line to a file on a disk in one write; a line that an earlier kill cut short is closed first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(value, ensure_ascii=False).encode("utf-8") + b"\n"
    with naming(path), open(path, "ab+") as file:
        end = file.seek(0, os.SEEK_END)
        cut_short = end and (file.seek(end - 1), file.read(1))[1] != b"\n"
        file.write(b"\n" + line if cut_short else line)


def read_lines(path) -> list[dict]:
    """The JSON lines of a file that `append_line` wrote; lines cut short by a kill are left out.

    Raises:
      InputError: a line is JSON, but no object.
    """
    path, lines = place(path), []
    with reaching(path):
        content = path.read_bytes() if path.exists() else b""
    for number, line in enumerate(content.split(b"\n"), 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):  # cut short, no text, deeper than can be read
            continue
        if not isinstance(value, dict):
            raise InputError(f"{path}:{number} is not a JSON object: restore the file from a copy")
        lines.append(value)
    return lines


def sha256(path) -> str:
    with place(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def command_line() -> str:
    """The command as a user would type it."""
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    program = sys.argv[:1] if main is None else ["python", "-m", main.name.removesuffix(".__main__")]
    return shlex.join([*program, *sys.argv[1:]])


_REVISION: list[str] = []


def git_revision() -> str:
    """Commit of the source tree, "-modified" where it has uncommitted changes, "unknown" outside a checkout.

    What programs write into folders called `results` is no source: several in a row would call each other's modified.
    """
    if not _REVISION:
        where = pathlib.Path(__file__).resolve().parent

        def git(*arguments):
            return subprocess.run(
                ["git", "--no-optional-locks", "-C", where, *arguments], capture_output=True, text=True, check=True
            ).stdout

        try:
            source = (":/", ":(top,exclude,glob)**/results/**")
            changed = git("status", "--porcelain", "--untracked-files=no", "--", *source).strip()
            _REVISION.append(git("rev-parse", "HEAD").strip() + ("-modified" if changed else ""))
        except (OSError, subprocess.CalledProcessError):
            _REVISION.append("unknown")
    return _REVISION[0]


def versions() -> dict[str, str]:
    """Versions that results can depend on."""
    found = {"python": platform.python_version()}
    for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
