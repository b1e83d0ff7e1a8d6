"""SPION: the pattern of a layer, found in its score map by convolution and flood fill.

Yoon, Han, Moon, "Layer-Wise Sparse Training of Transformer via Convolutional Flood Filling"
(PAKDD 2024, arXiv 2309.12578), section 4:

    score map [T, T] -> diagonal convolution -> average pool [n, n] -> flood fill -> blocks

All of it is one jitted function of the map: `search`. The steps are public for pictures and tests.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from sparsax.layouts import BlockPattern, block_sizes, check_blocks
from sparsax.typing import ArrayLike, known

Variant = Literal["CF", "F", "C"]


def search(
    maps: Float[ArrayLike, "*L T T"],
    *,
    block: int = 64,
    variant: Variant = "CF",
    quantile: float = 0.98,
    density: float = 0.04,
    filter_length: int = 31,
    length: int | None = None,
) -> BlockPattern:
    """The pattern that SPION finds in score maps, one for every map.

    Args:
        maps: softmax probabilities averaged over batch and heads (`sparsax.score_map`): `[T, T]`
            for one pattern shared by all heads, `[P, T, T]` for one per head, `[L, P, T, T]` for
            the stacked patterns of L layers.
        block: tokens in a block.
        variant: "CF" convolves, pools and floods; "F" pools and floods; "C" convolves, pools and
            takes the largest blocks.
        quantile: CF and F: the fill marks pooled values strictly above this quantile of them all.
        density: C: `int(n * n * density - n)` blocks besides the diagonal, n = T / block.
        filter_length: entries of the diagonal filter, odd.
        length: T, when the maps are pooled already, `[..., n, n]` from
            `sparsax.score_map(pool=block)`. Variant F alone: the others convolve before they pool.

    Returns:
        The pattern, with every block of the diagonal forced and full capacity (no list can
        overflow). Under jit, a map with NaN or infinity leaves its head invalid: its attention is
        NaN; a map without peaks leaves little more than the diagonal.

    Raises:
        ValueError: the map is not square, smaller than a block, not finite, or constant; or a
            setting is out of range.

    Example:
        >>> import jax
        >>> import sparsax
        >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 256, 2, 16))
        >>> pattern = sparsax.patterns.spion.search(sparsax.score_map(q, k), block=32)
        >>> pattern.kv_num_blocks.shape
        (1, 8)
        >>> pooled = sparsax.score_map(q, k, pool=32)
        >>> pattern = sparsax.patterns.spion.search(pooled, block=32, variant="F", length=256)
    """
    _check(maps, block, variant, quantile, density, filter_length, length)
    settings = (block, variant, quantile, density, filter_length, length)
    return _search(jnp.asarray(maps, jnp.float32), *settings)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5, 6))
def _search(maps, block, variant, quantile, density, filter_length, length) -> BlockPattern:
    leading, size = maps.shape[:-2], maps.shape[-1]

    def block_mask(score_map):
        if "C" in variant:
            score_map = diagonal_convolution(score_map, filter_length)
        pooled = average_pool(score_map, block) if length is None else score_map
        if variant == "C":
            mask = largest_blocks(pooled, density)
        else:
            mask = flood_fill(pooled, jnp.quantile(pooled, quantile))
        return mask | jnp.eye(mask.shape[-1], dtype=bool)

    mask = jax.vmap(block_mask)(maps.reshape(-1, size, size))
    mask = mask.reshape(*leading, *mask.shape[1:])
    pattern = BlockPattern.from_block_mask(mask, q_len=length or size, block_q=block)
    finite = jnp.isfinite(maps).all((-2, -1))
    return pattern.invalidate(~(finite if leading else finite[None]))


def diagonal_convolution(
    score_map: Float[ArrayLike, "T T"], filter_length: int = 31
) -> Float[Array, "T T"]:
    """`C[i, j] = sum_f A[i + f, j + f]` over `|f| <= filter_length // 2`, zero outside the map.

    The convolution with an unnormalised identity filter (section 4.1): it strengthens values that
    continue along a diagonal, and leaves the rest behind.
    """
    length, half = score_map.shape[-1], filter_length // 2
    padded = jnp.pad(score_map, half)
    # A loop: written out, XLA fuses all shifts into the pooling and reads them one value at a time.
    add = lambda f, total: total + lax.dynamic_slice(padded, (f, f), (length, length))
    return lax.fori_loop(1, filter_length, add, padded[:length, :length])


def average_pool(score_map: Float[ArrayLike, "T T"], block: int) -> Float[Array, "n n"]:
    """Means of the map's `block x block` tiles; a ragged last tile counts its real entries."""
    length = score_map.shape[-1]
    n = -(-length // block)
    padded = jnp.pad(score_map, (0, n * block - length))
    size = block_sizes(length, block)
    return padded.reshape(n, block, n, block).sum((1, 3)) / (size[:, None] * size)


def largest_blocks(pooled: Float[Array, "n n"], density: float) -> Bool[Array, "n n"]:
    """The `int(n * n * density - n)` largest tiles (variant C); the first of equals wins."""
    n = pooled.shape[-1]
    count = max(0, int(n * n * density - n))
    chosen = lax.top_k(pooled.reshape(-1), count)[1]
    return jnp.zeros(n * n, bool).at[chosen].set(True).reshape(n, n)


def flood_fill(
    pooled: Float[Array, "n n"], threshold: Float[Array, ""] | float
) -> Bool[Array, "n n"]:
    """The tiles above the threshold that walks from the first row and column step on.

    A walk (section 4.3, algorithm 1) steps to the largest of the tiles below, right and diagonally
    below, with zeros beyond the edge: below if it is larger than both others, right if it is not
    smaller than below and larger than the diagonal one, else diagonally. It marks the tile that
    it stepped on if the tile's value is strictly above the threshold, and goes on either way until
    it leaves the map. Where a walk starts is not tested, unless another walk steps on it.

    Every tile has one successor, so all walks advance together: a step leads to the next
    anti-diagonal or the one after it, and the loop carries these two frontiers, 2 n - 1 steps of n
    tiles each.
    """
    n = pooled.shape[-1]
    here = jnp.pad(pooled, ((0, 1), (0, 1)))
    below, right, corner = here[1:, :-1], here[:-1, 1:], here[1:, 1:]
    goes_below = (below > right) & (below > corner)
    goes_right = ~goes_below & (right >= below) & (right > corner)
    goes_corner = ~goes_below & ~goes_right

    # Skewed, row d holds the anti-diagonal x + y = d, indexed by x.
    x = jnp.arange(n)
    y = jnp.arange(2 * n - 1)[:, None] - x
    inside = (y >= 0) & (y < n)
    skew = lambda grid: jnp.where(inside, grid[x, jnp.clip(y, 0, n - 1)], False)
    moves = jnp.stack([skew(goes_below), skew(goes_right), skew(goes_corner)])
    starts = (x == 0) | (y == 0)
    down = lambda frontier: jnp.pad(frontier[:-1], (1, 0))  # x -> x + 1

    def more(state):
        d, last, before_last, _ = state
        return (d < 2 * n - 1) & ((d < n) | last.any() | before_last.any())

    def advance(state):
        d, last, before_last, stepped = state
        arrived = down(last & moves[0, d - 1]) | (last & moves[1, d - 1])
        arrived |= down(before_last & moves[2, jnp.maximum(d - 2, 0)])
        arrived &= inside[d]
        return d + 1, arrived | (starts[d] & inside[d]), last, stepped.at[d].set(arrived)

    first = (starts & inside)[0]
    state = (jnp.int32(1), first, jnp.zeros(n, bool), jnp.zeros((2 * n - 1, n), bool))
    stepped = lax.while_loop(more, advance, state)[3]
    rows, cols = jnp.arange(n)[:, None], jnp.arange(n)
    return stepped[rows + cols, rows] & (pooled > threshold)


def check_shape(maps: ArrayLike, block: int, length: int | None) -> int:
    """The number n of blocks; ValueError when maps are not square or do not fit block and length.

    Args:
        maps: score maps, or with `length` their means over blocks.
        block: tokens in a block.
        length: tokens, when the maps are pooled.
    """
    if maps.ndim not in (2, 3, 4) or maps.shape[-1] != maps.shape[-2]:
        raise ValueError(
            "score maps must be square: [T, T], [P, T, T] or [layers, P, T, T]; "
            f"got {tuple(maps.shape)}."
        )
    tokens = maps.shape[-1] if length is None else length
    blocks, _ = check_blocks(tokens, tokens, block, block)
    if length is not None and maps.shape[-1] != blocks:
        raise ValueError(
            f"length={length} says that the maps are pooled already: maps [..., {blocks}, "
            f"{blocks}], one value for each block of {block} tokens; got {tuple(maps.shape)}."
        )
    return blocks


def check_values(maps: ArrayLike) -> None:
    """ValueError when score maps are not finite, or one of them is constant."""
    if known(jnp.isfinite, maps) is False:
        raise ValueError(
            "score maps must be finite; got NaN or infinity. Look at the attention logits of the "
            "step that was probed."
        )
    if known(lambda x: x.max((-2, -1)) > x.min((-2, -1)), maps) is False:
        raise ValueError(
            "a score map has one value throughout, so there is nothing to find in it. Train the "
            "dense phase longer, or take a pattern of sparsax.patterns."
        )


def _check(maps, block, variant, quantile, density, filter_length, length) -> None:
    check_shape(maps, block, length)
    if variant not in ("CF", "F", "C"):
        raise ValueError(f"variant must be 'CF', 'F' or 'C'; got {variant!r}.")
    if length is not None and variant != "F":
        raise ValueError(
            f"length={length} says that the maps are pooled already: then variant must be 'F', as "
            f"the others convolve before they pool; got variant={variant!r}."
        )
    if not 0 <= quantile < 1 or not 0 < density <= 1:
        raise ValueError(
            f"quantile must lie within [0, 1) and density within (0, 1]; got {quantile}, {density}."
        )
    if filter_length < 1 or filter_length % 2 == 0:
        raise ValueError(f"filter_length must be odd and positive; got {filter_length}.")
    check_values(maps)
