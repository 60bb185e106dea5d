"""What fits on which TPU slice: full weights and LoRA, 8B and 70B, AdamW and SOAP.

    python -m benchmarks.preflight_table            # 52 compilations, minutes each on two cores
    python -m benchmarks.preflight_table --again=SOAP   # also, once more, those with this in their name
    python -m benchmarks.preflight_table --show     # from what has been compiled: the table in Markdown, and the rest

One sequence of 4096 tokens per chip, with everything in a layer recomputed; and beside the table the settings of which
the README's text tells the size.  Each cell is the last line of `python -m robust_mo.preflight --json`, kept with its
revision and date in benchmarks/results/preflight_table.json; what is there already is not compiled again.
"""

import argparse
import importlib.metadata
import json
import pathlib
import subprocess
import sys
import time

from robust_mo.runs import git_revision

TOPOLOGIES = ("v5e:4x4", "v5e:16x16", "v5p:2x2x2", "v5p:4x4x4", "v6e:4x4", "v6e:8x8")
CHIPS = (16, 256, 8, 64, 16, 64)
MODELS = {"8B": "meta-llama/Llama-3.1-8B-Instruct", "70B": "meta-llama/Llama-3.1-70B-Instruct"}
METHODS = {"full weights": "configs/red_full.py:8b", "LoRA r64": "configs/red_lora.py:8b"}
OPTIMIZERS = {"AdamW": ["adamw"], "SOAP": ["soap", "--config.optimizer.soap.first_basis=qr"]}
RESULTS = pathlib.Path(__file__).parent / "results" / "preflight_table.json"

# Four copies on four chips tell of one GPU.
_ONE_GPU = (
    *("--config.mesh.replica=4", "--config.mesh.fsdp=1", "--config.param_dtype=bfloat16"),
    "--config.optimizer.rounding=stochastic",
)
BESIDE = {  # name: method, topology, rows and what else is set
    "8B LoRA r16 AdamW v5e:2x2": ("LoRA r64", "v5e:2x2", 4, "adamw", "--config.lora.rank=16"),
    "8B LoRA r16 SOAP v5e:2x2": ("LoRA r64", "v5e:2x2", 4, *OPTIMIZERS["SOAP"], "--config.lora.rank=16"),
    "8B full weights AdamW, a GPU": ("full weights", "v5p:2x2x1", 4, "adamw", *_ONE_GPU),
    "8B full weights Adafactor, a GPU": (
        *("full weights", "v5p:2x2x1", 32, "adafactor", *_ONE_GPU),
        "--config.batch.micro_batches=8",
    ),
}


def rows() -> list[tuple[str, str, str]]:
    return [(model, method, optimizer) for optimizer in OPTIMIZERS for model in MODELS for method in METHODS]


def cells() -> dict[str, tuple]:
    """Of each cell, by name, the model and what `compiled` takes."""
    table = {
        " ".join((model, method, optimizer, topology)): (model, method, topology, chips, *OPTIMIZERS[optimizer])
        for model, method, optimizer in rows()
        for topology, chips in zip(TOPOLOGIES, CHIPS, strict=True)
    }
    return table | {name: ("8B", *given) for name, given in BESIDE.items()}


def compiled(model: str, method: str, topology: str, batch: int, optimizer: str, *settings: str) -> dict:
    """What the preflight says of a cell."""
    command = [
        *(sys.executable, "-m", "robust_mo.preflight", f"--config={METHODS[method]}", f"--topology={topology}"),
        *("--json", f"--config.model={MODELS[model]}", f"--config.batch.rows={batch}"),
        "--config.remat=full",
        *(f"--config.optimizer.name={optimizer}", *settings),
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    del found["compile_seconds"]  # says more of what else the machine did
    return {"command": " ".join(["python", *command[1:]]), **found}


def table(found: dict[str, dict]) -> str:
    """Markdown: GiB per chip and whether they fit."""
    lines = [
        "| model | trained | optimizer | " + " | ".join(TOPOLOGIES) + " |",
        "|---|---|---|" + "---|" * len(TOPOLOGIES),
    ]
    for row in rows():
        names = (" ".join((*row, topology)) for topology in TOPOLOGIES)
        told = (_told(found[name]) if name in found else "–" for name in names)
        lines.append("| " + " | ".join((*row, *told)) + " |")
    return "\n".join(lines)


def _told(found: dict) -> str:
    sizes = found["bytes_per_chip"]
    size = f"{sizes['total'] / 2**30:.1f}"
    return size if found["fits"] else f"~~{size}~~" if sizes["temporaries"] else f"~~over {size}~~"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="compile nothing")
    parser.add_argument("--again", metavar="PART", help="compile cells with this in their name though they are there")
    arguments = parser.parse_args()
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cells": {}}
    todo = {
        name: given
        for name, given in ({} if arguments.show else cells()).items()
        if name not in kept["cells"] or (arguments.again and arguments.again in name)
    }
    stamp, begun = {"revision": git_revision(), "date": time.strftime("%Y-%m-%d")}, time.monotonic()
    for number, (name, given) in enumerate(todo.items(), 1):
        kept["cells"][name] = compiled(*given) | stamp
        kept["versions"] = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
        left = (time.monotonic() - begun) / number * (len(todo) - number) / 60
        print(f"{number}/{len(todo)} {name}, {left:.0f} min left", flush=True)
    print(table(kept["cells"]))
    for name in BESIDE:
        if name in kept["cells"]:
            print(f"{name}: {kept['cells'][name]['bytes_per_chip']['total'] / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
