"""Longformer's self-attention: a window, and global tokens with projections of their own."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sparsax import compound
from sparsax.compound import CompoundPattern
from sparsax.multigrain import compound_attention
from sparsax.patterns.compound import longformer
from sparsax.typing import Implementation


class LongformerSelfAttention(nnx.Module):
    """Multi-head self-attention over a sliding window and over global tokens.

    An ordinary token sees its window and the global tokens in one softmax. A global token sees all
    tokens, by queries, keys and values from projections of its own; only its query is projected,
    not one for every token. Padding is seen by none, and its attention is zero before `out`. Which
    tokens are global is data: another document does not recompile, and a sequence need not be
    padded to a multiple of the window.

    Args:
        num_heads: heads N.
        in_features: features D of input and output, a multiple of N.
        window: one-sided: half of `attention_window` in Hugging Face's configuration, all of it in
            allenai's code.
        max_global: capacity for the global tokens of a sample; static.
        dilation: distance between the keys of the window (only in allenai's code).
        causal: whether a token sees only itself and what came before.
        implementation: which implementation runs, see `sparsax.compound_attention`.
        dtype: of the computation; the input's when None.
        param_dtype: of the parameters.
        rngs: stream of the initial parameters.

    Raises:
        ValueError: heads and features do not divide, or window or capacity are out of range.

    Source: Beltagy et al., "Longformer: The Long-Document Transformer" (arXiv 2004.05150),
    section 3.1.

    Example:
        >>> import jax.numpy as jnp
        >>> import sparsax
        >>> from flax import nnx
        >>> layer = sparsax.nn.LongformerSelfAttention(
        ...     4, 64, window=32, max_global=8, rngs=nnx.Rngs(0)
        ... )
        >>> first = jnp.zeros((2, 300), bool).at[:, 0].set(True)
        >>> layer(jnp.ones((2, 300, 64)), global_mask=first).shape
        (2, 300, 64)
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        *,
        window: int,
        max_global: int,
        dilation: int = 1,
        causal: bool = False,
        implementation: Implementation | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if num_heads < 1 or in_features % num_heads:
            raise ValueError(
                f"num_heads must divide in_features; got {num_heads} and {in_features}."
            )
        if window < 0 or max_global < 0 or dilation < 1:
            raise ValueError(
                "window (one-sided) and max_global must be at least 0, dilation at least 1; "
                f"got {window}, {max_global} and {dilation}."
            )
        features = num_heads, in_features // num_heads
        options = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        linear = lambda: nnx.LinearGeneral(in_features, features, **options)
        self.query, self.key, self.value = linear(), linear(), linear()
        self.query_global, self.key_global, self.value_global = linear(), linear(), linear()
        self.out = nnx.LinearGeneral(features, in_features, axis=(-2, -1), **options)
        self.window, self.max_global = window, max_global
        self.dilation, self.causal = dilation, causal
        self.implementation: Implementation | None = implementation

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        global_mask: Bool[Array, "B T"] | None = None,
        key_mask: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attends within `x`.

        Args:
            x: the tokens.
            global_mask: True where a token is global; None: none is. More than `max_global` in a
                sample raise a ValueError, and under jit make the sample NaN.
            key_mask: False where a token is padding.
        """
        listed = global_positions(global_mask, key_mask, self.max_global)
        return self.attend(x, self.pattern(x.shape[1], *listed, key_mask=key_mask))

    def pattern(
        self,
        seq_len: int,
        positions: Int[Array, "B G"] | None = None,
        counts: Int[Array, " B"] | None = None,
        *,
        key_mask: Bool[Array, "B T"] | None = None,
    ) -> CompoundPattern:
        """The layer's pairs, for `attend`, where several layers share the global tokens."""
        return longformer(
            seq_len, window=self.window, positions=positions, counts=counts,
            dilation=self.dilation, causal=self.causal, token_mask=key_mask,
        )  # fmt: skip

    def attend(self, x: Float[Array, "B T D"], pattern: CompoundPattern) -> Float[Array, "B T D"]:
        """Attends within `x` over a pattern that `pattern` made."""
        own: dict[str, Any] = {}
        if pattern.rows.shape[-1]:
            own = {
                "q_global": self.query_global(pattern.take_rows(x)),
                "k_global": self.key_global(x),
                "v_global": self.value_global(x),
            }
        o = compound_attention(
            self.query(x), self.key(x), self.value(x), pattern, **own,
            implementation=self.implementation,
        )  # fmt: skip
        return self.out(o)


def global_positions(
    global_mask: Bool[Array, "B T"] | None, key_mask: Bool[Array, "B T"] | None, max_global: int
) -> tuple[Int[Array, "B G"], Int[Array, " B"]] | tuple[None, None]:
    """Positions and counts of the global tokens that are no padding; `(None, None)` for none.

    Raises:
        ValueError: a sample has more than `max_global`. Under jit its count is above the capacity,
            which patterns mark.
    """
    if global_mask is None or not max_global:
        return None, None
    chosen = global_mask if key_mask is None else global_mask & key_mask
    return compound.positions(chosen, min(max_global, chosen.shape[-1]))
