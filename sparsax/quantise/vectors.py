"""Sub-vectors of queries and keys, and their products with centroids."""

from collections.abc import Iterator
from functools import reduce

import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Shaped

HIGHEST = lax.Precision.HIGHEST
UNROLLED = 512  # features of a codebook's centroids, up to which no matmul forms the products


def split(x: Float[Array, "B S N H"], kv_heads: int, dim: int) -> Float[Array, "K n M d"]:
    """Sub-vectors as samples of every kv head, n = B * S * G."""
    x = x.reshape(*x.shape[:2], kv_heads, -1, x.shape[3] // dim, dim)
    return jnp.moveaxis(x, 2, 0).reshape(kv_heads, -1, *x.shape[4:])


def join(found: Shaped[Array, "K n M"], shape: tuple[int, ...]) -> Shaped[Array, "B S N M"]:
    """A number of every sample, where `split` found it in an array of that shape."""
    found = found.reshape(found.shape[0], *shape[:2], -1, found.shape[-1])
    return jnp.moveaxis(found, 0, 2).reshape(*shape[:3], -1)


def each_product(
    x: Float[Array, "K n M d"], codebooks: Float[Array, "K M E d"]
) -> Iterator[Float[Array, "K M n"]]:
    """The products of all sub-vectors with one centroid after the other, float32.

    Few and short centroids are written out, feature by feature: XLA makes one loop of these and of
    what follows, and no product is ever in memory.
    """
    if codebooks[0, 0].size > UNROLLED:
        x = x.astype(jnp.float32)
        yield from jnp.einsum("knmd,kmed->ekmn", x, codebooks, precision=HIGHEST)
        return
    x = x.swapaxes(1, 2)
    features = [x[..., i].astype(jnp.float32) for i in range(x.shape[-1])]
    for e in range(codebooks.shape[2]):
        factors = (codebooks[:, :, e, i, None] for i in range(len(features)))
        yield reduce(jnp.add, map(jnp.multiply, features, factors))


def samples_last(x: Shaped[Array, "K M n"]) -> Shaped[Array, "K n M"]:
    """What followed from products, where their loop ends.

    In memory the samples lie side by side, or XLA would follow the order of queries and keys. So
    the threads of a GPU that run together, and the four samples of one of them, share what they
    read of the codebooks. Neither does the loop take in what comes next, in an order of its own.
    On other devices the order is XLA's own: `jax.export` refuses a program that asks for one.
    """
    ordered = lambda x: with_layout_constraint(x, Layout((0, 1, 2)))
    x = lax.platform_dependent(x, cuda=ordered, default=lambda x: x)
    return lax.optimization_barrier(x).swapaxes(1, 2)
