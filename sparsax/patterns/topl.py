"""The keys that score best by their codes: single ones for every query, or whole blocks.

Gui et al., "SPT" (arXiv 2312.10365), section 4.1. Among equal scores the most recent key wins, a
query always keeps its own key, and rows that see fewer than L keys keep all of them.
"""

import dataclasses
import math
import typing

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from sparsax.layouts import BlockPattern, check_blocks
from sparsax.quantise.codes import (
    QUERY_TILE,
    Codes,
    is_kept,
    join_rows,
    ready_keys,
    split_rows,
    tile_rows,
    tile_scores,
)

VOTERS = 8  # of a block; few more than are wanted for its best blocks to be found


@typing.no_type_check  # jax rebuilds pytrees with leaves of other types
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class KeptTokens:
    """Which keys every query keeps, as two integers a row: linear memory, no index lists.

    Query i keeps key j if `score > tau`, or `score = tau and j >= first`, of those it may see.

    Attributes:
        codes: what the scores follow from.
        tau: int32 `[B, T, N]`.
        first: int32 `[B, T, N]`.
        key_mask: False where a key is padding, `[B, S]`, or None.
        causal: whether a query sees keys of its own index and below only.
    """

    codes: Codes
    tau: Int[Array, "B T N"]
    first: Int[Array, "B T N"]
    key_mask: Bool[Array, "B S"] | None
    causal: bool = dataclasses.field(metadata={"static": True})

    def to_mask(self) -> Bool[Array, "B N T S"]:
        """True where a pair is kept. Dense: for tests, metrics and pictures."""
        ready = ready_keys(self.codes.queries, self.codes.keys, self.codes.num_codes)
        scores = tile_scores(
            self.codes.queries, ready, jnp.arange(self.tau.shape[1]), self.key_mask,
            num_codes=self.codes.num_codes, causal=self.causal,
        )  # fmt: skip
        scores = scores.reshape(scores.shape[0], -1, *scores.shape[3:])
        return is_kept(scores, self.tau.swapaxes(1, 2), self.first.swapaxes(1, 2))


def tokens(
    codes: Codes,
    *,
    keep: int,
    causal: bool = False,
    key_mask: Bool[Array, "B S"] | None = None,
) -> KeptTokens:
    """The L best keys of every query, exactly, for self-attention.

    Scores are computed tile by tile over the queries; beside the result, only those of one tile
    with all keys are held.

    Args:
        codes: of queries and keys, from `ProductQuantizer.codes`.
        keep: L, the keys that a query keeps, its own among them.
        causal: whether a query sees keys of its own index and below only.
        key_mask: False where a key is padding: kept by no query.

    Returns:
        Two integers for every query and head.

    Raises:
        ValueError: lengths differ, L is out of range, or the sequence is too long for int32.

    Example:
        >>> import jax
        >>> import sparsax
        >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 64, 2, 16))
        >>> quantizer = sparsax.ProductQuantizer.fit(jax.random.key(1), k, queries=q)
        >>> kept = sparsax.patterns.topl.tokens(quantizer.codes(q, k), keep=8, causal=True)
        >>> kept.to_mask().sum(-1)[0, 0, ::9].tolist()
        [1, 8, 8, 8, 8, 8, 8, 8]
    """
    length = check_codes(codes, keep, key_mask)
    best = lambda scores, _: _best(scores, keep, codes.most + 1)
    tau, first = _over_rows(best, codes, causal, key_mask, tile_rows(length))
    # tiles B K G t -> B T N
    heads_last = lambda x: jnp.moveaxis(x, 4, 2).reshape(*x.shape[:2], x.shape[4], -1)
    in_order = lambda x: join_rows(heads_last(x), length)
    return KeptTokens(codes, in_order(tau), in_order(first), key_mask, causal=causal)


