"""An embedding whose gradient is summed in float32."""

import typing

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparsax.typing import ArrayLike

FEW = 1024  # rows of a table whose gradient is a product


class Embed(nnx.Embed):
    """`flax.nnx.Embed` with another gradient: summed in float32, for small tables in a fixed order.

    `nnx.Embed` casts its table to `dtype` before it takes rows, so that XLA sums the gradient in
    that dtype too. In bfloat16 a sum of a few hundred stops growing, and on a GPU the additions are
    slow: with a vocabulary of bytes they took most of a training step (docs/spion_findings.md).
    Here rows are taken first and cast then, which gives the same values. The gradient of up to
    1,024 rows is one matrix product, the same bits every time, at the price of a one-hot row of
    float32 for every id; beyond, XLA's atomic additions sum it in no fixed order. Reverse mode
    alone.

    Args:
        num_embeddings: rows V of the table.
        features: D.
        **options: see `flax.nnx.Embed`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from sparsax.nn import Embed
        >>> table = Embed(256, 8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        >>> table(jnp.array([[1, 2]])).shape
        (1, 2, 8)
    """

    # Without flax's out_sharding: shard_map needs none.
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, inputs: ArrayLike
    ) -> Float[Array, "*B D"]:
        """The rows of these ids.

        Raises:
            ValueError: the ids are no integers.
        """
        if not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise ValueError(f"ids must be integers; got {inputs.dtype}.")
        inputs = jnp.asarray(inputs).astype(jnp.int32)  # 8 bits cannot count what they index
        if self.num_embeddings == 1:  # flax's one row answers to every id
            return super().__call__(inputs)
        table = self.embedding[...]
        # Inside shard_map a shared table's gradient is a sum over devices: this cast's transpose.
        axes = jax.typeof(inputs).mat.varying - jax.typeof(table).mat.varying
        table = jax.lax.pcast(table, tuple(axes), to="varying")
        return _rows(table, inputs).astype(self.dtype or table.dtype)


@jax.custom_vjp
def _rows(table: Float[Array, "V D"], ids: Int[Array, "*B"]) -> Float[Array, "*B D"]:
    return jnp.take(table, ids, axis=0)


def _forward(table, ids):
    return _rows(table, ids), (table, ids)


def _backward(residuals: typing.Any, gradient: Float[Array, "*B D"]):
    table, ids = residuals
    count, features = table.shape
    ids, gradient = ids.reshape(-1), gradient.reshape(-1, features).astype(jnp.float32)
    if count <= FEW:
        ids = jnp.where(ids < 0, ids + count, ids)  # as `jnp.take` counts
        found = jnp.matmul(
            jax.nn.one_hot(ids, count).T, gradient, precision=jax.lax.Precision.HIGHEST
        )
    else:
        found = jnp.zeros_like(table, jnp.float32).at[ids].add(gradient)
    return found.astype(table.dtype), None


_rows.defvjp(_forward, _backward)
