"""How much of dense attention a choice of keys keeps: dense, float32, for measurements."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparsax.typing import Key, Query


def probabilities(
    q: Query, k: Key, *, causal: bool = False, scale: float | None = None
) -> Float[Array, "B N T S"]:
    """The softmax of dense attention."""
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    q, k = (x.astype(jnp.float32) for x in (q, k))
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    s = scale * jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest")
    if causal:
        s = jnp.where(jnp.arange(s.shape[3]) <= jnp.arange(s.shape[2])[:, None], s, -jnp.inf)
    return jax.nn.softmax(s, axis=-1)


def exact(probs: Float[Array, "B N T S"], keep: int) -> Bool[Array, "B N T S"]:
    """The `keep` most probable keys of every query: no choice of as many captures more mass."""
    order = jnp.argsort(-probs, axis=-1, stable=True)
    return (jnp.argsort(order, axis=-1) < keep) & (probs > 0)


def window(length: int, keep: int, *, causal: bool = False) -> Bool[Array, "T T"]:
    """The `keep` nearest keys of every query: the choice that needs no scores."""
    gap = jnp.arange(length) - jnp.arange(length)[:, None]
    right = 0 if causal else keep // 2
    return (gap > right - keep) & (gap <= right)


def captured_mass(kept: Bool[Array, "*#A T S"], probs: Float[Array, "B N T S"]) -> Float[Array, ""]:
    """The share of dense attention's probability that kept pairs hold, the mean over queries."""
    return jnp.where(kept, probs, 0.0).sum(-1).mean()


def recall(
    kept: Bool[Array, "*#A T S"], probs: Float[Array, "B N T S"], keep: int
) -> Float[Array, ""]:
    """The share of the `keep` most probable keys that are kept, the mean over queries."""
    best = exact(probs, keep)
    return ((kept & best).sum(-1) / best.sum(-1)).mean()
