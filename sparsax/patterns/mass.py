"""One budget of blocks for all layers, spent where the attention mass is that matters most.

A search beside SPION's (`sparsax.patterns.spion`) that reads the same score maps:

    score maps [L, P, T, T] -> mass of blocks [L, P, n, n] -> forced band -> gain of every other one

The mass of a block is the probability that a query of its row gives to its keys, averaged over the
row's queries. A row of blocks adds up to 1, so masses compare across rows, heads and layers, and a
layer whose attention is spread thin gets the blocks that a layer with a sharp band does not need.

What a row of blocks loses moves the layer's output in proportion, and the loss of a trained model,
which is at its smallest, by the square of that. So the search minimises squares by default. The sum
of the mass alone spends a causal layer's budget on its first rows, which have few keys and hold
much mass in each block, and leaves the band to the others. How much a loss minds differs from layer
to layer, a hundredfold in the model of docs/spion_findings.md: what
`sparsax.patterns.layer_weights` measures.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparsax.layouts import BlockPattern, block_sizes
from sparsax.patterns import spion
from sparsax.typing import ArrayLike, is_concrete

Spread = Literal["model", "layer", "head"]
Objective = Literal["square", "mass"]


def search(
    maps: Float[ArrayLike, "*L T T"],
    *,
    block: int = 64,
    density: float | None = None,
    cover: float | None = None,
    objective: Objective | None = None,
    weights: Float[ArrayLike, "*W"] | None = None,
    spread: Spread = "model",
    band: int = 1,
    causal: bool = False,
    equal_rows: bool = True,
    length: int | None = None,
) -> BlockPattern:
    """A forced band of blocks, and those of the largest gain, one pattern for every map.

    Args:
        maps: softmax probabilities averaged over the batch (`sparsax.score_map`): `[T, T]`,
            `[P, T, T]` for a pattern per head, `[L, P, T, T]` for the patterns of L layers.
        block: tokens in a block.
        density: listed blocks over all blocks that may be listed, the band among them; with
            `causal`, those on and below the diagonal may be.
        cover: instead of a density, the share of the mass to hold: the smallest set of blocks,
            the band among them, that holds at least so much.
        objective: what to minimise, summed over all rows of blocks that share a budget: the
            "square" of the mass that a row loses (the default with a density), or the "mass" that
            it loses (the only one for a cover).
        weights: of the objective, one for every layer `[L]` or map `[L, P]`, such as
            `sparsax.patterns.layer_weights` finds; alike when None.
        spread: which maps share a budget (or a cover): all of the "model", those of a "layer", or
            none, each "head" having its own.
        band: forced blocks on each side of the diagonal, besides the diagonal itself; with
            `causal`, on the side of the past alone.
        causal: list no block above the diagonal.
        equal_rows: count every row of blocks as 1. False leaves a row its own sum: padded queries
            count nothing in a score map, so rows that are padding in most samples weigh less.
        length: T, when the maps are pooled already, `[..., n, n]` from
            `sparsax.score_map(pool=block)`.

    Returns:
        The pattern, with full capacity. Under jit, NaN or infinity in a map or a weight leaves all
        heads that share its budget invalid: their attention is NaN.

    Raises:
        ValueError: the maps are not square, smaller than a block, not finite or constant; a setting
            is out of range or goes with another one; or the budget is smaller than the forced band.

    Example:
        >>> import jax
        >>> import sparsax
        >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 256, 2, 16))
        >>> maps = sparsax.score_map(q, k, per_head=True, pool=32)
        >>> pattern = sparsax.patterns.mass.search(maps, block=32, density=0.5, length=256)
        >>> float(pattern.density())
        0.5
    """
    blocks = spion.check_shape(maps, block, length)
    _check(maps, blocks, density, cover, spread, band, causal)
    weights = _check_objective(maps, cover, objective, weights)
    spion.check_values(maps)
    square = cover is None and objective != "mass"
    settings = (block, density, cover, square, spread, band, causal, equal_rows, length)
    return _search(jnp.asarray(maps, jnp.float32), weights, *settings)


def block_mass(
    maps: Float[ArrayLike, "*L T T"], *, block: int = 64, length: int | None = None
) -> Float[Array, "*L n n"]:
    """The probability that each block of queries gives to each block of keys.

    Args:
        maps: score maps.
        block: tokens in a block.
        length: T, when the maps are pooled already.

    Returns:
        Means over the queries of a block of their sums over the keys of a block. Rows add up to 1,
        or less where queries are padding.
    """
    pooled = jnp.asarray(maps, jnp.float32)
    if length is None:
        length = pooled.shape[-1]
        square = pooled.reshape(-1, length, length)
        each = jax.lax.map(lambda x: spion.average_pool(x, block), square)
        pooled = each.reshape(*pooled.shape[:-2], *each.shape[1:])
    return pooled * block_sizes(length, block)


def bands(blocks: int, band: int, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """Block masks `[n, n]` of what is forced, and of what may be listed."""
    behind = np.arange(blocks)[:, None] - np.arange(blocks)
    listable = behind >= 0 if causal else np.ones_like(behind, bool)
    return listable & (abs(behind) <= band), listable


def equal_rows_of(mass: Float[Array, "*L n n"]) -> Float[Array, "*L n n"]:
    """Every row over its sum."""
    rows = mass.sum(-1, keepdims=True)
    return mass / jnp.where(rows > 0, rows, 1.0)


def _squared(
    mass: Float[Array, "*L n n"], forced: np.ndarray, listable: np.ndarray
) -> Float[Array, "*L n n"]:
    """What each block takes from its row's squared loss, after the band and all of larger mass.

    A row that adds up to s, as it is real in a share s of the samples, loses s of ((s - c) / s)^2.
    """
    first = jnp.where(forced, jnp.inf, jnp.where(listable, mass, -1.0))
    order = jnp.argsort(first, axis=-1, descending=True, stable=True)
    own = jnp.take_along_axis(jnp.where(listable, mass, 0.0), order, axis=-1)
    held, total = own.cumsum(-1), mass.sum(-1, keepdims=True)
    gain = own * jnp.maximum(2 * total - 2 * held + own, 0.0) / jnp.where(total > 0, total, 1.0)
    return jnp.put_along_axis(jnp.zeros_like(gain), order, gain, axis=-1, inplace=False)


@functools.partial(jax.jit, static_argnums=range(2, 11))
def _search(
    maps, weights, block, density, cover, square, spread, band, causal, equal_rows, length
) -> BlockPattern:
    mass = block_mass(maps, block=block, length=length)
    if equal_rows:
        mass = equal_rows_of(mass)
    leading, blocks = mass.shape[:-2], mass.shape[-1]
    count = _budgets(leading, spread)
    bands_of = bands(blocks, band, causal)
    gain = _squared(mass, *bands_of) if square else mass
    if weights is not None:
        gain = gain * weights.reshape(*weights.shape, *[1] * (gain.ndim - weights.ndim))
    together = lambda x: jnp.broadcast_to(x, mass.shape).reshape(count, -1)
    forced, listable = map(together, bands_of)
    mass, gain = (jnp.where(listable, together(x), 0.0) for x in (mass, gain))
    # The band comes first, what may not be listed comes last; the first of equals wins.
    order = jnp.argsort(
        jnp.where(forced, jnp.inf, jnp.where(listable, gain, -1.0)), descending=True, stable=True
    )
    if cover is None:
        kept = jnp.arange(order.shape[-1]) < _budget(leading, blocks, density, spread, causal)
    else:
        held = jnp.take_along_axis(mass, order, axis=-1)
        kept = held.cumsum(-1) - held < cover * held.sum(-1, keepdims=True)
    kept = jnp.broadcast_to(kept, order.shape)
    mask = jnp.put_along_axis(jnp.zeros_like(kept), order, kept, axis=-1, inplace=False)
    # Rounded sums may never reach a cover of 1, and keep what has no mass.
    mask = (mask & listable | forced).reshape(*leading, blocks, blocks)
    pattern = BlockPattern.from_block_mask(mask, q_len=length or maps.shape[-1], block_q=block)
    finite = jnp.isfinite(maps).all((-2, -1))
    if weights is not None:
        finite &= jnp.isfinite(weights).reshape(*weights.shape, *[1] * (finite.ndim - weights.ndim))
    finite = finite.reshape(count, -1)
    shared = jnp.broadcast_to(finite.all(-1, keepdims=True), finite.shape)
    return pattern.invalidate(~shared.reshape(leading or (1,)))


def _budgets(leading: tuple[int, ...], spread: Spread) -> int:
    """How many budgets there are for maps `[*leading, n, n]`."""
    layers, heads = (1, 1, *leading)[-2:]
    return {"model": 1, "layer": layers, "head": layers * heads}[spread]


def _budget(leading, blocks: int, density: float, spread: Spread, causal: bool) -> int:
    """The blocks of one budget."""
    maps = int(np.prod(leading)) // _budgets(leading, spread)
    return round(density * maps * int(bands(blocks, 0, causal)[1].sum()))


def _check_objective(maps, cover, objective, weights) -> Array | None:
    """The weights as an array."""
    if objective not in (None, "square", "mass"):
        raise ValueError(f"objective must be 'square' or 'mass'; got {objective!r}.")
    if cover is not None and (objective == "square" or weights is not None):
        raise ValueError(
            "a cover is the smallest set that holds a share of the mass: it takes neither weights "
            f"nor objective='square'; got objective={objective!r}."
        )
    if weights is None:
        return None
    leading = tuple(maps.shape[:-2])
    if weights.ndim < 1 or weights.shape != leading[: weights.ndim]:
        raise ValueError(
            f"weights must be of the layers or of all maps {leading}; got {tuple(weights.shape)}."
        )
    found = jnp.asarray(weights, jnp.float32)
    if is_concrete(found):
        least, most = float(found.min()), float(found.max())
        if not (least >= 0 and 0 < most < float("inf")):
            raise ValueError(
                "weights must be finite, at least 0, and not all 0; got numbers from "
                f"{least} to {most}. Leave them out to count all layers alike."
            )
    return found


def _check(maps, blocks, density, cover, spread, band, causal) -> None:
    if spread not in ("model", "layer", "head"):
        raise ValueError(f"spread must be 'model', 'layer' or 'head'; got {spread!r}.")
    if (density is None) == (cover is None):
        raise ValueError(
            "give either density or cover, the share of blocks or of the mass to keep; got "
            f"density={density} and cover={cover}."
        )
    share = cover if density is None else density
    if not 0 < share <= 1 or band < 0:
        raise ValueError(
            "density or cover must lie within (0, 1] and band be at least 0 blocks; got "
            f"{share} and {band}."
        )
    if density is None:
        return
    leading = maps.shape[:-2]
    budget = _budget(leading, blocks, density, spread, causal)
    forced, listable = bands(blocks, band, causal)
    needed = int(forced.sum()) * int(np.prod(leading)) // _budgets(leading, spread)
    if budget < needed:
        raise ValueError(
            f"the budget must hold the forced band: density={density} is {budget} blocks, and the "
            f"diagonal with band={band} takes {needed}. Take density >= "
            f"{forced.sum() / listable.sum():.4f}, or a smaller band."
        )
