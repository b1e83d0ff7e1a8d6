"""Singular value decompositions of all tiles of a matrix at once, exact or randomised.

Compression happens once, outside of any compiled program: LAPACK in float64 on the host neither
fails on a GPU nor compiles for every new shape. The randomised method is matmuls and stays on the
device.
"""

import typing
import warnings
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

HIGHEST = jax.lax.Precision.HIGHEST
Method = typing.Literal["exact", "randomized"]
METHODS = typing.get_args(Method)

# Halko, Martinsson, Tropp (2011), section 4: a few columns more than the rank.
OVERSAMPLING = 8
MAX_ITERATIONS = 8
# Part of the diagonal's mean that is added to a Gram matrix: directions that the calibration
# inputs hardly use must not be free.
DAMPING = 1e-4


class Spectrum(typing.NamedTuple):
    """`tile = left * values @ right` for every tile, largest singular values first."""

    left: Float[np.ndarray, "I J A S"]
    values: Float[np.ndarray, "I J S"]
    right: Float[np.ndarray, "I J S C"]

    def cut(self, rank: int) -> "Spectrum":
        """The leading triplets."""
        return Spectrum(self.left[..., :rank], self.values[..., :rank], self.right[..., :rank, :])


def split(w: Float[np.ndarray, "D F"], tile: tuple[int, int]) -> Float[np.ndarray, "I J A C"]:
    """The tiles of a matrix, its edges padded by zeros."""
    rows, columns = tile
    w = np.pad(w, ((0, -w.shape[0] % rows), (0, -w.shape[1] % columns)))
    w = w.reshape(w.shape[0] // rows, rows, w.shape[1] // columns, columns)
    return w.swapaxes(1, 2)


def spectrum(
    tiles: Float[np.ndarray, "I J A C"],
    gram: Float[np.ndarray, "D D"] | None = None,
    decompose: Callable[..., Spectrum] | None = None,
) -> Spectrum:
    """The decomposition of every tile; with `gram`, the one that is best for its inputs.

    For inputs X_i with Gram matrix G = L L^T, |X_i (W - UV)| = |L^T W - L^T U V|: decompose
    L^T W and multiply the left factor by the inverse of L^T.
    """
    decompose = exact_svd if decompose is None else decompose
    if gram is None:
        return decompose(tiles)
    num_in, size = tiles.shape[0], tiles.shape[2]
    blocks = pad_gram(gram, num_in * size).reshape(num_in, size, num_in, size)
    own = blocks[np.arange(num_in), :, np.arange(num_in)]
    upper = np.linalg.cholesky(own).mT[:, None]
    left, values, right = decompose(upper @ tiles)
    return Spectrum(np.linalg.solve(upper, left), values, right)


def exact_svd(tiles: Float[np.ndarray, "I J A C"]) -> Spectrum:
    """All singular triplets of every tile."""
    return Spectrum(*np.linalg.svd(tiles, full_matrices=False))


def damped(gram: Float[np.ndarray, "D D"]) -> Float[np.ndarray, "D D"]:
    """The Gram matrix with a little of its mean diagonal added: positive definite."""
    mean = np.diagonal(gram).mean()
    return gram + (DAMPING * mean if mean > 0 else 1.0) * np.eye(len(gram))


def pad_gram(gram: Float[np.ndarray, "D D"], size: int) -> Float[np.ndarray, "E E"]:
    """The Gram matrix with the identity for inputs that only pad: their weights are zero."""
    padded = np.eye(size)
    padded[: len(gram), : len(gram)] = gram
    return padded


def randomized_svd(
    tiles: Float[np.ndarray, "I J A C"],
    rank: int,
    *,
    seed: int = 0,
    tolerance: float = 1e-3,
) -> Spectrum:
    """The leading `rank` singular triplets of every tile by subspace iteration.

    The residual is checked: iteration goes on until one more round makes no tile's relative error
    smaller by more than `tolerance`. Tiles that have not settled after 8 rounds are decomposed
    exactly, and a warning says how many.

    Args:
        tiles: `[I, J, A, C]`.
        rank: triplets wanted.
        seed: of the random start.
        tolerance: how much relative error may still be gained by going on.

    Source: Halko, Martinsson, Tropp, "Finding structure with randomness" (SIAM Review 2011),
    algorithms 4.4 and 5.1.
    """
    width = rank + OVERSAMPLING
    if width >= min(tiles.shape[-2:]):  # a subspace that is nearly everything saves nothing
        return exact_svd(tiles).cut(rank)
    device = jnp.asarray(tiles, jnp.float32)
    start = jax.random.normal(jax.random.key(seed), (*tiles.shape[:2], tiles.shape[3], width))
    basis, error = _iterate(device, start, rank)
    settled = np.zeros(tiles.shape[:2], bool)
    for _ in range(MAX_ITERATIONS):
        back = jnp.matmul(device.mT, basis, precision=HIGHEST)
        basis, better = _iterate(device, back, rank)
        settled, error = np.asarray(error - better) <= tolerance, better
        if settled.all():
            break
    small = np.asarray(basis, np.float64).mT @ tiles
    found = exact_svd(small).cut(rank)
    found = found._replace(left=np.asarray(basis, np.float64) @ found.left)
    if not settled.all():
        warnings.warn(
            f"randomised SVD: {int((~settled).sum())} of {settled.size} tiles had not settled "
            f"within {tolerance:g} after {MAX_ITERATIONS} rounds; these were decomposed exactly.",
            stacklevel=2,
        )
        exact = exact_svd(tiles[~settled][None]).cut(rank)
        for kept, new in zip(found, exact, strict=True):
            kept[~settled] = new[0]
    return found


@partial(jax.jit, static_argnums=2)
def _iterate(
    tiles: Array, vectors: Array, rank: int
) -> tuple[Float[Array, "I J A X"], Float[Array, "I J"]]:
    """A basis of `tiles @ vectors`, and every tile's relative error within it."""
    vectors = jnp.linalg.qr(vectors)[0]
    basis = jnp.linalg.qr(jnp.matmul(tiles, vectors, precision=HIGHEST))[0]
    small = jnp.matmul(basis.mT, tiles, precision=HIGHEST)
    # Squared singular values by the small symmetric problem: only their sum matters here.
    squares = jnp.linalg.eigvalsh(jnp.matmul(small, small.mT, precision=HIGHEST))[..., -rank:]
    total = jnp.square(tiles).sum((-2, -1))
    share = squares.sum(-1) / jnp.where(total > 0, total, 1.0)
    return basis, jnp.sqrt(jnp.clip(1.0 - share, 0.0))
