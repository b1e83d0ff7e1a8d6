"""The forward kernel: softmax attention of row tiles over the key blocks they list.

Shah et al., "FlashAttention-3" (arXiv 2407.08608), algorithm 2: while the tensor cores multiply the
probabilities of one tile with its values, the warpgroup computes the softmax of the next tile.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsax.pallas.block_sparse import stream
from sparsax.pallas.block_sparse.handover import Handover, Row
from sparsax.pallas.block_sparse.problem import Columns, Problem, whole_tiles
from sparsax.pallas.block_sparse.rows import Lists, QueryTile, QueryTiles, query_types
from sparsax.pallas.block_sparse.schedule import Schedule, part_types
from sparsax.pallas.block_sparse.segments import split
from sparsax.pallas.block_sparse.tiles import ROWS, Given
from sparsax.pallas.hopper import (
    COMPUTE,
    LOG2E,
    LOWEST,
    MATRIX,
    REGISTERS,
    ROW,
    WG_ROWS,
    Ring,
    TensorCores,
    Turns,
    copying,
    folded,
    full,
    launch,
    per_row,
    shared,
    zeros,
)  # fmt: skip


def forward_kernel(
    x: Problem, schedule: Schedule, given: Given, *, tile: int, stages: int, turns: bool,
    row_slots: int, teams: int, interpret,
):  # fmt: skip
    """A function of `(table, [full], count, cols, [bits], [q_ids, kv_ids], [every], *q, *k, *v)`.

    q, k and v are one array or, behind each other, several: those of `q_starts` and `kv_starts`.

    It returns `*o [B, T, N, H]` and `lse [B, N, T']` in units of log 2, infinite for a query that
    keeps nothing, T' all positions, padded to row tiles; and of the pieces of split rows the same
    in float32, `[part and copy, 128, H]` and `[.., 128]`, but -inf. The schedule is one of as many
    teams. Where `every` list is given, to a schedule of single rows, o and lse are NaN if any of
    their head is not to be used.
    """
    columns, cores = Columns(x.block_kv, tile, x.q_bounds), TensorCores(interpret is not None)
    masked, scale = columns.masked(given.bits), x.scale * LOG2E
    gain = scale if scale > 0 else 1.0  # a positive factor may wait until after max and mask
    # By measurement: with more features the tensor cores are what the warpgroups wait for.
    fold = folded if x.H <= 64 else lambda join, s: s
    # o has space of its own, so that the next queries arrive meanwhile, or that of its queries.
    roomy = x.H * row_slots < 256

    def kernel(*refs, q_smem, k_smem, v_smem, o_smem, lse_smem, ids_smem, q_bars, k_bars, v_bars,
               turn_bars):  # fmt: skip
        lists, refs = Lists.split(refs, given, x)
        q, k, v, o, (lse, *parts) = split(refs, x.q_starts, x.kv_starts, x.kv_starts, x.q_starts)
        tiles = QueryTiles(x, columns, schedule, lists)
        wg = lax.axis_index("wg")

        def rings(team):
            bars = (q_bars, row_slots), (k_bars, stages), (v_bars, stages)
            return (Ring(of, slots, team * slots) for of, slots in bars)

        @copying(wg, teams)
        def copy(team):
            q_ring, k_ring, v_ring = rings(team)
            of_rows = [(q, q_smem)]
            tiles.copy(team, of_rows, q_ring, k, v, k_smem, v_smem, ids_smem, k_ring, v_ring)

        @pl.when(wg < teams * COMPUTE)
        def compute():
            plgpu.set_max_registers(REGISTERS[teams][1], action="increase")
            team, half = (0, wg) if teams == 1 else (wg // COMPUTE, lax.rem(wg, COMPUTE))
            q_ring, k_ring, v_ring = rings(team)
            order = Turns(turn_bars, half)
            order.open()
            poison_of_head = 0.0 if given.every is None else tiles.poison(team, given.every)

            def softmax(s, top, total):
                new_top = jnp.maximum(top, fold(jnp.maximum, s).max(axis=1) * gain)
                weights = jnp.exp2(s * gain - per_row(new_top, s.shape))
                decay = jnp.exp2(top - new_top)
                # Each thread keeps a sum of its own, or every tile would wait for their exchange.
                total = total * per_row(decay, total.shape) + folded(jnp.add, weights, 8)
                return weights, new_top, total, decay

            def write(place, settled, poison, space):
                row, sample, head, part = place
                acc, top, sums = settled
                poison = poison + poison_of_head
                total = sums.sum(axis=1)
                empty = total == 0.0
                positive = jnp.where(empty, 1.0, total)
                result = acc / per_row(positive, acc.shape) + poison
                # Infinite, so that every probability of the row is 0 in the backward pass.
                log_total = jnp.where(empty, jnp.inf, top + jnp.log2(positive)) + poison

                def write_whole():
                    out = o_smem.at[wg] if space is None else space
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    out[...] = result.astype(x.dtype)
                    lse_smem.at[wg][...] = log_total
                    plgpu.commit_smem()
                    first = row * ROWS + half * WG_ROWS
                    rows = lambda first: pl.ds(first, WG_ROWS)
                    o.at(first, lambda ref, first: plgpu.copy_smem_to_gmem(
                        out, ref.at[sample, rows(first), head]
                    ))  # fmt: skip
                    of_rows = lse.at[sample, head, rows(first)]
                    plgpu.copy_smem_to_gmem(lse_smem.at[wg], of_rows)

                def write_part():
                    rows = pl.ds(half * WG_ROWS, WG_ROWS)
                    parts[0].at[part, 0, rows][...] = result
                    weight = jnp.where(log_total == jnp.inf, -jnp.inf, log_total)
                    parts[1].at[part, rows][...] = weight

                @pl.when(row >= 0)
                def _():
                    if parts:
                        pl.when(part >= 0)(write_part)
                    pl.when(part < 0)(write_whole)

            none = (
                zeros((WG_ROWS, x.H), MATRIX), full((WG_ROWS,), LOWEST, ROW),
                zeros((WG_ROWS, 8), MATRIX),
            )  # fmt: skip
            no_weights = plgpu.layout_cast(jnp.zeros((WG_ROWS, tile), x.dtype), MATRIX)

            def values(weights, acc, step):
                return acc, weights, v_smem.at[v_ring.slot(step)]

            def settle(sums, step):
                acc, top, total, weights = sums
                acc = cores.start([values(weights, acc, step)], lambda get: get())
                cores.release(v_ring, step)
                return acc, top, total

            def start(work: QueryTile, done, begun) -> Row:
                queries = q_smem.at[q_ring.slot(done), half]
                # With other features, the assembler spills without the branch that this asks for.
                find, read, keep = tiles.mask(work, half, ids_smem, of_whole=x.H != 64)

                def scores(step):
                    k_ring.wait(step)
                    return None, queries, k_smem.at[k_ring.slot(step)].transpose((1, 0))

                def begin(owed):
                    found = find(work.first) if masked else None

                    def then(get, get_acc=None):
                        s = get() if gain == scale else get() * scale
                        if found is not None:
                            unmasked = columns.full_tiles(work.full) > work.first
                            mask = lambda s: keep(s, -jnp.inf, found, None, k_ring.slot(begun))
                            s = lax.cond(unmasked, lambda s: s, mask, s)
                        cores.release(k_ring, begun)
                        weights, top, total, _ = softmax(s, *none[1:])
                        v_ring.wait(begun)
                        settled = none
                        if get_acc is not None:
                            settled = get_acc(), *owed[1:3]
                            cores.release(v_ring, begun - 1)
                        return settled, (none[0], top, total, weights.astype(x.dtype))

                    products: list[Any] = [scores(begun)]
                    if owed is not None:
                        products.append(values(owed[3], owed[0], begun - 1))
                    order.take()
                    return cores.start(products, then, order.give)

                def advance(t, found, sums):
                    acc, top, total, weights = sums
                    step = begun + t - work.first

                    def then(get_scores, get_acc):
                        slot = k_ring.slot(step)
                        ids = None if found is None else read(slot)  # while the product runs
                        s = get_scores() if gain == scale else get_scores() * scale
                        if found is not None:
                            s = keep(s, -jnp.inf, found, ids, slot)
                        cores.release(k_ring, step)
                        new_weights, new_top, new_total, decay = softmax(s, top, total)
                        # The assembler moves the wait for a product up to where a branch stops it:
                        # this barrier keeps it behind the exponentials. The next step needs v.
                        v_ring.wait(step)
                        acc = get_acc()
                        cores.release(v_ring, step - 1)
                        # Rounded no sooner: the registers were feeding the product just awaited.
                        new_weights = new_weights.astype(x.dtype)
                        return acc * per_row(decay, acc.shape), new_top, new_total, new_weights

                    products = [scores(step), values(weights, acc, step - 1)]
                    order.take()
                    return cores.start(products, then, order.give)

                walk = lambda sums: stream.walk(
                    work.full, work.last, columns, find if masked else None, work.first + 1,
                    advance, sums,
                )  # fmt: skip
                return Row(begin, walk, queries)

            handover = Handover(roomy, none, (*none, no_weights), settle, write)
            handover.each(tiles, team, q_ring, start)
            order.close()
            plgpu.wait_smem_to_gmem(0)

    return launch(
        kernel,
        "block_sparse_forward",
        schedule.thread_blocks,
        (
            *query_types(x),
            jax.ShapeDtypeStruct((x.B, x.N, whole_tiles(x.q_rows)), jnp.float32),
            *part_types(schedule, (1, ROWS, x.H), (ROWS,)),
        ),
        interpret,
        teams=teams,
        q_smem=shared((teams * row_slots, COMPUTE, WG_ROWS, x.H), x.dtype),
        k_smem=shared((teams * stages, tile, x.H), x.dtype),
        v_smem=shared((teams * stages, tile, x.H), x.dtype),
        o_smem=shared((teams * COMPUTE, WG_ROWS, x.H), x.dtype) if roomy else None,
        lse_smem=plgpu.SMEM((teams * COMPUTE, WG_ROWS), jnp.float32),
        ids_smem=plgpu.SMEM((teams * stages, x.key_ids, tile), jnp.int32) if x.ids else None,
        q_bars=Ring.barriers(teams * row_slots, COMPUTE),
        k_bars=Ring.barriers(teams * stages, columns.gather * (1 + x.key_ids)),
        v_bars=Ring.barriers(teams * stages, columns.gather),
        turn_bars=Turns.barrier(turns),
    )
