"""Decoder-only language models in the two styles that people fine-tune: OPT's and Llama's."""

import dataclasses
import typing

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sparsax import checks
from sparsax.linear import ACTIVATIONS, Activation
from sparsax.nn.attention import SparseAttention
from sparsax.nn.cache import KVCache, attend_cached
from sparsax.nn.dense import activated
from sparsax.nn.embed import Embed


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes and style of a decoder.

    Attributes:
        vocab_size: number of token ids.
        length: longest sequence T; with `rotary`, merely what the user means to feed.
        features: D.
        hidden: F, features of the feed-forward layer.
        num_heads: N.
        num_kv_heads: K, a divisor of N; N when None.
        layers: number of blocks.
        norm: "layer" (LayerNorm) or "rms" (RMSNorm).
        activation: of the feed-forward layer.
        gated: `down(activation(gate(x)) * up(x))`, SwiGLU when the activation is "silu".
        rotary: base of the rotary embedding; None for learned positions.
        use_bias: whether dense layers have a bias.
        tied: whether the embedding is also the output projection.
        dtype: of the computation; that of the parameters when None.
    """

    vocab_size: int
    length: int
    features: int
    hidden: int
    num_heads: int
    layers: int
    num_kv_heads: int | None = None
    norm: typing.Literal["layer", "rms"] = "layer"
    activation: Activation = "relu"
    gated: bool = False
    rotary: float | None = None
    use_bias: bool = True
    tied: bool = True
    dtype: typing.Any = None

    @classmethod
    def opt(cls, **sizes: typing.Any) -> "DecoderConfig":
        """LayerNorm, ReLU, learned positions, biases: Zhang et al., "OPT" (arXiv 2205.01068)."""
        return cls(**sizes)

    @classmethod
    def llama(cls, **sizes: typing.Any) -> "DecoderConfig":
        """RMSNorm, SwiGLU, rotary positions, no bias: Touvron et al. (arXiv 2302.13971)."""
        style: dict[str, typing.Any] = {
            "norm": "rms", "activation": "silu", "gated": True, "rotary": 10_000.0,
            "use_bias": False, "tied": False,
        }  # fmt: skip
        return cls(**(style | sizes))


class FeedForward(nnx.Module):
    """`down(activation(up(x)))`, or `down(activation(gate(x)) * up(x))` when it is gated.

    Args:
        features: D.
        hidden: F.
        activation: see `sparsax.tsvd_matmul`.
        gated: whether there is a gate.
        use_bias: of the dense layers.
        dtype: of the computation.
        rngs: stream of the initial parameters.
    """

    def __init__(
        self, features: int, hidden: int, *, activation: Activation = "gelu", gated: bool = False,
        use_bias: bool = True, dtype: typing.Any = None, rngs: nnx.Rngs,
    ):  # fmt: skip
        checks.one_of("activation", activation, ACTIVATIONS)
        linear = lambda i, o: nnx.Linear(i, o, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.up, self.down = linear(features, hidden), linear(hidden, features)
        self.gate = nnx.data(linear(features, hidden) if gated else None)
        self.activation: Activation = activation

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        """Maps `[..., D]` to the same shape."""
        if self.gate is None:
            return self.down(activated(self.up, x, self.activation))
        return self.down(activated(self.gate, x, self.activation) * self.up(x))


class DecoderBlock(nnx.Module):
    """`x + attention(norm(x))`, then `x + ffn(norm(x))`, causal."""

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        c = config
        self.norm1, self.norm2 = (_norm(c, rngs) for _ in range(2))
        self.attention = SparseAttention(
            c.num_heads, c.features, num_kv_heads=c.num_kv_heads, causal=True, rotary=c.rotary,
            use_bias=c.use_bias, dtype=c.dtype, rngs=rngs,
        )  # fmt: skip
        self.ffn = FeedForward(
            c.features, c.hidden, activation=c.activation, gated=c.gated, use_bias=c.use_bias,
            dtype=c.dtype, rngs=rngs,
        )  # fmt: skip

    def __call__(
        self, x: Float[Array, "B T D"], *, key_mask: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Maps `[B, T, D]` to the same shape; `key_mask` is False where a token is padding."""
        x = x + self.attention(self.norm1(x), key_mask=key_mask)
        return x + self.ffn(self.norm2(x))

    def decode(
        self, x: Float[Array, "B t D"], cache: KVCache, start: Int[Array, " B"]
    ) -> tuple[Float[Array, "B t D"], KVCache]:
        """The same for new tokens beside a cache, see `LanguageModel.decode`."""
        y, cache = attend_cached(self.attention, self.norm1(x), cache, start)
        x = x + y
        return x + self.ffn(self.norm2(x)), cache


