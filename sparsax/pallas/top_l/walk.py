"""A thread's query and its walk over the keys, and which score is the last that it keeps.

Gui et al., "SPT" (arXiv 2312.10365), section 4.1. A thread holds a query and visits the keys one by
one, all threads of a block the same key at once.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsax.pallas.block_sparse.problem import whole_tiles
from sparsax.pallas.block_sparse.tiles import ROWS
from sparsax.pallas.top_l.matches import differing, key_ids, words_of
from sparsax.quantise.codes import CODES_PER_WORD, Codes

GROUP = 8  # keys at a time, of which four bits can count no more than 15
LOW = 0x0F0F0F0F  # the lower four bits of every byte
ONES = 0x11111111
VECTOR = plgpu.Layout.WG_STRIDED((ROWS,), vec_size=1)  # a number per thread


class Walked(NamedTuple):
    """The arrays that a kernel reads, see `operands`, and the static facts of its walk."""

    operands: tuple
    kv_heads: int
    num_codes: int
    keep: int
    causal: bool
    stride: int

    @classmethod
    def of(cls, codes: Codes, key_mask, keep: int, causal: bool, stride: int = 1) -> "Walked":
        """Every stride-th query: words `[B, N, W, T']`, marks `[B, T']`; keys `[B, K, W + 1, S']`.

        A mark is twice the number of keys that a query sees, and one more if it is no padding.
        """
        batch, length = codes.queries.shape[:2]
        real = jnp.ones((batch, length), bool) if key_mask is None else key_mask
        seen = jnp.cumsum(real, 1, dtype=jnp.int32)
        seen = seen if causal else jnp.broadcast_to(seen[:, -1:], seen.shape)
        marks = (2 * seen + real)[:, ::stride]
        marks = jnp.pad(marks, ((0, 0), (0, -marks.shape[1] % ROWS)))
        words, keys = words_of(codes.queries[:, ::stride]), key_ids(codes.keys, key_mask)
        kv_heads = codes.keys.shape[2]
        return cls((words, marks, keys), kv_heads, codes.num_codes, keep, causal, stride)

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(B, N, T')`."""
        batch, heads, _, positions = self.operands[0].shape
        return batch, heads, positions

    @property
    def items(self) -> int:
        """Thread blocks: of every sample and head one for each row tile."""
        batch, heads, positions = self.shape
        return batch * heads * (positions // ROWS)

    @property
    def key_tiles(self) -> int:
        """Row tiles of keys."""
        return whole_tiles(self.operands[2].shape[3] - ROWS) // ROWS


class Queries:
    """The queries of a thread block, within the kernel.

    Attributes:
        at: `(sample, head, rows)`, where they stand among those that walk.
        row: their places.
        own: 1 for a query that sees its own key, which scores more than any other.
    """

    def __init__(self, x: Walked, words_ref, marks_ref, keys):
        (batch, heads, positions), self.x, self.keys = x.shape, x, keys
        item, copies, tiles = lax.axis_index("item"), batch * heads, positions // ROWS
        self.tile = tiles - 1 - item // copies  # of causal ones the longest first
        copy = lax.rem(item, jnp.int32(copies))
        self.sample, head = copy // heads, lax.rem(copy, jnp.int32(heads))
        self.kv_head = head // (heads // x.kv_heads)
        self.words = range(x.operands[0].shape[2])
        rows = pl.ds(self.tile * ROWS, ROWS)
        load = lambda ref: plgpu.load(ref, layout=VECTOR, optimized=False)
        each = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=VECTOR)
        self.at, self.row = (self.sample, head, rows), (self.tile * ROWS + each) * x.stride
        self.mine = [load(words_ref.at[self.sample, head, w, rows]) for w in self.words]
        marks = load(marks_ref.at[self.sample, rows])
        self.own, self.seen = marks & 1, marks >> 1

    def vector(self, value: int):
        """The number for every query."""
        return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.int32), VECTOR)

    def read(self, key) -> tuple[Any, Any]:
        """A key's place and how many of its codes differ from those of every query."""
        at = self.sample, self.kv_head
        others = [self.keys[(*at, w, key)] for w in self.words]
        return self.keys[(*at, len(self.words), key)], differing(self.mine, others)

    def other(self, place):
        """Whether a query sees the key and it is not its own."""
        return place < self.row if self.x.causal else place != self.row

    def each_tile(self, visit, carry):
        """`visit(first key, whether to ask `other`, carry)` for all that may be seen, in order."""
        first = self.tile * self.x.stride  # keys that stand among the queries begin here
        last = jnp.minimum(first + self.x.stride, self.x.key_tiles)
        go = lambda ask: lambda tile, carry: visit(tile * ROWS, ask, carry)
        carry = lax.fori_loop(0, first, go(False), carry)
        carry = lax.fori_loop(first, last, go(True), carry)
        return carry if self.x.causal else lax.fori_loop(last, self.x.key_tiles, go(False), carry)

    def threshold(self) -> tuple[Any, Any, Any]:
        """`(tau, wanted, spare)`: the last score that is kept, and codes that differ in its ties.

        Of these the first `spare` are not kept, if it is above 0. Nothing is wanted, below 0, where
        the own key is all that is kept.
        """
        keep, num_codes = self.x.keep, self.x.num_codes
        totals = self.each_tile(self._count, (self.vector(0),) * num_codes)
        # Of scores from 1 to M, and of the own key's.
        reaching = [*(total + self.own for total in reversed(totals)), self.own]
        tau, last = self.vector(0), self.seen
        for many in reaching:
            tau += jnp.where(many >= keep, 1, 0)
            last = jnp.where(many >= keep, many, last)
        return tau, num_codes - tau, last - keep

    def _count(self, begin, ask, totals):
        """Adds the keys of a tile to how many reach each score, M downwards."""

        def of_group(group, sums):
            packed = [self.vector(0) for _ in self.words]
            for i in range(GROUP):
                place, differ = self.read(begin + group * GROUP + i)
                one = jnp.where(place >= 0, ONES, 0)
                for w in self.words:
                    # Ones from the four bits on whose number is how many codes differ. In two
                    # steps, as no shift may be one by all bits.
                    beyond = differ
                    if len(self.words) > 1:
                        beyond = jnp.clip(differ - w * CODES_PER_WORD, 0, CODES_PER_WORD)
                    reached = jnp.left_shift(jnp.left_shift(one, 2 * beyond), 2 * beyond)
                    packed[w] += jnp.where(self.other(place), reached, 0) if ask else reached
            halves = [x for p in packed for x in (p, p >> 4)]
            return tuple(s + (x & LOW) for s, x in zip(sums, halves, strict=True))

        sums = (self.vector(0),) * (2 * len(self.words))
        sums = lax.fori_loop(0, ROWS // GROUP, of_group, sums)
        at = lambda n: sums[n // CODES_PER_WORD * 2 + n % 2] >> (n % CODES_PER_WORD // 2 * 8)
        return tuple(total + (at(n) & 255) for n, total in enumerate(totals))


def absent(place):
    """0, or for a key that is none more than any number of codes that differ."""
    return jnp.where(place >= 0, 0, ONES)
