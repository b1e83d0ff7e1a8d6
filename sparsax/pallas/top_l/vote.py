"""How many of the keys that the queries of a block keep lie in each block of keys.

Gui et al., "SPT" (arXiv 2312.10365), section 4.1. A thread walks the keys twice: first it counts
how many reach each score, then how many of a block's it keeps.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

from sparsax.pallas.block_sparse.tiles import ROWS
from sparsax.pallas.support import BLOCKS, on_hopper
from sparsax.pallas.top_l.matches import codes_refusal
from sparsax.pallas.top_l.walk import GROUP, Queries, Walked, absent
from sparsax.quantise.codes import Codes


def votes_refusal(codes: Codes, block: int) -> str | None:
    """Why the kernel cannot count such votes; None if it can."""
    if refused := codes_refusal(codes):
        return refused
    if block not in BLOCKS:
        return f"takes blocks of {BLOCKS}; got {block}"
    if not on_hopper():
        return f"needs an NVIDIA Hopper GPU; the default device is {jax.devices()[0].device_kind}"
    return None


@functools.partial(jax.jit, static_argnames=("keep", "block", "stride", "causal", "interpret"))
def votes(
    codes: Codes, key_mask: Bool[Array, "B S"] | None, *, keep: int, block: int, stride: int,
    causal: bool, interpret=None,
) -> Int[Array, "B K I J"]:  # fmt: skip
    """Those of `sparsax.patterns.topl.votes`: of every stride-th query."""
    walked = Walked.of(codes, key_mask, keep, causal, stride)
    batch, heads, positions = walked.shape
    num_blocks, per_tile = -(-codes.queries.shape[1] // block), ROWS // block

    def kernel(queries: Queries, out):
        sample, head, rows = queries.at
        _, wanted, spare = queries.threshold()

        def vote(begin, ask, before):
            for part in range(per_tile):

                def of_group(group, state, first=part * block):
                    before, many = state
                    for i in range(GROUP):
                        place, differ = queries.read(begin + first + group * GROUP + i)
                        differ = differ | absent(place)
                        tie, kept = differ == wanted, differ < wanted
                        if ask:
                            other = queries.other(place)
                            tie, kept = tie & other, (kept & other) | (place == queries.row)
                        kept = kept | (tie & (before <= 0))
                        before -= jnp.where(tie, 1, 0)
                        many += jnp.where(kept, 1, 0)
                    return before, many

                state = before, queries.vector(0)
                before, many = lax.fori_loop(0, block // GROUP, of_group, state)
                # Padding has no vote.
                out.at[sample, head, begin // block + part, rows][...] = many * queries.own
            return before

        queries.each_tile(vote, spare)

    out = (batch, heads, walked.key_tiles * per_tile, positions)
    each = walked.run(kernel, "top_l_vote", jax.ShapeDtypeStruct(out, jnp.int32), interpret)
    shape = batch, walked.kv_heads, -1, each.shape[2], positions * stride // block, block // stride
    found = each.reshape(shape).sum((2, 5), dtype=jnp.int32).swapaxes(2, 3)
    found = found[:, :, :num_blocks, :num_blocks]
    # Blocks that no query of a tile sees were not visited.
    return jnp.where(np.tri(num_blocks, dtype=bool), found, 0) if causal else found
