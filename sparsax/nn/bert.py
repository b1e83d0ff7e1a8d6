"""BERT's encoder, which reads the weights of published models."""

import dataclasses
import os

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sparsax.nn.embed import Embed
from sparsax.nn.published import read_config, read_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Sizes of a BERT, by the names of its `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12


class BertLayer(nnx.Module):
    """Self-attention and a GELU feed-forward layer, each followed by a LayerNorm."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        features, hidden = config.hidden_size, config.intermediate_size
        norm = lambda: nnx.LayerNorm(features, epsilon=config.layer_norm_eps, rngs=rngs)
        self.query, self.key, self.value, self.out = (
            nnx.Linear(features, features, rngs=rngs) for _ in range(4)
        )
        self.norm1 = norm()
        self.up = nnx.Linear(features, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, features, rngs=rngs)
        self.norm2 = norm()
        self.num_heads = config.num_attention_heads

    def __call__(
        self, x: Float[Array, "B T D"], key_mask: Bool[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Maps `x` to the same shape; `key_mask` is False at padding."""
        heads = lambda y: y.reshape(*y.shape[:2], self.num_heads, -1)
        q, k, v = (heads(linear(x)) for linear in (self.query, self.key, self.value))
        o = jax.nn.dot_product_attention(q, k, v, mask=key_mask[:, None, None, :])
        x = self.norm1(x + self.out(o.reshape(x.shape)))
        return self.norm2(x + self.down(nnx.gelu(self.up(x), approximate=False)))


class Bert(nnx.Module):
    """BERT without its pooling layer: `tokens [B, T]` to features `[B, T, D]`.

    Its dense layers are `layers.I.query`, `key`, `value`, `out`, `up` and `down`.

    Source: Devlin et al., "BERT" (arXiv 1810.04805), section 3.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from sparsax.nn import Bert, BertConfig
        >>> config = BertConfig(
        ...     vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...     num_attention_heads=4, max_position_embeddings=16,
        ... )
        >>> model = Bert(config, rngs=nnx.Rngs(0))
        >>> tokens = jnp.ones((3, 8), int)
        >>> model.sentences(tokens, tokens > 0).shape
        (3, 32)
    """

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        embed = lambda count: Embed(count, config.hidden_size, rngs=rngs)
        self.tokens = embed(config.vocab_size)
        self.positions = embed(config.max_position_embeddings)
        self.types = embed(config.type_vocab_size)
        self.norm = nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)
        self.layers = nnx.List(
            [BertLayer(config, rngs=rngs) for _ in range(config.num_hidden_layers)]
        )

    def __call__(
        self, tokens: Int[Array, "B T"], key_mask: Bool[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Features of every token; `key_mask` is False at padding."""
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        x = self.norm(x + self.types(jnp.zeros((), int)))
        for layer in self.layers:
            x = layer(x, key_mask)
        return x

    def sentences(
        self, tokens: Int[Array, "B T"], key_mask: Bool[Array, "B T"]
    ) -> Float[Array, "B D"]:
        """Sentence embeddings of length 1: the mean over the features of real tokens.

        Source: Reimers and Gurevych, "Sentence-BERT" (arXiv 1908.10084), section 3.
        """
        x = jnp.where(key_mask[..., None], self(tokens, key_mask), 0.0).sum(1)
        x = x / jnp.maximum(key_mask.sum(1, keepdims=True), 1)
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> "Bert":
        """The published model in a folder with `config.json` and `model.safetensors`.

        Needs the `safetensors` extra.

        Raises:
            FileNotFoundError: one of the files is missing.
            ValueError: it is no BERT of the kind that this module computes, or weights are missing.
        """
        kind = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}
        config = read_config(folder, BertConfig, kind)
        make = lambda: cls(config, rngs=nnx.Rngs(0))
        return read_model(folder, make, prefix="bert.")
