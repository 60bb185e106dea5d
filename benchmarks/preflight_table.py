"""What fits on which TPU slice: full weights and LoRA, 8B and 70B, AdamW and SOAP.

    python -m benchmarks.preflight_table            # 48 compilations, minutes each on two cores
    python -m benchmarks.preflight_table --show     # the table from what has been compiled, in Markdown

One sequence of 4096 tokens per chip, with everything in a layer recomputed.  Each cell is the last line of
`python -m robust_mo.preflight --json`, kept in benchmarks/results/preflight_table.json; what is there already is not
compiled again.
"""

import argparse
import importlib.metadata
import json
import pathlib
import subprocess
import sys
import time

TOPOLOGIES = ("v5e:4x4", "v5e:16x16", "v5p:2x2x2", "v5p:4x4x4", "v6e:4x4", "v6e:8x8")
CHIPS = (16, 256, 8, 64, 16, 64)
MODELS = {"8B": "meta-llama/Llama-3.1-8B-Instruct", "70B": "meta-llama/Llama-3.1-70B-Instruct"}
METHODS = {"full weights": "configs/red_full.py:8b", "LoRA r64": "configs/red_lora.py:8b"}
OPTIMIZERS = {"AdamW": ["adamw"], "SOAP": ["soap", "--config.optimizer.soap.first_basis=qr"]}
RESULTS = pathlib.Path(__file__).parent / "results" / "preflight_table.json"


def rows() -> list[tuple[str, str, str]]:
    return [(model, method, optimizer) for optimizer in OPTIMIZERS for model in MODELS for method in METHODS]


def compiled(row: tuple[str, str, str], topology: str, chips: int) -> dict:
    """What the preflight says of a cell."""
    model, method, optimizer = row
    name, *settings = OPTIMIZERS[optimizer]
    command = [
        *(sys.executable, "-m", "robust_mo.preflight", f"--config={METHODS[method]}", f"--topology={topology}"),
        *("--json", f"--config.model={MODELS[model]}", f"--config.batch.rows={chips}"),
        "--config.remat=full",
        *(f"--config.optimizer.name={name}", *settings),
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    del found["compile_seconds"]  # says more of what else the machine did
    return {"command": " ".join(["python", *command[1:]]), **found}


def table(cells: dict[str, dict]) -> str:
    """Markdown: GiB per chip and whether they fit."""
    lines = [
        "| model | trained | optimizer | " + " | ".join(TOPOLOGIES) + " |",
        "|---|---|---|" + "---|" * len(TOPOLOGIES),
    ]
    for row in rows():
        told = []
        for topology in TOPOLOGIES:
            found = cells.get(" ".join((*row, topology)))
            told.append(_told(found) if found else "–")
        lines.append("| " + " | ".join((*row, *told)) + " |")
    return "\n".join(lines)


def _told(found: dict) -> str:
    sizes = found["bytes_per_chip"]
    size = f"{sizes['total'] / 2**30:.1f}"
    return size if found["fits"] else f"~~{size}~~" if sizes["temporaries"] else f"~~over {size}~~"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="compile nothing")
    arguments = parser.parse_args()
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"cells": {}}
    todo = [(row, *slice_) for row in rows() for slice_ in zip(TOPOLOGIES, CHIPS, strict=True)]
    todo = [cell for cell in todo if " ".join((*cell[0], cell[1])) not in kept["cells"]]
    begun = time.monotonic()
    for number, (row, topology, chips) in enumerate([] if arguments.show else todo, 1):
        kept["cells"][" ".join((*row, topology))] = compiled(row, topology, chips)
        kept["date"] = time.strftime("%Y-%m-%d")
        kept["versions"] = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
        left = (time.monotonic() - begun) / number * (len(todo) - number) / 60
        print(f"{number}/{len(todo)} {' '.join(row)} {topology}, {left:.0f} min left", flush=True)
    print(table(kept["cells"]))


if __name__ == "__main__":
    main()