class LanguageModel(nnx.Module):
    """A causal language model of `DecoderBlock`s: what `sparsify` converts for fine-tuning.

    Args:
        config: sizes and style, e.g. `DecoderConfig.llama(...)`.
        rngs: stream of the initial parameters.

    Example:
        >>> import jax.numpy as jnp
        >>> import sparsax
        >>> from flax import nnx
        >>> config = sparsax.nn.DecoderConfig.llama(
        ...     vocab_size=256, length=32, features=32, hidden=64, num_heads=4, num_kv_heads=2,
        ...     layers=2,
        ... )
        >>> model = sparsax.nn.LanguageModel(config, rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((1, 32), jnp.int32)).shape
        (1, 32, 256)
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs):
        self.config = config
        embed = lambda count: Embed(count, config.features, dtype=config.dtype, rngs=rngs)
        self.tokens = embed(config.vocab_size)
        self.positions = nnx.data(embed(config.length) if config.rotary is None else None)
        self.blocks = nnx.List([DecoderBlock(config, rngs=rngs) for _ in range(config.layers)])
        self.norm = _norm(config, rngs)
        self.logits = nnx.data(None)
        if not config.tied:
            self.logits = nnx.Linear(
                config.features, config.vocab_size, use_bias=False, dtype=config.dtype, rngs=rngs
            )

    def __call__(
        self, tokens: Int[Array, "B T"], *, key_mask: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T C"]:
        """Logits of the token that follows each one; `key_mask` is False at padding.

        Raises:
            ValueError: there are more tokens than learned positions.
        """
        length = tokens.shape[1]
        self._check_length(length)
        x = self._embed(tokens, jnp.arange(length))
        for block in self.blocks:
            x = block(x, key_mask=key_mask)
        return self._logits(x)

    def empty_cache(self, batch: int, length: int) -> list[KVCache]:
        """Room for so many sequences of so many tokens, for `decode`.

        Raises:
            ValueError: there are more tokens than learned positions.
        """
        self._check_length(length)
        dtype = self.config.dtype or self.tokens.embedding.dtype
        return [KVCache.empty(block.attention, batch, length, dtype) for block in self.blocks]

    def decode(
        self, tokens: Int[Array, "B t"], cache: list[KVCache], start: Int[Array, " B"]
    ) -> tuple[Float[Array, "B t C"], list[KVCache]]:
        """Logits of new tokens that go on from those in the cache, and the new cache.

        The same as calling the model on the whole sequences. A prompt is decoded from `start` 0;
        prompts of different lengths may be padded at the end, as the next tokens overwrite the
        padding. Works inside jit; the cache must have room for `start + t` tokens.

        Args:
            tokens: the new tokens.
            cache: from `empty_cache`, or from the call before.
            start: position of each sequence's first new token.

        Raises:
            ValueError: a layer of attention is not causal.
            NotImplementedError: a layer of attention has a pattern, or selects blocks.

        Example:
            >>> import jax.numpy as jnp
            >>> import sparsax
            >>> from flax import nnx
            >>> config = sparsax.nn.DecoderConfig.llama(
            ...     vocab_size=64, length=8, features=16, hidden=32, num_heads=2, layers=1
            ... )
            >>> model = sparsax.nn.LanguageModel(config, rngs=nnx.Rngs(0))
            >>> tokens = jnp.arange(8)[None]
            >>> _, cache = model.decode(tokens[:, :7], model.empty_cache(1, 8), jnp.array([0]))
            >>> last, cache = model.decode(tokens[:, 7:], cache, jnp.array([7]))
            >>> bool(abs(last[:, 0] - model(tokens)[:, 7]).max() < 1e-5)
            True
        """
        x = self._embed(tokens, start[:, None] + jnp.arange(tokens.shape[1]))
        found = []
        for block, seen in zip(self.blocks, cache, strict=True):
            x, seen = block.decode(x, seen, start)
            found.append(seen)
        return self._logits(x), found

    def _check_length(self, length: int) -> None:
        if self.positions is not None and length > self.config.length:
            raise ValueError(
                f"tokens must be no more than the config's length={self.config.length}; got "
                f"{length}. Rotary positions have no such limit."
            )

    def _embed(self, tokens, positions):
        x = self.tokens(tokens)
        return x if self.positions is None else x + self.positions(positions)

    def _logits(self, x):
        x = self.norm(x)
        return self.tokens.attend(x) if self.logits is None else self.logits(x)


def _norm(config: DecoderConfig, rngs: nnx.Rngs) -> nnx.LayerNorm | nnx.RMSNorm:
    kinds = {"layer": nnx.LayerNorm, "rms": nnx.RMSNorm}
    checks.one_of("norm", config.norm, kinds)
    return kinds[config.norm](config.features, dtype=config.dtype, rngs=rngs)
