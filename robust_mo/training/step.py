"""One optimizer step, jitted: micro-batches, gradient, update, the numbers worth watching.

Promises: loss and gradient are sums over every token that carries a loss, in all micro-batches and on all devices,
divided once by the number of such tokens; frozen parameters get no gradient.
Does not know where batches come from or what is done with the metrics.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from robust_mo.model.llama import Llama, output_head
from robust_mo.training.groups import norms, whole_norm
from robust_mo.training.loss import summed_cross_entropy
from robust_mo.training.optimizers import gradient_point, health


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """What a checkpoint holds.

    Attributes:
      step: int32 scalar, optimizer steps taken.
      trainable: the parameters being trained: all of them, or the adapters.
      optimizer: the optimizer's state for them.
    """

    step: jax.Array
    trainable: dict
    optimizer: tuple


def variables(model: Llama, trainable, frozen) -> dict:
    """The variables that `model.apply` takes: adapters beside frozen parameters, or parameters alone."""
    return {"params": trainable} if model.lora is None else {"params": frozen, "lora": trainable}


def summed_loss(model: Llama, trainable, frozen, batch, chunk: int) -> jax.Array:
    """Summed cross-entropy of a batch of data/batches.py, float32 scalar."""
    given = variables(model, trainable, frozen)
    hidden_BTD, _ = model.apply(given, batch["tokens"], batch["positions"], batch["segments"])
    head_VD = output_head(given["params"])
    return summed_cross_entropy(hidden_BTD, head_VD, batch["targets"], batch["loss_mask"], chunk)


@functools.partial(jax.jit, static_argnames=("model", "chunk"))
def evaluate_loss(model: Llama, trainable, frozen, batch, chunk: int):
    """(summed loss, number of tokens) of one batch, without a gradient."""
    return summed_loss(model, trainable, frozen, batch, chunk), batch["loss_mask"].sum()


@functools.partial(
    jax.jit, static_argnames=("model", "optimizer", "chunk", "micro_batches"), donate_argnames=("state",)
)
def train_step(state, frozen, start, batch, learning_rate, share, *, model, optimizer, chunk, micro_batches):
    """Takes one step.

    Args:
      state: TrainState; its memory is reused.
      frozen: parameters that are not trained (LoRA), or None.
      start: the trainable parameters as they were before step 1, to measure the distance from and for a decay to them;
        or None.
      batch: dict of arrays [rows, length], see data/batches.py; rows divisible by `micro_batches`.
      learning_rate: float32 scalar, the schedule's peak.
      share: float32 scalar, the share of it in this step.
      model, optimizer: static (see `make_optimizer`); equal ones share the compiled program.
      chunk: positions per row whose logits are held at once.
      micro_batches: parts that the batch is worked off in, one after another.

    Returns:
      (state, metrics): scalars loss (nats per token that carries one), loss_tokens, tokens (without padding),
      gradient_norm (before clipping), distance_from_start; by groups of parameters gradient_norm, update_norm,
      parameter_norm and start_distance (`gradient_norm/mlp`); what the optimizer says of itself
      (`optimizer/clipped_steps`).
    """
    # Every micro-batch takes some rows of every device, so that none has to move.
    parts = jax.tree.map(lambda x: x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1), batch)
    gradient_of = jax.value_and_grad(lambda trainable, part: summed_loss(model, trainable, frozen, part, chunk))
    point = gradient_point(state.optimizer, state.trainable)

    def add(total, part):
        return jax.tree.map(jnp.add, total, gradient_of(point, part)), None

    if micro_batches == 1:
        loss, gradient = gradient_of(point, jax.tree.map(lambda x: x[0], parts))
    else:
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.trainable)
        (loss, gradient), _ = jax.lax.scan(add, (jnp.float32(0), zeros), parts)
    loss_tokens = jnp.maximum(batch["loss_mask"].sum(), 1)
    # In float32: bfloat16 cannot tell most numbers of tokens from their neighbours.
    gradient = jax.tree.map(
        lambda g, p: (g.astype(jnp.float32) / loss_tokens).astype(p.dtype), gradient, state.trainable
    )
    updates, optimizer_state = optimizer.update(
        gradient, state.optimizer, state.trainable, learning_rate=learning_rate, share=share, start=start
    )
    trainable = optimizer.added(state.trainable, updates, state.step)
    by_group = {
        "gradient_norm": norms(optimizer.groups, gradient),
        "update_norm": norms(optimizer.groups, updates),
        "parameter_norm": norms(optimizer.groups, trainable),
    }
    metrics = {
        "loss": loss / loss_tokens,
        "loss_tokens": loss_tokens,
        "tokens": jnp.sum(batch["segments"] > 0),
        "gradient_norm": whole_norm(by_group["gradient_norm"]),
    }
    if start is not None:
        by_group["start_distance"] = norms(optimizer.groups, jax.tree.map(jnp.subtract, trainable, start))
        metrics["distance_from_start"] = whole_norm(by_group["start_distance"])
    metrics |= {f"{what}/{group}": norm for what, found in by_group.items() for group, norm in found.items()}
    metrics |= {f"optimizer/{name}": value for name, value in health(optimizer_state).items()}
    return TrainState(state.step + 1, trainable, optimizer_state), metrics
