"""What there is to know of a GPU, in one command that ends within ten minutes: the most telling first.

    python -m benchmarks.gpu [--size=8b] [--minutes=9.5] [--only decode lora ...]

Runs one round of each benchmark below while time is left, each in processes of its own, and prints what they found;
what there was no time for is named, and comes with a second call and --only.  At `8b` an H100 took 26 s to write the
invented weights (16 GB, into the folder for temporary files, where they stay as compiled programs do), 110 s for
"decode", 60 to 75 s each for "lora" and "full"; "evaluation" did not end in 120 s.  Needs no network, and of Python
packages jax, flax, optax, orbax-checkpoint, numpy, safetensors, torch, transformers and peft.
"""

import argparse
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

from benchmarks import sizes
from benchmarks.sizes import SIZES

PARTS = {
    "decode": "decode_step --size={size}",
    "lora": "training --size={size} --lora --checkpointing --rounds=1",
    "full": "training --size={size} --checkpointing --rounds=1",
    "evaluation": "sampling --size={size} --forced --peer=static --rounds=1",
    "start": "start --size={size} --lora --rounds=1",
    "load": "load_weights --size={size} --dtype=bfloat16 --rounds=1",
    "own": "training --size={size} --own --rounds=1",
    "compiled": "training --size={size} --lora --compiled --rounds=1",
    "soap": "optimizer_step --size=1b --rows=8 --length=2048 --compilations=1 --rounds=2 --only soap",
    "continuous": "sampling --size={size} --forced --peer=continuous --rounds=1",
    "kernels-lora": "kernels lora --size={size}",
    "kernels-full": "kernels full --size={size}",
    "kernels-decode": "kernels decode --size={size}",
}


def done_within(command: list[str], seconds: float) -> str:
    """What became of it; where time runs out, its processes end with it and leave the GPU."""
    process = subprocess.Popen(command, process_group=0)
    try:
        status = process.wait(max(seconds, 0))
        return "done" if status == 0 else f"failed with status {status}"
    except subprocess.TimeoutExpired:
        return "no time left"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="8b")
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=tuple(PARTS))
    args = parser.parse_args()
    # What one part has compiled another need not.
    compiled = pathlib.Path(tempfile.gettempdir()) / "robust_mo-benchmarks-compiled"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compiled))
    end, outcome = time.monotonic() + 60 * args.minutes, {}
    sizes.folder(args.size)
    for part in args.only:
        left = end - time.monotonic()
        arguments = PARTS[part].format(size=args.size).split()
        print(f"== {part}: python -m benchmarks.{' '.join(arguments)}  ({left:.0f} s left)", flush=True)
        outcome[part] = done_within([sys.executable, "-m", f"benchmarks.{arguments[0]}", *arguments[1:]], left)
    for part, told in outcome.items():
        print(f"{part:12} {told}")
    if any(told != "done" for told in outcome.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
