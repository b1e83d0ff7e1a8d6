"""One budget of parameters spread over many matrices, by measured error."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from sparsax.lowrank.decompose import assemble, on_host, tile_shape
from sparsax.lowrank.svd import spectrum, split
from sparsax.typing import ArrayLike

TILES: tuple[int | None, ...] = (64, 128, 256, 384, 512, None)
# Compression of one matrix that is tried when its error must be measured rank by rank.
_RATIOS = np.geomspace(1.0, 64.0, 19)


@dataclasses.dataclass(frozen=True)
class TileChoice:
    """What `choose_tiles` gives a matrix.

    Attributes:
        tile: size for `tsvd`, None for plain SVD.
        rank: for `tsvd`; None when the matrix is better left dense.
        error: measured relative error (of the outputs, when Gram matrices were given).
        parameters: numbers stored.
    """

    tile: int | None
    rank: int | None
    error: float
    parameters: int


def choose_tiles(
    weights: Mapping[str, Float[ArrayLike, "..."]],
    ratio: int | float,
    *,
    tiles: Sequence[int | None] = TILES,
    grams: Mapping[str, Float[ArrayLike, "..."]] | None = None,
    rank_multiple: int = 1,
) -> dict[str, TileChoice]:
    """Tile size and rank of every matrix, so that all together are `ratio` times smaller.

    Minimises the sum of the squared relative errors, every matrix counting the same. Each error
    is measured on the factors that `tsvd` would make, for every tile size and a list of ranks.
    The budget is spread by a Lagrange multiplier: a number is spent where it buys most.

    Args:
        weights: matrices `[D, F]` by name; concrete, as for `tsvd`.
        ratio: dense parameters of all matrices over the parameters kept.
        tiles: sizes to try; those larger than a matrix are passed over, None is the whole matrix.
        grams: `x.T @ x` of calibration inputs `[D, D]` by name, of all the matrices or none.
        rank_multiple: ranks are multiples of it (16 for Hopper kernels in 16-bit).

    Returns:
        The choice for every name.

    Raises:
        ValueError: no choice reaches the ratio, or names do not match.

    Example:
        >>> import jax
        >>> import sparsax
        >>> w = jax.random.normal(jax.random.key(0), (2, 64, 64))
        >>> low_rank = w[1, :, :8] @ w[1, :8]
        >>> choice = sparsax.choose_tiles({"noise": w[0], "low rank": low_rank}, ratio=2)
        >>> choice["low rank"].rank, round(choice["low rank"].error, 3)
        (8, 0.0)
    """
    if grams is not None and set(grams) != set(weights):
        raise ValueError(
            f"grams must name every matrix; it differs in {sorted(set(grams) ^ set(weights))}."
        )
    if not weights:
        raise ValueError("weights must name at least one matrix; got none.")
    candidates = [
        _hull(measure(w, tiles, None if grams is None else grams[name], rank_multiple))
        for name, w in weights.items()
    ]
    budget = sum(w.size for w in weights.values()) / ratio
    return dict(zip(weights, _spread(candidates, budget, ratio), strict=True))


def measure(
    w: Float[ArrayLike, "D F"],
    tiles: Sequence[int | None] = TILES,
    gram: Float[ArrayLike, "D D"] | None = None,
    rank_multiple: int = 1,
) -> list[TileChoice]:
    """Every choice for one matrix with its measured error, the dense matrix last."""
    dense, gram = on_host(w, gram)
    whole = energy(dense, gram)
    found = []
    for tile in dict.fromkeys(tiles):
        if tile is not None and tile > min(w.shape):
            continue
        pair = tile_shape(w.shape, tile)
        parts = spectrum(split(dense, pair), gram)
        num_in, num_out, most = parts.values.shape
        each = num_in * num_out * sum(pair)  # parameters of one rank
        ranks = np.arange(1, min(most, w.size // each) + 1)
        if gram is None:
            ranks = ranks[ranks % rank_multiple == 0]
            kept = np.cumsum(np.square(parts.values).sum((0, 1)))[ranks - 1]
            squares = np.maximum(whole - kept, 0.0)
        else:
            few = np.unique(w.size / each / _RATIOS // rank_multiple * rank_multiple)
            ranks = few[few > 0].astype(int)
            cuts = [assemble(parts.cut(rank), dense, gram).to_dense() for rank in ranks.tolist()]
            squares = [energy(dense - np.asarray(cut), gram) for cut in cuts]
        found += [
            TileChoice(tile, int(rank), float(np.sqrt(square / whole)), int(rank * each))
            for rank, square in zip(ranks, squares, strict=True)
        ]
    return [*found, TileChoice(None, None, 0.0, w.size)]


def _hull(choices: list[TileChoice]) -> list[TileChoice]:
    """The choices that some price of a parameter makes the best, fewest parameters first."""
    hull: list[TileChoice] = []
    for choice in sorted(choices, key=lambda c: (c.parameters, c.error)):
        if hull and choice.error > hull[-1].error - 1e-6:  # what float32 would round away
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _gain(fewer: TileChoice, more: TileChoice) -> float:
    """Squared error that one more parameter takes away."""
    return (fewer.error**2 - more.error**2) / (more.parameters - fewer.parameters)


def _spread(hulls: list[list[TileChoice]], budget: float, ratio: int | float) -> list[TileChoice]:
    """Walks up all hulls at once, always the step that gains most per parameter.

    Gains fall along a hull, so this is the same as lowering the multiplier until the budget is
    spent. A step that no longer fits ends its hull; cheaper steps of other hulls may follow.
    """
    place = [0] * len(hulls)
    spent = sum(hull[0].parameters for hull in hulls)
    if spent > budget:
        dense = sum(hull[-1].parameters for hull in hulls if hull[-1].rank is None)
        raise ValueError(
            f"ratio must be within reach of rank 1 (or rank_multiple) of every matrix, at most "
            f"{dense / spent:.4g} for these; got {ratio}."
        )
    steps: list[tuple[float, int, int]] = [
        (_gain(hull[k], hull[k + 1]), index, k)
        for index, hull in enumerate(hulls)
        for k in range(len(hull) - 1)
    ]
    for _, index, k in sorted(steps, reverse=True):
        hull = hulls[index]
        cost = hull[k + 1].parameters - hull[k].parameters
        if place[index] == k and spent + cost <= budget:
            place[index], spent = k + 1, spent + cost
    return [hull[k] for hull, k in zip(hulls, place, strict=True)]


def energy(w: Float[np.ndarray, "D F"], gram: Float[np.ndarray, "D D"] | None) -> float:
    """The squared norm of `w`, or of `x @ w` for inputs with that Gram matrix."""
    return float(np.vdot(w if gram is None else gram @ w, w)) or 1e-300
