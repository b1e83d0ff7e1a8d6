"""A thread's query and its walk over the keys, and which score is the last that it keeps.

Gui et al., "SPT" (arXiv 2312.10365), section 4.1. A thread holds a query and visits keys one by
one, all threads of a warpgroup the same key at once. Where there are few queries, several
warpgroups hold the same ones and visit a range of the keys each.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsax.pallas.block_sparse.problem import whole_tiles
from sparsax.pallas.block_sparse.tiles import ROWS
from sparsax.pallas.hopper import multiprocessors
from sparsax.pallas.support import vary
from sparsax.pallas.top_l.matches import differing, key_ids, words_of
from sparsax.quantise.codes import CODES_PER_WORD, Codes

GROUP = 8  # keys at a time, of which four bits can count no more than 15
LOW = 0x0F0F0F0F  # the lower four bits of every byte
ONES = 0x11111111
BUSY = 8  # warpgroups of a multiprocessor that hide each other's waits
VECTOR = plgpu.Layout.WG_STRIDED((ROWS,), vec_size=1)  # a number per thread


class Walked(NamedTuple):
    """The arrays that a kernel reads, see `of`, and the static facts of its walk."""

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
        Last come the numbers of keys before each row tile.
        """
        batch, length = codes.queries.shape[:2]
        real = jnp.ones((batch, length), bool) if key_mask is None else key_mask
        seen = jnp.cumsum(real, 1, dtype=jnp.int32)
        before = jnp.pad(seen, ((0, 0), (1, -length % ROWS)), mode="edge")[:, ::ROWS]
        before = before.at[:, 0].set(0)
        seen = seen if causal else jnp.broadcast_to(seen[:, -1:], seen.shape)
        marks = (2 * seen + real)[:, ::stride]
        marks = jnp.pad(marks, ((0, 0), (0, -marks.shape[1] % ROWS)))
        words, keys = words_of(codes.queries[:, ::stride]), key_ids(codes.keys, key_mask)
        kv_heads = codes.keys.shape[2]
        return cls((words, marks, keys, before), kv_heads, codes.num_codes, keep, causal, stride)

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

    @property
    def parts(self) -> int:
        """Ranges of keys: so many that the warpgroups of all items keep the GPU busy."""
        return next((n for n in (4, 2) if self.items * n <= BUSY * multiprocessors()), 1)

    def run(self, kernel: Callable[..., None], name: str, out_type, interpret):
        """The results of `kernel(queries, *outputs)`, on every thread block's queries."""

        def on_refs(words, marks, keys, before, *outputs, slots, gathered):
            kernel(Queries(self, words, marks, keys, before, slots, gathered), *outputs)

        run = plgpu.kernel(
            on_refs,
            out_type=out_type,
            scratch_types={
                "slots": plgpu.SMEM((self.parts, self.num_codes + 1, ROWS), jnp.int32),
                "gathered": plgpu.Barrier(num_arrivals=self.parts),
            },
            grid=(self.items,),
            grid_names=("item",),
            num_threads=self.parts,
            thread_name="part",
            kernel_name=name,
            interpret=interpret,
        )
        return vary(run(*self.operands), self.operands)


