"""How much of dense attention a choice of keys keeps: dense, float32, for measurements."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparsax.layouts import BlockPattern
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


def pattern_mass(pattern: BlockPattern, mass: Float[Array, "*L P n n"]) -> Float[Array, "*L"]:
    """The share of dense attention that listed blocks hold, one number a layer.

    Args:
        pattern: stacked as the masses are; P may be 1 where theirs is not.
        mass: of the blocks, from `mass.block_mass`.
    """
    return jnp.where(pattern.to_block_mask(), mass, 0.0).sum((-3, -2, -1)) / mass.sum((-3, -2, -1))


def best_mass(pattern: BlockPattern, mass: Float[Array, "*L P n n"]) -> Float[Array, "*L"]:
    """The most that as many blocks of each layer can hold: what `pattern_mass` has to reach."""
    if pattern.num_heads == 1:
        mass = mass.mean(-3, keepdims=True)
    flat = jnp.sort(mass.reshape(*mass.shape[:-3], -1), axis=-1, descending=True)
    listed = pattern.kv_num_blocks.sum((-2, -1))[..., None]
    return jnp.where(jnp.arange(flat.shape[-1]) < listed, flat, 0.0).sum(-1) / flat.sum(-1)
