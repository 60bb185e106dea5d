"""How the next token is chosen from logits: greedy, or at a temperature from a nucleus.

Promises: frozen dataclasses (usable as static arguments of jit) with one method, `choose`; a row's choice depends on
its own logits and key alone.
"""

import dataclasses

import jax
import jax.numpy as jnp

from robust_mo.errors import InputError


@dataclasses.dataclass(frozen=True)
class Greedy:
    """The most probable token."""

    def choose(self, logits_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
        return jnp.argmax(logits_BV, axis=-1)


@dataclasses.dataclass(frozen=True)
class Nucleus:
    """A draw at `temperature` from the smallest set of tokens whose probabilities reach `top_p` (arXiv 1904.09751)."""

    temperature: float
    top_p: float

    def choose(self, logits_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
        logits_BV = logits_BV / self.temperature
        if self.top_p < 1:
            probabilities_BV = jax.nn.softmax(logits_BV)
            # The most probable token is kept however small top_p is, which float32 may hold as 0.
            threshold_B = jnp.minimum(_nucleus_threshold(probabilities_BV, self.top_p), probabilities_BV.max(-1))
            kept_BV = probabilities_BV >= threshold_B[:, None]
            logits_BV = jnp.where(kept_BV, logits_BV, -jnp.inf)
        return jax.vmap(jax.random.categorical)(keys_B, logits_BV)


def _nucleus_threshold(probabilities_BV: jax.Array, top_p: float) -> jax.Array:
    """The largest probability t with sum of {p >= t} >= top_p, by bisection of t: no sort of the vocabulary."""

    def halve(_, bounds):
        low_B, high_B = bounds
        middle_B = (low_B + high_B) / 2
        enough_B = jnp.sum(jnp.where(probabilities_BV >= middle_B[:, None], probabilities_BV, 0), axis=-1) >= top_p
        return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

    rows = probabilities_BV.shape[0]
    return jax.lax.fori_loop(0, 30, halve, (jnp.zeros(rows), jnp.ones(rows)))[0]


def make_decoding(temperature: float, top_p: float) -> Greedy | Nucleus:
    """Greedy at temperature 0, else Nucleus.

    Raises:
      InputError: temperature below 0, so near to it that logits overflow, or not a number; or top_p outside (0, 1].
    """
    if not (temperature == 0 or 1e-6 <= temperature < float("inf")):
        raise InputError(f"temperature is {temperature}: give 0 (greedy), or at least 0.000001")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}: give a number above 0 and at most 1")
    return Nucleus(float(temperature), float(top_p)) if temperature > 0 else Greedy()