class Queries:
    """The queries of a thread block, within the kernel.

    Attributes:
        at: `(sample, head, rows)`, where they stand among those that walk.
        row: their places.
        own: 1 for a query that sees its own key, which scores more than any other.
        part: the range of keys that this warpgroup visits.
    """

    def __init__(self, x: Walked, words_ref, marks_ref, keys, before, slots, gathered):
        (batch, heads, positions), self.x, self.keys, self.before = x.shape, x, keys, before
        self.slots, self.gathered, self.part = slots, gathered, lax.axis_index("part")
        item, copies, tiles = lax.axis_index("item"), batch * heads, positions // ROWS
        self.tile = tiles - 1 - item // copies  # of causal ones the longest first
        copy = lax.rem(item, jnp.int32(copies))
        self.sample, head = copy // heads, lax.rem(copy, jnp.int32(heads))
        self.kv_head = head // (heads // x.kv_heads)
        self.words = range(x.operands[0].shape[2])
        rows = pl.ds(self.tile * ROWS, ROWS)
        each = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=VECTOR)
        self.at, self.row = (self.sample, head, rows), (self.tile * ROWS + each) * x.stride
        self.mine = [_load(words_ref.at[self.sample, head, w, rows]) for w in self.words]
        marks = _load(marks_ref.at[self.sample, rows])
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
        """`visit(first key, whether to ask `other`, carry)` for the range's tiles, in order.

        All ranges together hold every key that a query may see.
        """
        begin, end = self._range(self.part)
        first = self.tile * self.x.stride  # keys that stand among the queries begin here
        inside = lambda tile: jnp.clip(tile, begin, end)
        first, last = inside(first), inside(first + self.x.stride)
        go = lambda ask: lambda tile, carry: visit(tile * ROWS, ask, carry)
        carry = lax.fori_loop(begin, first, go(False), carry)
        carry = lax.fori_loop(first, last, go(True), carry)
        return carry if self.x.causal else lax.fori_loop(last, end, go(False), carry)

    def threshold(self) -> tuple[Any, Any, Any]:
        """`(tau, wanted, spare)`: the last score that is kept, and codes that differ in its ties.

        Of the range's ties the first `spare` are not kept, if it is above 0. Nothing is wanted,
        below 0, where the own key is all that is kept.
        """
        keep, num_codes = self.x.keep, self.x.num_codes
        of_ranges = self.shared(self.each_tile(self._count, (self.vector(0),) * num_codes), 0)
        totals = [sum(each[1:], each[0]) for each in zip(*of_ranges, strict=True)]
        # Of scores from 1 to M, and of the own key's.
        reaching = [*(total + self.own for total in reversed(totals)), self.own]
        tau, last = self.vector(0), self.seen
        for many in reaching:
            tau += jnp.where(many >= keep, 1, 0)
            last = jnp.where(many >= keep, many, last)
        wanted, spare = num_codes - tau, last - keep
        for part, reached in enumerate(of_ranges[:-1]):
            # Ties of an earlier range: what reaches the score, less what reaches the next.
            ties, above = self.vector(0), self.vector(0)
            for differ, many in enumerate([*reached, self._keys_of(part)]):
                ties = jnp.where(wanted == differ, many - above, ties)
                above = many
            spare -= ties * jnp.where(part < self.part, 1, 0)
        return tau, wanted, spare

    def shared(self, values: Sequence, first: int) -> list[tuple]:
        """The values of every range, exchanged through the slots from `first` on."""
        if self.x.parts == 1:
            return [tuple(values)]
        for slot, value in enumerate(values, first):
            self.slots.at[self.part, slot][...] = value
        plgpu.barrier_arrive(self.gathered)
        plgpu.barrier_wait(self.gathered)
        slots = range(first, first + len(values))
        return [tuple(_load(self.slots.at[p, i]) for i in slots) for p in range(self.x.parts)]

    def _range(self, part) -> tuple[Any, Any]:
        """The first of its tiles, and the one after its last."""
        seen = self.x.key_tiles
        if self.x.causal:
            seen = jnp.minimum((self.tile + 1) * self.x.stride, seen)
        return seen * part // self.x.parts, seen * (part + 1) // self.x.parts

    def _keys_of(self, part: int):
        """How many keys of a range a query sees, without its own."""
        begin, end = self._range(part)
        up_to = lambda tile: jnp.minimum(self.before[self.sample, tile], self.seen)
        inside = (self.row >= begin * ROWS) & (self.row < end * ROWS)
        return up_to(end) - up_to(begin) - jnp.where(inside, self.own, 0)

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


def _load(ref):
    return plgpu.load(ref, layout=VECTOR, optimized=False)


def absent(place):
    """0, or for a key that is none more than any number of codes that differ."""
    return jnp.where(place >= 0, 0, ONES)