def votes(
    codes: Codes, *, keep: int, block: int, stride: int, causal: bool,
    key_mask: Bool[Array, "B S"] | None,
) -> Int[Array, "B K I J"]:  # fmt: skip
    """How many pairs of two blocks are kept, of every `stride`-th query."""
    length = codes.queries.shape[1]
    num_blocks, each = -(-length // block), block // stride
    pad = num_blocks * block - length

    def vote(scores, rows):
        kept = is_kept(scores, *_best(scores, keep, codes.most + 1))
        kept &= (rows < length)[:, None]
        if key_mask is not None:
            real = key_mask[:, jnp.minimum(rows, length - 1)]
            kept &= real[:, None, None, :, None]
        kept = jnp.pad(kept, [(0, 0)] * 4 + [(0, pad)])
        shape = *kept.shape[:3], -1, each, num_blocks, block
        return kept.reshape(shape).sum((2, 4, 6), dtype=jnp.int32)

    tile = each * max(1, QUERY_TILE // each)
    found = _over_rows(vote, codes, causal, key_mask, tile, stride)  # tiles B K I' J
    return jnp.moveaxis(found, 0, 2).reshape(*found.shape[1:3], -1, num_blocks)[:, :, :num_blocks]


def elect(
    votes: Int[Array, "B K I J"], codes: Codes, *, keep: int, block: int, stride: int, causal: bool
) -> BlockPattern:
    """The pattern of the blocks with most votes; of equals the most recent."""
    length, num_blocks = codes.queries.shape[1], votes.shape[-1]
    most = codes.queries.shape[2] // codes.keys.shape[2] * block * (block // stride)
    i, j = jnp.arange(num_blocks)[:, None], jnp.arange(num_blocks)
    votes = jnp.where((i == j) | (j == 0), most + 1, votes)
    votes = jnp.where(i < j, -1, votes) if causal else votes
    width = min(max(2, -(-keep // block)), num_blocks)
    return BlockPattern.from_block_mask(
        is_kept(votes, *_best(votes, width, most + 1)), q_len=length, block_q=block, kv_width=width
    )


def check_votes(
    codes: Codes, keep: int, key_mask: Array | None, block: int, voters: int | None
) -> int:
    """Of how many queries one votes; ValueError as for `sparsax.top_l_blocks`."""
    length = check_codes(codes, keep, key_mask)
    check_blocks(length, length, block, block)
    return voting_stride(block, voters)


def voting_stride(block: int, voters: int | None) -> int:
    """Of how many queries of a block one votes; ValueError where voters do not divide them."""
    if voters is None:
        voters = math.gcd(block, VOTERS)
    if isinstance(voters, bool) or not isinstance(voters, int) or voters < 1 or block % voters:
        raise ValueError(
            f"voters must be a whole number that divides the {block} queries of a block; got "
            f"{voters!r}. voters={math.gcd(block, VOTERS)} would do, or voters={block} for all."
        )
    return block // voters


def _over_rows(function, codes, causal, key_mask, tile, stride=1):
    """`function(scores [B, K, G, t, S], rows [t])` of tiles of every stride-th query, stacked."""
    ready = ready_keys(codes.queries, codes.keys, codes.num_codes)
    tiles = split_rows(codes.queries[:, ::stride], tile)

    def one(step):
        rows = (step[0] * tile + jnp.arange(tile)) * stride
        scores = tile_scores(
            step[1], ready, rows, key_mask, num_codes=codes.num_codes, causal=causal
        )
        return function(scores, rows)

    return lax.map(one, (jnp.arange(tiles.shape[0]), tiles))


def _best(scores, keep, most):
    """`(tau, first)` of the `keep` best entries of every row; a later one wins among equals.

    Score and position make one number, so no two are equal. The bits of the smallest number that
    is kept are found from the highest down, as a radix sort would, by how many numbers are as large
    as each candidate. Rows with fewer entries get 0, which keeps all.
    """
    length = scores.shape[-1]
    shift = (length - 1).bit_length()
    bits = shift + int(most).bit_length()
    if bits > 31:
        raise ValueError(
            f"score and position must fit 31 bits: at most {2 ** (31 - bits + shift)} keys for "
            f"scores up to {most}; got {length}."
        )
    numbers = jnp.where(scores < 0, -1, (scores << shift) | jnp.arange(length))

    found = numbers[..., 0] * 0
    # Two bits a pass, and no loop: on a GPU its every turn waits for the host.
    for low in reversed(range(0, bits, 2)):
        digits = [digit for digit in (1, 2, 3) if digit << low < 1 << bits]
        enough = [
            (numbers >= (found | digit << low)[..., None]).sum(-1) >= keep for digit in digits
        ]
        found |= sum(x.astype(found.dtype) for x in enough) << low
    return found >> shift, found & ((1 << shift) - 1)


def check_codes(codes: Codes, keep: int, key_mask: Array | None) -> int:
    """The length of the sequence; ValueError unless codes, L and mask fit each other."""
    if not isinstance(codes, Codes):
        raise ValueError(
            f"codes must be those of ProductQuantizer.codes(q, k); got {type(codes).__name__}."
        )
    (batch, length), kv_len = codes.queries.shape[:2], codes.keys.shape[1]
    if length != kv_len:
        raise ValueError(
            f"top-L selection is for self-attention: T must be S; got T={length} and S={kv_len}."
        )
    if not 1 <= keep <= length:
        raise ValueError(f"keep must lie within [1, S={length}]; got {keep}.")
    if key_mask is not None and (key_mask.shape != (batch, length) or key_mask.dtype != bool):
        raise ValueError(
            f"key_mask must be boolean [B, S]={(batch, length)}, False where padding; "
            f"got {key_mask.dtype} {tuple(key_mask.shape)}."
        )
    return length
