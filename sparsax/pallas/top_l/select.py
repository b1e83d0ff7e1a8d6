"""The two integers of every query: which score is the last that it keeps, and from which key on.

Gui et al., "SPT" (arXiv 2312.10365), section 4.1. A thread holds a query and walks the keys twice:
first it counts how many reach each score, then it looks for the first of the equal ones to be kept.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Int

from sparsax.pallas.block_sparse.tiles import ROWS
from sparsax.pallas.support import vary
from sparsax.pallas.top_l.matches import differing, key_ids, words_of
from sparsax.quantise.codes import CODES_PER_WORD, Codes

GROUP = 8  # keys at a time, of which four bits can count no more than 15
LOW = 0x0F0F0F0F  # the lower four bits of every byte
ONES = 0x11111111
VECTOR = plgpu.Layout.WG_STRIDED((ROWS,), vec_size=1)  # a number per thread


@functools.partial(jax.jit, static_argnames=("keep", "causal", "interpret"))
def select(
    codes: Codes, key_mask: Bool[Array, "B S"] | None, *, keep: int, causal: bool, interpret=None
) -> tuple[Int[Array, "B T N"], Int[Array, "B T N"]]:
    """`(tau, first)` of every query, those of `sparsax.patterns.topl.tokens`."""
    batch, length = codes.queries.shape[:2]
    real = jnp.ones((batch, length), bool) if key_mask is None else key_mask
    seen = jnp.cumsum(real, 1, dtype=jnp.int32)
    seen = seen if causal else jnp.broadcast_to(seen[:, -1:], seen.shape)
    seen = jnp.pad(seen, ((0, 0), (0, -length % ROWS)))
    words, keys = words_of(codes.queries), key_ids(codes.keys, key_mask)
    kernel = _kernel(words.shape, keys.shape[1], codes.num_codes, keep, causal, interpret)
    found = kernel(words, seen, keys)
    found = vary(found, (words, seen, keys))
    return tuple(x[:, :, :length].swapaxes(1, 2) for x in found)


def _kernel(shape, kv_heads: int, num_codes: int, keep: int, causal: bool, interpret):
    """A function of `(words [B, N, W, T'], seen [B, T'], keys [B, K, W + 1, S'])`.

    `seen` is how many keys a query may see. It returns `tau [B, N, T']` and `first [B, N, T']`.
    """
    batch, heads, num_words, positions = shape
    tiles, copies = positions // ROWS, batch * heads
    words = range(num_words)

    def kernel(q_words, seen, keys, tau_out, first_out):
        item = lax.axis_index("item")
        tile = tiles - 1 - item // copies  # of causal ones the longest
        copy = lax.rem(item, jnp.int32(copies))
        b, head = copy // heads, lax.rem(copy, jnp.int32(heads))
        kv_head, rows = head // (heads // kv_heads), pl.ds(tile * ROWS, ROWS)
        load = lambda ref: plgpu.load(ref, layout=VECTOR, optimized=False)
        vector = lambda x: plgpu.layout_cast(jnp.full((ROWS,), x, jnp.int32), VECTOR)
        row = tile * ROWS + plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=VECTOR)
        mine = [load(q_words.at[b, head, w, rows]) for w in words]
        own = jnp.where(load(keys.at[b, kv_head, num_words, rows]) == row, 1, 0)

        def read(key):
            """A key's place and how many of its codes differ from those of every query."""
            others = [keys[b, kv_head, w, key] for w in words]
            return keys[b, kv_head, num_words, key], differing(mine, others)

        def other(place):
            """Whether a query sees the key and it is not its own."""
            return place < row if causal else place != row

        def each_block(visit, carry):
            """`visit(first key, whether to ask `other`, carry)` for all that may be seen."""
            ask_none = lambda block, carry: visit(block * ROWS, False, carry)
            carry = lax.fori_loop(0, tile, ask_none, carry)
            carry = visit(tile * ROWS, True, carry)
            return carry if causal else lax.fori_loop(tile + 1, tiles, ask_none, carry)

        def count(begin, ask, totals):
            """Adds the keys of a block to how many reach each score, M downwards."""

            def of_group(group, sums):
                packed = [vector(0) for _ in words]
                for i in range(GROUP):
                    place, differ = read(begin + group * GROUP + i)
                    one = jnp.where(place >= 0, ONES, 0)
                    for w in words:
                        # Ones from the four bits on whose number is how many codes differ. In two
                        # steps, as no shift may be one by all bits.
                        beyond = differ
                        if num_words > 1:
                            beyond = jnp.clip(differ - w * CODES_PER_WORD, 0, CODES_PER_WORD)
                        reached = jnp.left_shift(jnp.left_shift(one, 2 * beyond), 2 * beyond)
                        packed[w] += jnp.where(other(place), reached, 0) if ask else reached
                halves = [x for p in packed for x in (p, p >> 4)]
                return tuple(s + (x & LOW) for s, x in zip(sums, halves, strict=True))

            sums = lax.fori_loop(0, ROWS // GROUP, of_group, (vector(0),) * (2 * num_words))
            at = lambda n: sums[n // CODES_PER_WORD * 2 + n % 2] >> (n % CODES_PER_WORD // 2 * 8)
            return tuple(total + (at(n) & 255) for n, total in enumerate(totals))

        totals = each_block(count, (vector(0),) * num_codes)
        reaching = [*(total + own for total in reversed(totals)), own]  # 1, ..., M, and own
        tau, last = vector(0), load(seen.at[b, rows])
        for many in reaching:
            tau += jnp.where(many >= keep, 1, 0)
            last = jnp.where(many >= keep, many, last)
        wanted = num_codes - tau  # codes that differ in a tie; of none for the own key, below 0

        def find(begin, ask, state):
            """Goes on to the first tie that is kept: so many come before it, or it was found."""

            def of_group(group, state):
                before, first = state
                for i in range(GROUP):
                    place, differ = read(begin + group * GROUP + i)
                    tie = (differ | jnp.where(place >= 0, 0, ONES)) == wanted
                    tie = tie & other(place) if ask else tie
                    first = jnp.where(tie & (before == 0), place, first)
                    before -= jnp.where(tie, 1, 0)
                return before, first

            return lax.fori_loop(0, ROWS // GROUP, of_group, state)

        # Where fewer keys are seen than kept, no tie is that one, and all from 0 on are kept.
        _, first = each_block(find, (last - keep, vector(0)))
        tau_out.at[b, head, rows][...] = tau
        first_out.at[b, head, rows][...] = jnp.where(wanted < 0, row, first)

    result = jax.ShapeDtypeStruct((batch, heads, positions), jnp.int32)
    return plgpu.kernel(
        kernel,
        out_type=(result, result),
        grid=(copies * tiles,),
        grid_names=("item",),
        kernel_name="top_l_select",
        interpret=interpret,
    )
