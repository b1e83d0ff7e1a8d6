"""Keys and values of earlier tokens, kept so that a decoder goes on from them token by token."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from sparsax.nn.projections import out_shape
from sparsax.nn.rotary import rotate
from sparsax.nn.top_l import TopLAttention
from sparsax.quantise.codes import Codes, ready_keys, tile_scores


@typing.no_type_check  # jax rebuilds pytrees with leaves of other types
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """What a layer of attention keeps of the tokens it has seen; made by `empty`.

    Attributes:
        keys: `[B, S, K, H]`, rotated where positions are rotary.
        values: `[B, S, K, H]`.
        codes: packed codes of the keys `[B, S, K, W]` for top-L attention, else None.
    """

    keys: Float[Array, "B S K H"]
    values: Float[Array, "B S K H"]
    codes: UInt32[Array, "B S K W"] | None

    @classmethod
    def empty(cls, layer: typing.Any, batch: int, length: int, dtype: typing.Any) -> "KVCache":
        """Room for so many tokens of a layer with the projections of attention."""
        heads, features = out_shape(layer.key)
        array = jnp.zeros((batch, length, heads, features), dtype)
        codes = None
        if isinstance(layer, TopLAttention):
            words = -(-layer.codebooks.shape[1] // 8)
            codes = jnp.zeros((batch, length, heads, words), jnp.uint32)
        return cls(array, array, codes)


def attend_cached(
    layer: typing.Any, x: Float[Array, "B t D"], cache: KVCache, start: Int[Array, " B"]
) -> tuple[Float[Array, "B t D"], KVCache]:
    """Causal attention of new tokens over those in the cache and themselves, and the new cache.

    Scores of all pairs are held: this is for a prompt and for single tokens after it.

    Args:
        layer: dense `SparseAttention`, `TopLAttention` of tokens, or another with the projections
            `query`, `key`, `value`, `out` and attributes `rotary` and `causal`, which must be True.
        x: the new tokens, at positions `start` to `start + t - 1`.
        cache: of the tokens before; what stands at `start` and after is overwritten, or not seen.
        start: position of each sequence's first new token.

    Raises:
        ValueError: the layer is not causal: its tokens see what comes after them.
        NotImplementedError: the layer attends over blocks.
    """
    _check(layer)
    positions = start[:, None] + jnp.arange(x.shape[1])
    q, k, v = layer.query(x), layer.key(x), layer.value(x)
    if layer.rotary is not None:
        q, k = (rotate(y, layer.rotary, positions) for y in (q, k))
    keys, values = _put(cache.keys, k, start), _put(cache.values, v, start)
    codes, mask = None, (jnp.arange(keys.shape[1]) <= positions[..., None])[:, None]
    if isinstance(layer, TopLAttention):
        new = layer.quantizer.codes(q, k, score=layer.score)
        codes = _put(cache.codes, new.keys, start)
        mask = _best_keys(dataclasses.replace(new, keys=codes), positions, layer.keep)
    o = jax.nn.dot_product_attention(q, keys.astype(q.dtype), values.astype(q.dtype), mask=mask)
    return layer.out(o), KVCache(keys, values, codes)


def _put(old, new, start):
    """The old array with the new tokens of every sequence from its own `start` on."""
    write = lambda old, new, at: lax.dynamic_update_slice_in_dim(old, new, at, axis=0)
    return jax.vmap(write)(old, new.astype(old.dtype), start)


def _best_keys(codes: Codes, positions: Int[Array, "B t"], keep: int) -> Bool[Array, "B N t S"]:
    """True for the keys that `sparsax.top_l_attention` keeps of those up to each position."""

    def scores(queries, keys, rows):
        ready = ready_keys(queries[None], keys[None], codes.num_codes)
        return tile_scores(
            queries[None], ready, rows, None, num_codes=codes.num_codes, causal=True
        )[0]  # fmt: skip

    found = jax.vmap(scores)(codes.queries, codes.keys, positions)  # B K G t S
    found = found.reshape(found.shape[0], -1, *found.shape[3:])
    length = found.shape[-1]
    # Score and position make one number: among equal scores the later key wins.
    numbers = jnp.where(found < 0, -1, found * length + jnp.arange(length))
    least = lax.top_k(numbers, min(keep, length))[0][..., -1:]
    return (found >= 0) & (numbers >= least)


def _check(layer: typing.Any) -> None:
    if not layer.causal:
        raise ValueError(
            "decoding with a cache needs causal attention, causal=True: tokens in the cache do not "
            f"see those that come later; got {type(layer).__name__} with causal={layer.causal}."
        )
    pattern = getattr(layer, "pattern", None)
    blocks = pattern is not None and pattern.get_value() is not None
    if blocks or getattr(layer, "select", "tokens") == "blocks":
        raise NotImplementedError(
            f"decoding with a cache runs dense attention and top-L tokens; {type(layer).__name__} "
            "attends over blocks. Call the model on the whole sequence instead."
        )
