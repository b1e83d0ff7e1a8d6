"""Codes of queries and keys, four bits each, and the integer scores that pairs have by them.

A score is an integer, so that "the L best keys of a row" is exact and costs two integers: which
pairs these are follows again from the codes, tile by tile (`sparsax.patterns.topl`).
"""

import dataclasses
import typing
from functools import reduce

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt8, UInt32

from sparsax.quantise.vectors import each_product, join, samples_last, split

Score = typing.Literal["match", "adc"]

BITS = 4
CODES_PER_WORD = 32 // BITS
# A table's largest entry. Whole numbers up to 256 are exact in bfloat16, and sums of 32 of them in
# float32, so that a matmul of bfloat16 gives the exact score.
LEVELS = 255
QUERY_TILE = 128  # most queries whose scores with all keys are held at once


@typing.no_type_check  # jax rebuilds pytrees with leaves of other types
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Codes:
    """What pairs of tokens are scored by; memory is linear in the length.

    Made by `ProductQuantizer.codes`.

    Attributes:
        queries: "match": packed codes, uint32 `[B, T, N, W]`, W = ceil(M / 8). "adc": for every
            codebook and centroid an integer that grows with its product with the query, uint8
            `[B, T, N, M, E]`.
        keys: packed codes, uint32 `[B, S, K, W]`.
        num_codes: codes M of a token and head.
    """

    queries: UInt32[Array, "B T N W"] | UInt8[Array, "B T N M E"]
    keys: UInt32[Array, "B S K W"]
    num_codes: int = dataclasses.field(metadata={"static": True})

    @property
    def score(self) -> Score:
        """What a score is: the number of equal codes, or the sum over the query's tables."""
        return "match" if self.queries.ndim == 4 else "adc"

    @property
    def most(self) -> int:
        """No score is larger."""
        return self.num_codes * (1 if self.score == "match" else LEVELS)

    @property
    def key_codes(self) -> UInt8[Array, "B S K M"]:
        """The codes of the keys, not packed."""
        return unpack(self.keys, self.num_codes)

    @property
    def query_codes(self) -> UInt8[Array, "B T N M"] | UInt8[Array, "B T N M E"]:
        """The codes of the queries, not packed; for "adc" their tables."""
        return unpack(self.queries, self.num_codes) if self.score == "match" else self.queries


def pack(codes: UInt8[Array, "*A M"]) -> UInt32[Array, "*A W"]:
    """Eight codes below 16 in every word, the first in the lowest bits."""
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % CODES_PER_WORD)])
    words = codes.reshape(*codes.shape[:-1], -1, CODES_PER_WORD).astype(jnp.uint32)
    return (words << _shifts()).sum(-1, dtype=jnp.uint32)


def unpack(words: UInt32[Array, "*A W"], num_codes: int) -> UInt8[Array, "*A M"]:
    """The inverse of `pack`."""
    codes = (words[..., None] >> _shifts()) & (2**BITS - 1)
    return codes.reshape(*words.shape[:-1], -1)[..., :num_codes].astype(jnp.uint8)


def _shifts():
    return jnp.arange(0, 32, BITS, dtype=jnp.uint32)


@jax.jit
def tables(
    q: Float[Array, "B T N H"], codebooks: Float[Array, "K M E d"]
) -> UInt8[Array, "B T N M E"]:
    """Products of a query with all centroids as whole numbers from 0 to 255.

    Each codebook's least product is taken away and the row divided by its widest range: neither
    changes the order of a row's keys, but for rounding to 1 / 255 of that range.
    """
    kv_heads, num_codes, _, dim = codebooks.shape
    vectors = split(q, kv_heads, dim)
    products = list(each_product(vectors, codebooks))
    # One complex number: for two results XLA would keep all products in memory.
    ends = lax.complex(reduce(jnp.minimum, products), reduce(jnp.maximum, products))
    ends = join(samples_last(ends), q.shape)
    lowest, highest = ends.real, ends.imag
    widest = (highest - lowest).max(-1)
    # Nor is what this loop reads of queries worth keeping for the next.
    q = lax.optimization_barrier(q).reshape(*q.shape[:2], kv_heads, -1, num_codes, dim)
    features = (q[..., i, None].astype(jnp.float32) for i in range(dim))  # B T K G M 1
    centroids = (codebooks[:, None, :, :, i] for i in range(dim))  # K 1 M E
    table = reduce(jnp.add, map(jnp.multiply, features, centroids))
    above = table.reshape(*lowest.shape, -1) - lowest[..., None]
    scale = LEVELS / jnp.where(widest > 0, widest, 1.0)
    # Both products are rounded in their own order, so that an entry may lie just outside.
    return jnp.clip(jnp.round(above * scale[..., None, None]), 0, LEVELS).astype(jnp.uint8)


