"""k-means of many small, independent problems at once; the same key gives the same bits."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key, UInt8

from sparsax.quantise.vectors import HIGHEST, each_product, samples_last


@jax.jit
def nearest(
    x: Float[Array, "K n M d"], codebooks: Float[Array, "K M E d"]
) -> UInt8[Array, "K n M"]:
    """The nearest of at most 256 centroids of every sub-vector; the first of equals.

    |x - c|^2 is smallest where x c - |c|^2 / 2 is largest, so the differences are never formed.
    """
    if codebooks.shape[2] > 256:
        raise ValueError(f"a code is 8 bits, for 256 centroids; got {codebooks.shape[2]}.")
    lengths = (jnp.square(codebooks) / 2).sum(-1)  # halved first: one loop with the sum
    products = enumerate(each_product(x, codebooks))
    scores = (product - lengths[:, :, i, None] for i, product in products)
    best = next(scores)
    chosen = jnp.zeros(best.shape, jnp.uint8)
    for i, score in enumerate(scores, start=1):
        # The best so far by `maximum`: by a second `where`, XLA would keep all scores in memory.
        chosen = jnp.where(score > best, jnp.uint8(i), chosen)
        best = jnp.maximum(score, best)
    return samples_last(chosen)


@partial(jax.jit, static_argnames=("num_centroids", "iterations"))
def kmeans(
    key: Key[Array, ""],
    x: Float[Array, "K n M d"],
    weights: Float[Array, " n"],
    *,
    num_centroids: int,
    iterations: int,
) -> Float[Array, "K M E d"]:
    """Centroids of the samples, one problem for every head and codebook.

    Starts as k-means++ does. A centroid that no sample chose moves to the sample that is farthest
    from its own, the next such one to the next farthest.

    Args:
        key: of the random start.
        x: n sub-vectors for each of K heads and M codebooks.
        weights: 0 for samples that do not count (padding), else 1.
        num_centroids: E, at most n.
        iterations: rounds of Lloyd's algorithm.

    Source: Lloyd, "Least squares quantization in PCM" (1982); Arthur and Vassilvitskii,
    "k-means++" (SODA 2007).
    """
    keys = jax.random.split(key, (x.shape[0], x.shape[2]))
    one = lambda key, x: _kmeans(key, x, weights, num_centroids, iterations)
    # Heads in turn, so that the distances of one head alone are held.
    return lax.map(lambda head: jax.vmap(one, (0, 1))(*head), (keys, x))


def _kmeans(key, x, weights, num_centroids, iterations):
    def lloyd(_, centroids):
        distances = _distances(x, centroids)
        chosen = jax.nn.one_hot(distances.argmin(-1), num_centroids) * weights[:, None]
        counts = chosen.sum(0)
        means = jnp.matmul(chosen.T, x, precision=HIGHEST) / jnp.maximum(counts, 1.0)[:, None]
        empty = counts == 0
        farthest = lax.top_k(distances.min(-1) * weights, num_centroids)[1]
        return jnp.where(empty[:, None], x[farthest[jnp.cumsum(empty) - 1]], means)

    return lax.fori_loop(0, iterations, lloyd, _spread(key, x, weights, num_centroids))


def _spread(key, x, weights, num_centroids):
    """k-means++: every next centroid is a sample drawn by its squared distance from the last."""

    def draw(closest, key):
        chance = jnp.where(jnp.isinf(closest), 1.0, closest) * weights
        centroid = x[jax.random.categorical(key, jnp.log(chance))]
        return jnp.minimum(closest, _distances(x, centroid[None])[:, 0]), centroid

    start = jnp.full(x.shape[0], jnp.inf)
    return lax.scan(draw, start, jax.random.split(key, num_centroids))[1]


def _distances(x, centroids):
    return jnp.square(x[:, None] - centroids).sum(-1)
