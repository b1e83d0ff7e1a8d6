"""A dense matrix to factors: TSVD, plain SVD, and TSVD-common."""

from functools import partial

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sparsax.lowrank.factors import CommonFactors, Side, TiledFactors
from sparsax.lowrank.svd import (
    METHODS,
    Method,
    Spectrum,
    damped,
    pad_gram,
    randomized_svd,
    spectrum,
    split,
)
from sparsax.typing import ArrayLike, is_concrete

Tile = int | tuple[int, int] | None


def tsvd(
    w: Float[ArrayLike, "D F"],
    *,
    tile: Tile = None,
    rank: int | None = None,
    ratio: int | float | None = None,
    energy: int | float | None = None,
    gram: Float[ArrayLike, "D D"] | None = None,
    method: Method = "exact",
    seed: int = 0,
    tolerance: float = 1e-3,
) -> TiledFactors:
    """The factors of every tile of a matrix, by truncated singular value decomposition.

    Singular values are shared evenly between both factors. Exactly one of `rank`, `ratio` and
    `energy` says how much is kept; the rank is the same for all tiles.

    Args:
        w: the matrix, `[D, F]`, features in by features out (as an `nnx.Linear` kernel).
        tile: rows and columns of a tile, one number for both, or None for the whole matrix, which
            is plain SVD. Edges that a tile does not divide are padded by zeros.
        rank: R.
        ratio: dense parameters over those kept; the largest rank that reaches it.
        energy: share of the squared norm to keep, in (0, 1]; the smallest rank that does.
        gram: `x.T @ x` of calibration inputs x `[*, D]`. The error of the outputs `x @ w` is then
            minimised, not that of w: left factors by a Cholesky-weighted SVD of every tile, right
            factors by least squares over all tiles of a column together.
        method: "exact", or "randomized": faster for ranks far below the tile, checked, see
            `sparsax.lowrank.randomized_svd`.
        seed: of the randomised start.
        tolerance: relative error that the randomised method may leave.

    Returns:
        The factors, in w's dtype.

    Raises:
        ValueError: tile, rank, ratio or energy cannot be met; w holds NaN or infinity.

    Source: Li et al., "A Hardware-Friendly Tiled Singular-Value Decomposition-Based Matrix
    Multiplication for Transformer-Based Models" (IEEE CAL 22(2), 2023); the weighted
    form as in Wang et al., "SVD-LLM" (arXiv 2403.07378), section 3.1, tile by tile.

    Example:
        >>> import jax
        >>> import sparsax
        >>> w = jax.random.normal(jax.random.key(0), (128, 256))
        >>> sparsax.tsvd(w, tile=64, ratio=4).rank
        8
        >>> sparsax.tsvd(w, energy=0.95).rank
        99
    """
    dense, gram = on_host(w, gram)
    tile = tile_shape(w.shape, tile)
    wanted = {"rank": rank, "ratio": ratio, "energy": energy}
    if sum(value is not None for value in wanted.values()) != 1:
        raise ValueError(f"give exactly one of rank, ratio and energy; got {wanted}.")
    if method not in METHODS or (method == "randomized" and energy is not None):
        raise ValueError(
            f"method must be one of {METHODS}, and 'exact' for energy=, which needs all singular "
            f"values; got {method!r}."
        )
    if ratio is not None:
        rank = rank_for_ratio(w.shape, tile, ratio)
    if rank is not None and not 1 <= rank <= min(tile):
        raise ValueError(f"rank must be within [1, {min(tile)}] for tile={tile}; got {rank}.")
    decompose = None
    if rank is not None and method == "randomized":
        decompose = partial(randomized_svd, rank=rank, seed=seed, tolerance=tolerance)
    parts = spectrum(split(dense, tile), gram, decompose)
    rank = rank_for_energy(parts.values, energy) if rank is None else rank
    return assemble(parts.cut(rank), dense, gram).astype(w.dtype)