def ready_keys(queries: Array, keys: UInt32[Array, "B S K W"], num_codes: int) -> Array:
    """The keys' side of `tile_scores`, made once for all tiles: words, or one-hot for a matmul."""
    if queries.ndim == 4:
        return keys.swapaxes(1, 2)  # B K S W
    hot = jax.nn.one_hot(unpack(keys, num_codes), queries.shape[-1], dtype=jnp.bfloat16)
    return hot.reshape(*keys.shape[:3], -1).swapaxes(1, 2)  # B K S M*E


def tile_scores(
    queries: Array,
    ready: Array,
    rows: Int[Array, " t"],
    key_mask: Bool[Array, "B S"] | None,
    *,
    num_codes: int,
    causal: bool,
) -> Int[Array, "B K G t S"]:
    """Scores of a tile of queries with all keys; -1 where a key may not be seen.

    The own key scores one more than any other can, so that it is always among the best.

    Args:
        queries: the tile of `Codes.queries`, `[B, t, N, ...]`.
        ready: `ready_keys` of all keys.
        rows: positions of the tile's queries.
        key_mask: False where a key is padding.
        num_codes: codes of a token and head.
        causal: whether a query sees keys of its own index and below only.
    """
    batch, kv_heads, kv_len, _ = ready.shape
    grouped = queries.reshape(batch, rows.shape[0], kv_heads, -1, *queries.shape[3:])
    grouped = jnp.moveaxis(grouped, 1, 3)  # B K G t ...
    if queries.ndim == 4:
        scores, most = _matches(grouped, ready, num_codes), num_codes
    else:
        flat = grouped.reshape(*grouped.shape[:4], -1).astype(ready.dtype)
        scores = jnp.einsum("bkgte,bkse->bkgts", flat, ready, preferred_element_type=jnp.float32)
        scores, most = scores.astype(jnp.int32), LEVELS * num_codes
    gap = jnp.arange(kv_len) - rows[:, None]
    scores = jnp.where(gap == 0, most + 1, scores)
    if causal:
        scores = jnp.where(gap > 0, -1, scores)
    return scores if key_mask is None else jnp.where(key_mask[:, None, None, None], scores, -1)


def _matches(queries, keys, num_codes):
    """The number of equal codes: four bits of a difference are folded onto one, then counted."""
    differ = jnp.zeros((), jnp.int32)
    for word in range(keys.shape[-1]):  # one or two, rarely four
        x = queries[..., None, word] ^ keys[:, :, None, None, :, word]
        x |= x >> 1
        x |= x >> 2
        differ += jax.lax.population_count(x & 0x11111111).astype(jnp.int32)
    return num_codes - differ


def is_kept(
    scores: Int[Array, "*A S"], tau: Int[Array, "*A"], first: Int[Array, "*A"]
) -> Bool[Array, "*A S"]:
    """The pairs that a row's two integers keep: above tau, or equal to it from `first` on."""
    tau, first = tau[..., None], first[..., None]
    ties = (scores == tau) & (jnp.arange(scores.shape[-1]) >= first)
    return (scores >= 0) & ((scores > tau) | ties)


def tile_rows(length: int) -> int:
    """Queries of a tile, at most `QUERY_TILE`: so many that hardly any of the last one is padding.

    A multiple of eight, which matrix products like.
    """
    tiles = max(1, -(-length // QUERY_TILE))
    return max(8, -(-length // (8 * tiles)) * 8)


def split_rows(x: Array, tile: int) -> Array:
    """`[B, T, ...]` cut into tiles of rows `[tiles, B, tile, ...]`, the last one padded."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % tile)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, tile, *x.shape[2:]).swapaxes(0, 1)


def join_rows(x: Array, length: int) -> Array:
    """The inverse of `split_rows`, without the padding."""
    return x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :length]
