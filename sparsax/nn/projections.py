"""The dense layers around attention."""

from typing import Any

from flax import nnx


def out_shape(layer: Any) -> tuple[int, int]:
    """`(heads, features of a head)` of a projection, or of what stands for one."""
    found = getattr(layer, "out_shape", None) or layer.out_features
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise ValueError(
            f"a projection must map to (heads, features of a head), as nnx.LinearGeneral; "
            f"{type(layer).__name__} maps to {found}."
        )
    heads, features = found
    return heads, features


def attention_projections(
    num_heads: int, in_features: int, num_kv_heads: int | None, head_dim: int | None, *,
    use_bias: bool = True, dtype: Any = None, rngs: nnx.Rngs,
) -> tuple[nnx.LinearGeneral, nnx.LinearGeneral, nnx.LinearGeneral, nnx.LinearGeneral]:  # fmt: skip
    """`(query, key, value, out)`; K is N when None, and H is D / N.

    Raises:
        ValueError: heads and features do not divide.
    """
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if num_heads % num_kv_heads or (head_dim is None and in_features % num_heads):
        raise ValueError(
            "num_kv_heads must divide num_heads, and num_heads in_features (or give "
            f"head_dim); got {num_kv_heads}, {num_heads} and {in_features}."
        )
    head_dim = in_features // num_heads if head_dim is None else head_dim
    options = {"use_bias": use_bias, "dtype": dtype, "rngs": rngs}
    query, key, value = (
        nnx.LinearGeneral(in_features, (heads, head_dim), **options)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    out = nnx.LinearGeneral((num_heads, head_dim), in_features, axis=(-2, -1), **options)
    return query, key, value, out
