"""The two integers of every query: which score is the last that it keeps, and from which key on.

Gui et al., "SPT" (arXiv 2312.10365), section 4.1. A thread walks the keys twice: first it counts
how many reach each score, then it looks for the first of the equal ones to be kept.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Int

from sparsax.pallas.block_sparse.tiles import ROWS
from sparsax.pallas.top_l.walk import GROUP, Queries, Walked, absent
from sparsax.quantise.codes import Codes


@functools.partial(jax.jit, static_argnames=("keep", "causal", "interpret"))
def select(
    codes: Codes, key_mask: Bool[Array, "B S"] | None, *, keep: int, causal: bool, interpret=None
) -> tuple[Int[Array, "B T N"], Int[Array, "B T N"]]:
    """`(tau, first)` of every query, those of `sparsax.patterns.topl.tokens`."""
    walked, length = Walked.of(codes, key_mask, keep, causal), codes.queries.shape[1]

    def kernel(queries: Queries, tau_out, first_out):
        tau, wanted, spare = queries.threshold()

        def find(begin, ask, state):
            """Goes on to the first tie that is kept: so many come before it, or it was found."""

            def of_group(group, state):
                before, first = state
                for i in range(GROUP):
                    place, differ = queries.read(begin + group * GROUP + i)
                    tie = (differ | absent(place)) == wanted
                    tie = tie & queries.other(place) if ask else tie
                    first = jnp.where(tie & (before == 0), place, first)
                    before -= jnp.where(tie, 1, 0)
                return before, first

            return lax.fori_loop(0, ROWS // GROUP, of_group, state)

        # Where fewer keys are seen than kept, no tie is that one, and all from 0 on are kept.
        _, found = queries.each_tile(find, (spare, queries.vector(0)))
        of_ranges = queries.shared([found], codes.num_codes)
        first = functools.reduce(jnp.maximum, [x for (x,) in of_ranges])

        @pl.when(queries.part == 0)
        def _():
            tau_out.at[queries.at][...] = tau
            first_out.at[queries.at][...] = jnp.where(wanted < 0, queries.row, first)

    result = jax.ShapeDtypeStruct(walked.shape, jnp.int32)
    found = walked.run(kernel, "top_l_select", (result, result), interpret)
    return tuple(x[:, :, :length].swapaxes(1, 2) for x in found)
