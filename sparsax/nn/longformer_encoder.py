"""Longformer's encoder, which reads the weights of published models."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sparsax.compound import CompoundPattern
from sparsax.nn.embed import Embed
from sparsax.nn.longformer import LongformerSelfAttention, global_positions
from sparsax.nn.published import read_config, read_model
from sparsax.typing import Implementation


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongformerConfig:
    """Sizes of a Longformer, by the names and with the defaults of its `config.json`.

    `attention_window` is two-sided there: 512 is a window of 256 to either side. One number is for
    all layers, else each has its own.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    attention_window: int | Sequence[int] = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 1

    @property
    def windows(self) -> tuple[int, ...]:
        """The one-sided window of every layer.

        Raises:
            ValueError: a window is odd or not positive, or there is not one for every layer.
        """
        given, layers = self.attention_window, self.num_hidden_layers
        each = (given,) * layers if isinstance(given, int) else tuple(given)
        if len(each) != layers or any(window < 2 or window % 2 for window in each):
            raise ValueError(
                "attention_window is two-sided: it must be an even number, at least 2, for all "
                f"layers or for each of num_hidden_layers={layers}; got {given}."
            )
        return tuple(window // 2 for window in each)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: positions up to the padding's belong to no token."""
        return self.max_position_embeddings - self.pad_token_id - 1


class LongformerLayer(nnx.Module):
    """Longformer's attention and a GELU feed-forward layer, each followed by a LayerNorm.

    Args:
        config: the sizes.
        window: one-sided.
        max_global: capacity for the global tokens of a sample.
        implementation: of attention.
        dtype: of the parameters and the computation.
        rngs: stream of the initial parameters.
    """

    def __init__(
        self, config: LongformerConfig, window: int, *, max_global: int,
        implementation: Implementation | None, dtype: Any, rngs: nnx.Rngs,
    ):  # fmt: skip
        features, hidden = config.hidden_size, config.intermediate_size
        options = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        norm = lambda: nnx.LayerNorm(features, epsilon=config.layer_norm_eps, **options)
        self.attention = LongformerSelfAttention(
            config.num_attention_heads, features, window=window, max_global=max_global,
            implementation=implementation, **options,
        )  # fmt: skip
        self.norm1 = norm()
        self.up = nnx.Linear(features, hidden, **options)
        self.down = nnx.Linear(hidden, features, **options)
        self.norm2 = norm()

    def __call__(self, x: Float[Array, "B T D"], pattern: CompoundPattern) -> Float[Array, "B T D"]:
        """Maps `x` to the same shape."""
        x = self.norm1(x + self.attention.attend(x, pattern))
        return self.norm2(x + self.down(nnx.gelu(self.up(x), approximate=False)))


class Longformer(nnx.Module):
    """Longformer's encoder: `tokens [B, T]` to features `[B, T, D]`.

    Computes what Hugging Face's `LongformerModel` does, dropout apart, for every length up to the
    number of positions: sequences need not be padded to a multiple of the window. Which tokens are
    global is data: another document does not recompile.

    Args:
        config: the sizes.
        max_global: capacity for the global tokens of a sample; static, and what they cost.
        pooler: whether there is the layer that `pool` applies.
        implementation: of attention, see `sparsax.compound_attention`.
        dtype: of the parameters and the computation; LayerNorm and softmax stay in float32.
        rngs: stream of the initial parameters.

    Source: Beltagy et al., "Longformer: The Long-Document Transformer" (arXiv 2004.05150).

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from sparsax.nn import Longformer, LongformerConfig
        >>> config = LongformerConfig(
        ...     vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...     num_attention_heads=4, max_position_embeddings=130, attention_window=16,
        ... )
        >>> model = Longformer(config, max_global=4, rngs=nnx.Rngs(0))
        >>> tokens = jnp.full((2, 100), 7)
        >>> first = jnp.zeros(tokens.shape, bool).at[:, 0].set(True)
        >>> model(tokens, global_mask=first).shape
        (2, 100, 32)
    """

    def __init__(
        self, config: LongformerConfig, *, max_global: int = 64, pooler: bool = False,
        implementation: Implementation | None = None, dtype: Any = jnp.float32, rngs: nnx.Rngs,
    ):  # fmt: skip
        features = config.hidden_size
        options = {"dtype": dtype, "param_dtype": dtype, "rngs": rngs}
        embed = lambda count: Embed(count, features, **options)
        self.tokens = embed(config.vocab_size)
        self.positions = embed(config.max_position_embeddings)
        self.types = embed(config.type_vocab_size)
        self.norm = nnx.LayerNorm(features, epsilon=config.layer_norm_eps, **options)
        self.layers = nnx.List([
            LongformerLayer(
                config, window, max_global=max_global, implementation=implementation,
                dtype=dtype, rngs=rngs,
            )
            for window in config.windows
        ])  # fmt: skip
        self.pooler = nnx.Linear(features, features, **options) if pooler else None
        self.max_global, self.longest = max_global, config.longest
        self.padding_id = config.pad_token_id

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        key_mask: Bool[Array, "B T"] | None = None,
        global_mask: Bool[Array, "B T"] | None = None,
        types: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Features of every token.

        Args:
            tokens: ids; those of padding take no position, whether `key_mask` hides them or not.
            key_mask: False where a token is padding: seen by none, and itself seeing none.
            global_mask: True where a token is global; None: none is. More than `max_global` in a
                sample raise a ValueError, and under jit make the sample NaN.
            types: ids of the token types; None means 0 throughout.

        Raises:
            ValueError: the sequence is longer than the positions reach.
        """
        return self.hidden_states(tokens, key_mask, global_mask, types)[-1]

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        key_mask: Bool[Array, "B T"] | None = None,
        global_mask: Bool[Array, "B T"] | None = None,
        types: Int[Array, "B T"] | None = None,
    ) -> list[Float[Array, "B T D"]]:
        """The embeddings' features, then those of every layer; arguments as when called."""
        length = tokens.shape[1]
        if length > self.longest:
            raise ValueError(
                f"a sequence must have at most {self.longest} tokens, as many as there are "
                f"positions; got {length}."
            )
        real = tokens != self.padding_id
        positions = jnp.where(real, jnp.cumsum(real, axis=1), 0) + self.padding_id
        types = jnp.zeros((1, 1), int) if types is None else types
        x = self.tokens(tokens) + self.positions(positions) + self.types(types)
        states = [self.norm(x)]
        listed = global_positions(global_mask, key_mask, self.max_global)
        patterns: dict[int, CompoundPattern] = {}  # one for all layers of a window
        for layer in self.layers:
            attention = layer.attention
            if attention.window not in patterns:
                patterns[attention.window] = attention.pattern(length, *listed, key_mask=key_mask)
            states.append(layer(states[-1], patterns[attention.window]))
        return states

    def pool(self, x: Float[Array, "B T D"]) -> Float[Array, "B D"]:
        """What classifiers read: the first token's features through a layer of their own.

        Raises:
            ValueError: the model was made without a pooler.
        """
        if self.pooler is None:
            raise ValueError("the model has no pooler; make it, or read it, with pooler=True.")
        return jnp.tanh(self.pooler(x[:, 0]))

    @classmethod
    def from_folder(cls, folder: str | os.PathLike, **options: Any) -> "Longformer":
        """The published model in a folder with `config.json` and `model.safetensors`.

        Needs the `safetensors` extra.

        Args:
            folder: what `LongformerModel.save_pretrained` writes, or that of a model with a head.
            **options: passed on: `max_global`, `pooler`, `implementation`, `dtype`.

        Raises:
            FileNotFoundError: one of the files is missing.
            ValueError: it is no Longformer of the kind that this module computes, or weights are
                missing.
        """
        kind = {"hidden_act": "gelu", "position_embedding_type": "absolute"}
        config = read_config(folder, LongformerConfig, {"model_type": "longformer"} | kind)
        make = lambda: cls(config, rngs=nnx.Rngs(0), **options)
        return read_model(folder, make, prefix="longformer.")
