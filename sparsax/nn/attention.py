"""Self-attention that is dense until it is given a pattern."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from sparsax.attention import block_sparse_attention, score_map
from sparsax.layouts import BlockPattern
from sparsax.nn.projections import attention_projections
from sparsax.nn.rotary import rotate
from sparsax.typing import Implementation, Pruned

Dense = Literal["xla", "cudnn"]


class Pattern(nnx.Variable):
    """Holds a layer's `BlockPattern`, or None while the layer is dense. Not trained."""


class ScoreMap(nnx.Intermediate):
    """Holds the score map that a probed layer recorded."""


@dataclasses.dataclass(frozen=True)
class _Probe:
    """Which score map a layer is to record."""

    per_head: bool
    pool: int | None


class SparseAttention(nnx.Module):
    """Multi-head self-attention over the blocks that its pattern lists.

    Without a pattern it is dense (`jax.nn.dot_product_attention`). `set_patterns` makes a model's
    layers sparse, and `score_maps` reads what SPION's search needs; the pattern is part of the
    module's state, so `nnx.split`, `nnx.jit` and orbax carry it.

    Args:
        num_heads: query heads N.
        in_features: features D of input and output.
        num_kv_heads: key and value heads K, a divisor of N; N when None.
        head_dim: features H of a head; D / N when None.
        pattern: the blocks to attend to; None is dense.
        causal: whether a token sees only itself and what came before.
        pruned: what pruned keys count, see `sparsax.block_sparse_attention`.
        rotary: base of rotary positions, see `sparsax.nn.rotate`; None is without.
        use_bias: whether the projections have a bias.
        implementation: which implementation runs, see `sparsax.block_sparse_attention`.
        dense: what runs while there is no pattern: the implementation of
            `jax.nn.dot_product_attention`, "xla", "cudnn" (flash attention on NVIDIA GPUs, 16-bit)
            or None. With "cudnn" a `key_mask` must have its padding at the end: a sample with
            padding elsewhere is NaN.
        dtype: of the computation; that of input and parameters together when None: float32, which
            the Hopper kernels do not take, unless the parameters are cast as well.
        rngs: stream of the initial parameters.

    Raises:
        ValueError: heads and features do not divide.

    Example:
        >>> import jax.numpy as jnp
        >>> import sparsax
        >>> from flax import nnx
        >>> pattern = sparsax.patterns.bigbird(512, block=32)
        >>> layer = sparsax.nn.SparseAttention(4, 64, pattern=pattern, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 512, 64))).shape
        (2, 512, 64)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        pattern: BlockPattern | None = None,
        causal: bool = False,
        pruned: Pruned = "drop",
        rotary: float | None = None,
        use_bias: bool = True,
        implementation: Implementation | None = None,
        dense: Dense | None = None,
        dtype: Any = None,
        rngs: nnx.Rngs,
    ):
        self.query, self.key, self.value, self.out = attention_projections(
            num_heads, in_features, num_kv_heads, head_dim, use_bias=use_bias, dtype=dtype,
            rngs=rngs,
        )  # fmt: skip
        self.pattern = Pattern(pattern)
        self.causal = causal
        self.pruned: Pruned = pruned
        self.rotary = rotary
        self.implementation: Implementation | None = implementation
        self.dense: Dense | None = dense
        self.probing: _Probe | None = None

    def __call__(
        self, x: Float[Array, "B T D"], *, key_mask: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Attends within `x`; `key_mask` is False where a token is padding."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.rotary is not None:
            q, k = rotate(q, self.rotary), rotate(k, self.rotary)
        if self.probing is not None:
            found = score_map(
                q, k, causal=self.causal, key_mask=key_mask, per_head=self.probing.per_head,
                pool=self.probing.pool, implementation=self.implementation,
            )  # fmt: skip
            self.score_map = ScoreMap(found)  # `score_maps` takes it away again
        pattern = self.pattern.get_value()
        if pattern is None:
            o = _attend_densely(q, k, v, key_mask, self.causal, self.dense)
        else:
            o = block_sparse_attention(
                q, k, v, pattern, causal=self.causal, key_mask=key_mask, pruned=self.pruned,
                implementation=self.implementation,
            )  # fmt: skip
        return self.out(o)


def _attend_densely(q, k, v, key_mask, causal: bool, implementation: Dense | None):
    attend = functools.partial(
        jax.nn.dot_product_attention, q, k, v, is_causal=causal, implementation=implementation
    )
    if key_mask is None:
        return attend()
    if implementation != "cudnn":
        return attend(mask=key_mask[:, None, None, :])
    # Any other mask would be a bias of B x T x S numbers, read for every head.
    o = attend(key_value_seq_lengths=key_mask.sum(1, dtype=jnp.int32))
    at_the_end = (key_mask[:, 1:] <= key_mask[:, :-1]).all(1)
    return jnp.where(at_the_end[:, None, None, None], o, jnp.nan)


def score_maps(
    model: nnx.Module,
    *args: Any,
    per_head: bool = False,
    pool: int | None = None,
    **kwargs: Any,
) -> Float[Array, "L P T T"]:
    """The score map of every `SparseAttention` in a model, from one call `model(*args, **kwargs)`.

    Works inside jit. The model's parameters and patterns are left as they were.

    Args:
        model: the model.
        *args: what it is called with.
        per_head: one map for every head, for patterns per head, rather than their mean.
        pool: tokens in a block, to get the means of the blocks alone, see `sparsax.score_map`.
        **kwargs: what it is called with.

    Returns:
        Maps `[L, 1, T, T]`, or `[L, N, T, T]` per head, in the order of `get_patterns`, ready for
        `patterns.spion.search`; with `pool`, `[L, P, n, n]` for its variant F.

    Raises:
        ValueError: the model has no `SparseAttention`.
    """
    layers = _layers(model)
    for layer in layers:
        layer.probing = _Probe(per_head, pool)
    try:
        model(*args, **kwargs)
        return jnp.stack([layer.score_map.get_value() for layer in layers])
    finally:
        for layer in layers:
            layer.probing = None
            if hasattr(layer, "score_map"):
                del layer.score_map


def get_patterns(model: nnx.Module) -> list[BlockPattern | None]:
    """The pattern of every `SparseAttention` in a model, None for dense layers."""
    return [layer.pattern.get_value() for layer in _layers(model)]


def set_patterns(
    model: nnx.Module, patterns: BlockPattern | Sequence[BlockPattern | None] | None
) -> None:
    """Gives every `SparseAttention` of a model its pattern, in place.

    Args:
        model: the model.
        patterns: a stacked pattern `[L, ...]` or a sequence of L patterns, one a layer; a single
            pattern for all layers; or None to make all layers dense.

    Raises:
        ValueError: the number of patterns is not the number of layers.
    """
    layers = _layers(model)
    if patterns is None or (isinstance(patterns, BlockPattern) and patterns.kv_num_blocks.ndim < 3):
        patterns = [patterns] * len(layers)
    elif isinstance(patterns, BlockPattern):
        patterns = patterns.unstack()
    if len(patterns) != len(layers):
        raise ValueError(
            f"the model has {len(layers)} SparseAttention layers; got {len(patterns)} patterns."
        )
    for layer, pattern in zip(layers, patterns, strict=True):
        layer.pattern.set_value(pattern)


def attention_fn(
    pattern: BlockPattern, *, pruned: Pruned = "drop", implementation: Implementation | None = None
) -> Callable[..., Array]:
    """A function for `nnx.MultiHeadAttention(attention_fn=...)` that attends over a pattern.

    Args:
        pattern: the blocks to attend to.
        pruned: as for `sparsax.block_sparse_attention`.
        implementation: as for `sparsax.block_sparse_attention`.

    Returns:
        `f(query, key, value, *, mask, is_causal, ...)`. Its `mask` may be a key-padding mask, of
        shape `[B, 1, 1, S]`; any other mask, a bias, dropout within attention, and
        `sow_weights=True` are refused with a ValueError: the block lists cannot express them.

    Example:
        >>> import jax.numpy as jnp
        >>> import sparsax
        >>> from flax import nnx
        >>> pattern = sparsax.patterns.sliding_window(256, left=64, right=64, block=32)
        >>> layer = nnx.MultiHeadAttention(
        ...     4, 64, attention_fn=sparsax.nn.attention_fn(pattern), decode=False, rngs=nnx.Rngs(0)
        ... )
        >>> layer(jnp.ones((2, 256, 64))).shape
        (2, 256, 64)
    """

    def attend(query, key, value, *, bias=None, mask=None, dropout_rate=0.0, deterministic=True,
               module=None, is_causal=False, **_):  # fmt: skip
        if bias is not None or module is not None or (dropout_rate > 0 and not deterministic):
            raise ValueError(
                "attention_fn takes no bias, no dropout_rate > 0 while training and no "
                f"sow_weights; got bias={bias is not None}, dropout_rate={dropout_rate}, "
                f"sow_weights={module is not None}."
            )
        if mask is not None and (mask.ndim != 4 or mask.shape[1:3] != (1, 1)):
            raise ValueError(
                "mask must be a key-padding mask [B, 1, 1, S]; use is_causal=True for causality "
                f"and the pattern for the rest; got {tuple(mask.shape)}."
            )
        key_mask = None
        if mask is not None:
            key_mask = jnp.broadcast_to(mask[:, 0, 0].astype(bool), key.shape[:2])
        return block_sparse_attention(
            query, key, value, pattern, causal=is_causal, key_mask=key_mask, pruned=pruned,
            implementation=implementation,
        )  # fmt: skip

    return attend


def _paths(model: nnx.Module) -> list[tuple]:
    paths = [p for p, m in nnx.iter_modules(model) if isinstance(m, SparseAttention)]
    # Numbers before names, so that layer 10 comes after layer 9.
    return sorted(paths, key=lambda path: [(isinstance(k, str), k) for k in path])


def _layers(model: nnx.Module) -> list[SparseAttention]:
    modules = {p: m for p, m in nnx.iter_modules(model) if isinstance(m, SparseAttention)}
    if not modules:
        raise ValueError(
            f"the model has no sparsax.nn.SparseAttention layer; got {type(model).__name__}."
        )
    return [modules[path] for path in _paths(model)]
