"""A pre-LayerNorm Transformer, small enough to read: encoder, classifier, decoder."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sparsax.nn.attention import SparseAttention
from sparsax.nn.dense import activated
from sparsax.nn.embed import Embed


class Block(nnx.Module):
    """`x + attention(norm(x))`, then `x + ffn(norm(x))`."""

    def __init__(
        self, features: int, hidden: int, num_heads: int, *, dropout: float = 0.0,
        dtype: Any = None, rngs: nnx.Rngs, **attention: Any,
    ):  # fmt: skip
        self.norm1 = nnx.LayerNorm(features, rngs=rngs)
        self.attention = SparseAttention(num_heads, features, dtype=dtype, rngs=rngs, **attention)
        self.norm2 = nnx.LayerNorm(features, rngs=rngs)
        self.up = nnx.Linear(features, hidden, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(hidden, features, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x, *, key_mask=None, rngs: nnx.Rngs | None = None):
        """Maps `x [B, T, D]` to the same shape; dropout acts when `rngs` is given."""
        drop = lambda y: self.dropout(y, deterministic=rngs is None, rngs=rngs)
        x = x + drop(self.attention(self.norm1(x), key_mask=key_mask))
        return x + drop(self.down(drop(activated(self.up, self.norm2(x), "gelu"))))


class Encoder(nnx.Module):
    """Embeds tokens and positions, then applies `layers` blocks and a last LayerNorm.

    Args:
        vocab_size: number of token ids.
        length: longest sequence T, the number of learned positions.
        features: D.
        hidden: features of the feed-forward layer.
        num_heads: N.
        layers: number of blocks.
        dropout: rate after embedding, attention and feed-forward.
        dtype: of attention and feed-forward layers; what is added up between them, and what comes
            out, stays in the parameters' float32. None: float32 throughout.
        rngs: stream of the initial parameters.
        **attention: passed on to `SparseAttention`, e.g. `causal`, `pruned`, `num_kv_heads`.
    """

    def __init__(
        self, vocab_size: int, length: int, *, features: int = 64, hidden: int = 128,
        num_heads: int = 2, layers: int = 2, dropout: float = 0.1, dtype: Any = None,
        rngs: nnx.Rngs, **attention: Any,
    ):  # fmt: skip
        block = lambda: Block(
            features, hidden, num_heads, dropout=dropout, dtype=dtype, rngs=rngs, **attention
        )
        self.tokens = Embed(vocab_size, features, rngs=rngs)
        self.positions = Embed(length, features, rngs=rngs)
        self.blocks = nnx.List([block() for _ in range(layers)])
        self.norm = nnx.LayerNorm(features, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        key_mask: Bool[Array, "B T"] | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "B T D"]:
        """Features of every token; `key_mask` is False at padding, `rngs` switches dropout on."""
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        x = self.dropout(x, deterministic=rngs is None, rngs=rngs)
        for block in self.blocks:
            x = block(x, key_mask=key_mask, rngs=rngs)
        return self.norm(x)


class Classifier(nnx.Module):
    """An encoder, the mean over real tokens, and a small head: `tokens [B, T]` to logits `[B, C]`.

    Args:
        vocab_size: number of token ids.
        length: T.
        num_classes: C.
        padding_id: the token id that is padding, or None when all tokens count.
        rngs: stream of the initial parameters.
        **encoder: passed on to `Encoder`.
    """

    def __init__(
        self, vocab_size: int, length: int, num_classes: int, *, padding_id: int | None = 0,
        rngs: nnx.Rngs, **encoder: Any,
    ):  # fmt: skip
        self.encoder = Encoder(vocab_size, length, rngs=rngs, **encoder)
        features = self.encoder.norm.num_features
        self.hidden = nnx.Linear(features, features, rngs=rngs)
        self.logits = nnx.Linear(features, num_classes, rngs=rngs)
        self.padding_id = padding_id

    def __call__(
        self, tokens: Int[Array, "B T"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "B C"]:
        """Logits of the classes; `rngs` switches dropout on."""
        real = jnp.ones(tokens.shape, bool)
        if self.padding_id is not None:
            real = tokens != self.padding_id
        x = self.encoder(tokens, key_mask=real if self.padding_id is not None else None, rngs=rngs)
        weight = real[..., None] / jnp.maximum(real.sum(1), 1)[:, None, None]
        return self.logits(nnx.relu(self.hidden((x * weight).sum(1))))


class Decoder(nnx.Module):
    """A causal language model: `tokens [B, T]` to next-token logits `[B, T, vocab]`.

    The embedding is also the output projection. `**encoder` is passed on to `Encoder`.
    """

    def __init__(self, vocab_size: int, length: int, *, rngs: nnx.Rngs, **encoder: Any):
        self.encoder = Encoder(vocab_size, length, causal=True, rngs=rngs, **encoder)

    def __call__(
        self, tokens: Int[Array, "B T"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "B T C"]:
        """Logits of the token that follows each one; `rngs` switches dropout on."""
        return self.encoder.tokens.attend(self.encoder(tokens, rngs=rngs))
