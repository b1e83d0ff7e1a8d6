"""Rotary positions."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotate(
    x: Float[Array, "B T N H"],
    base: float = 10_000.0,
    positions: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Queries or keys, turned by angles that grow with their position.

    Feature i of the first half and its partner in the second half turn by `t / base^(2 i / H)` at
    position t, so that a query's product with a key depends on how far apart they are alone. Angles
    are float32.

    Args:
        x: `[B, T, N, H]`, H even.
        base: of the angles' geometric sequence.
        positions: t of every token; 0 to T - 1 when None.

    Raises:
        ValueError: H is odd.

    Source: Su et al., "RoFormer" (arXiv 2104.09864), section 3.2, with features paired as in Llama.

    Example:
        >>> import jax.numpy as jnp
        >>> from sparsax.nn import rotate
        >>> x = jnp.ones((1, 8, 1, 4))
        >>> bool((rotate(x)[:, 0] == x[:, 0]).all())
        True
    """
    _, length, _, features = x.shape
    if features % 2:
        raise ValueError(f"rotary positions need an even number of head features; got {features}.")
    frequency = base ** -(jnp.arange(0, features, 2, dtype=jnp.float32) / features)
    t = jnp.arange(length) if positions is None else positions
    angle = t.astype(jnp.float32)[..., None, None] * frequency
    one, two = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], -1).astype(x.dtype)