def tsvd_common(
    w: Float[ArrayLike, "D F"],
    *,
    tile: int,
    rank: int | None = None,
    ratio: int | float | None = None,
    side: Side = "right",
    gram: Float[ArrayLike, "D D"] | None = None,
) -> CommonFactors:
    """Tiles that share one factor: the best in the squared norm, in closed form.

    The common factor is orthonormal, the singular values stand in the factors of the tiles: it is
    the part to fine-tune, they stay frozen.

    Args:
        w: the matrix, `[D, F]`.
        tile: columns (right) or rows (left) of a tile; an edge it does not divide is padded.
        rank: R; or `ratio`, dense parameters over those kept.
        ratio: see `rank`.
        side: where the common factor stands in the product.
        gram: `x.T @ x` of calibration inputs, for side="right" (see `tsvd`).

    Returns:
        The factors, in w's dtype.

    Raises:
        ValueError: tile, rank or ratio cannot be met, or `gram` with side="left", where the
            weights of the tiles' rows leave no common factor in closed form.

    Source: stacking the tiles turns the problem into one truncated SVD (Eckart-Young).

    Example:
        >>> import jax
        >>> import sparsax
        >>> w = jax.random.normal(jax.random.key(0), (128, 256))
        >>> sparsax.tsvd_common(w, tile=64, rank=16, side="left").tiles.shape
        (2, 16, 256)
    """
    dense, gram = on_host(w, gram)
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right'; got {side!r}.")
    if gram is not None and side == "left":
        raise ValueError("gram needs side='right': a left common factor has no closed form.")
    # `x w = x u c` on the right; on the left the same for the transposed matrix.
    dense = dense if side == "right" else dense.T
    other, own = dense.shape
    tile_shape((own, own), tile)
    if (rank is None) == (ratio is None):
        raise ValueError(f"give exactly one of rank and ratio; got {rank=}, {ratio=}.")
    count = -(-own // tile)
    if ratio is not None:
        rank = int(w.size / ratio / (count * other + tile) + 1e-9)
    if rank is None or not 1 <= rank <= tile:
        given = "." if ratio is None else f" from ratio={ratio}."
        raise ValueError(f"rank must be within [1, {tile}] for tile={tile}; got {rank}{given}")
    rows = np.pad(dense, ((0, 0), (0, -own % tile)))
    stack = rows if gram is None else np.linalg.cholesky(gram).T @ rows
    # The R-factor has the stack's right singular vectors, and its size is that of one tile.
    triangle = np.linalg.qr(stack.reshape(-1, tile), mode="r")
    common = np.linalg.svd(triangle, full_matrices=False)[2][:rank]
    tiles = rows.reshape(other, count, tile) @ common.T
    if side == "left":
        tiles, common = tiles.transpose(1, 2, 0), common.T
    tiles, common = jnp.asarray(tiles, w.dtype), jnp.asarray(common, w.dtype)
    return CommonFactors(tiles, common, pad=-own % tile, side=side)


def assemble(
    parts: Spectrum, w: Float[np.ndarray, "D F"], gram: Float[np.ndarray, "D D"] | None
) -> TiledFactors:
    """Factors from decomposed tiles; with `gram`, the right factors are fitted to all outputs."""
    right = parts.values[..., None] * parts.right
    if gram is not None:
        right = _fit_right(parts.left, w, gram, right.shape[-1])
    # A factor that vanished with its singular value is not divided by it.
    share = np.sqrt(np.maximum(parts.values, 1e-6 * parts.values.max() + 1e-30))
    u = jnp.asarray((parts.left * share[..., None, :]).transpose(0, 2, 1, 3), jnp.float32)
    v = jnp.asarray((right / share[..., None]).transpose(1, 0, 2, 3), jnp.float32)
    return TiledFactors(
        u, v, pad_in=u.shape[0] * u.shape[1] - w.shape[0],
        pad_out=v.shape[0] * v.shape[3] - w.shape[1],
    )  # fmt: skip


def _fit_right(left, w, gram, columns) -> Float[np.ndarray, "I J R C"]:
    """`argmin_v |x(w - left v)|`: what the tiles of a column get wrong together, v makes good.

    The SVD of a tile sees its own inputs only; inputs of different tiles are correlated as well.
    """
    num_in, num_out, rows, rank = left.shape
    gram = pad_gram(gram, num_in * rows)
    padded = np.pad(w, ((0, len(gram) - w.shape[0]), (0, num_out * columns - w.shape[1])))
    blocks = gram.reshape(-1, num_in, rows).swapaxes(0, 1)
    right = np.empty((num_in, num_out, rank, columns))
    for j in range(num_out):
        # The column's left factors are the block diagonal matrix B: `weighed = gram @ B`.
        weighed = (blocks @ left[:, j]).swapaxes(0, 1).reshape(len(gram), -1)
        normal = left[:, j].mT @ weighed.reshape(num_in, rows, -1)  # B.T @ gram @ B
        normal = normal.reshape(num_in * rank, -1)
        normal += 1e-9 * np.diagonal(normal).mean() * np.eye(len(normal))
        target = weighed.T @ padded[:, j * columns : (j + 1) * columns]
        right[:, j] = np.linalg.solve(normal, target).reshape(num_in, rank, columns)
    return right


def tile_shape(shape: tuple[int, ...], tile: Tile) -> tuple[int, int]:
    """Rows and columns of a tile; ValueError unless both lie within the matrix."""
    whole = (shape[0], shape[1])
    pair = whole if tile is None else (tile, tile) if isinstance(tile, int) else tuple(tile)
    if len(pair) != 2 or not all(1 <= t <= n for t, n in zip(pair, whole, strict=True)):
        raise ValueError(
            f"tile must lie within the matrix: 1 <= tile <= {whole}, an int, a pair, or None "
            f"for the whole matrix; got {tile}."
        )
    return pair


def rank_for_ratio(shape: tuple[int, ...], tile: tuple[int, int], ratio: int | float) -> int:
    """The largest rank whose factors have at most `1 / ratio` of the dense parameters."""
    count = -(-shape[0] // tile[0]) * -(-shape[1] // tile[1])
    dense = shape[0] * shape[1]
    rank = int(dense / ratio / (count * sum(tile)) + 1e-9) if ratio > 0 else 0
    if rank < 1:
        raise ValueError(
            f"ratio must be positive and leave at least rank 1; rank 1 of tiles {tile} is a ratio "
            f"of {dense / (count * sum(tile)):.4g}; got {ratio}."
        )
    return min(rank, *tile)


def rank_for_energy(values: Float[np.ndarray, "I J S"], share: int | float | None) -> int:
    """The smallest rank that keeps this share of the squared singular values of all tiles."""
    if share is None or not 0 < share <= 1:
        raise ValueError(f"energy must be within (0, 1]; got {share}.")
    kept = np.cumsum(np.square(values).sum((0, 1)))
    # The sum's own rounding must not cost a rank.
    return int(np.argmax(kept >= share * kept[-1] * (1 - 1e-9))) + 1


def on_host(w, gram) -> tuple[np.ndarray, np.ndarray | None]:
    """The matrix and the damped Gram matrix in NumPy's float64; ValueError when they are unfit."""
    if not is_concrete(w) or (gram is not None and not is_concrete(gram)):
        raise ValueError(
            "w and gram must be concrete: ranks are shapes, and the decomposition runs on the "
            "host. Compress outside of jit; the factors are a pytree that jit takes."
        )
    if w.ndim != 2 or not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"w must be a real matrix [D, F]; got {w.dtype} {tuple(w.shape)}.")
    if gram is not None and gram.shape != (w.shape[0], w.shape[0]):
        raise ValueError(
            f"gram must be x.T @ x of inputs x [*, D], so [{w.shape[0]}, {w.shape[0]}]; "
            f"got {tuple(gram.shape)}."
        )
    found = [None if array is None else np.asarray(array, np.float64) for array in (w, gram)]
    for name, array in zip(("w", "gram"), found, strict=True):
        if array is not None and not np.isfinite(array).all():
            raise ValueError(f"{name} must be finite; it holds NaN or infinity.")
    dense, gram = found
    assert dense is not None
    return dense, None if gram is None else damped(gram)
