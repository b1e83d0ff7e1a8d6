"""Few rows times tiled factors: the factors are read once, by as many thread blocks as there are.

A step of decoding takes as long as its weights take to arrive and a launch takes to start, so a
layer is one launch. A thread block owns a column of tiles and a share of the tiles in it; what it
adds up is a part of y, which the blocks of a column, a cluster, exchange (see `exchange`).

Layers follow each other, so a kernel starts before the last one ends, with what it does not wait
for: its blocks take their places, and the factors come to the cache.

The second product is computed transposed, `v^T p^T`: a matrix instruction has 64 rows, which are
columns of y then, and 8 columns at least, which are rows of x. Sums are as few as y has numbers.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsax.pallas.activations import ACTIVATIONS
from sparsax.pallas.exchange import Room
from sparsax.pallas.hopper import (
    ACC,
    COMPUTE,
    MATRIX,
    ROW,
    SLAB,
    WG_ROWS,
    Ring,
    TensorCores,
    copying,
    launch,
    per_row,
)
from sparsax.pallas.tsvd.fused import lined
from sparsax.pallas.tsvd.shares import (
    CLUSTER,
    DEPTH,
    INTERPRETED,
    PIECE,
    ROWS,
    Tiling,
    large,
    slabs,
)

EARLY = 2  # tiles whose factors are brought to the cache while the kernel before still runs
BIASES = ("float32", "bfloat16", "float16")  # as they are


def forward(x, u, v, bias, *, activation: str | None, interpret=None, tiling: Tiling | None = None):
    """`activation(x w + bias)` `[M, J*C]`, w given by the factors of its tiles; M at most 64."""
    rows = len(x)
    assert rows <= ROWS
    cluster = CLUSTER if interpret is None else INTERPRETED
    tiling = tiling or Tiling.of(u, v, rows, cluster)
    assert tiling is not None
    count, high = slabs(rows)
    if rows < count * high:
        x = jnp.pad(x, ((0, count * high - rows), (0, 0)))
    operands = [x.reshape(count, high, -1), u, v]
    if bias is not None:
        operands.append(bias if str(bias.dtype) in BIASES else bias.astype(jnp.float32))
    apply = ACTIVATIONS.get(activation or "")
    y, *_ = _kernel(operands[0], u, v, bias is not None, apply, tiling, interpret)(*operands)
    return y.reshape(count * high, -1)[:rows]


def _kernel(x, u, v, has_bias: bool, activation, tiling: Tiling, interpret):
    """A function of `(x [slabs, rows, I*A], u, v, [bias])`; y `[slabs, rows, J*C]` comes first."""
    (num_in, size, num_out, rank), width = u.shape, v.shape[3]
    half, chunks, cores = width // COMPUTE, size // DEPTH, TensorCores(interpret is not None)
    num_slabs, few, splits = len(x), len(x) * SLAB, tiling.splits
    registers = large(rank, width, few)
    # Of the 64 rows that a matrix instruction takes, those beyond are of the next slots, and their
    # products nobody's; interpret mode would call it a race.
    stride = WG_ROWS if cores.interpret else few
    pieces, own_pieces = width // PIECE[0] * num_slabs, half // PIECE[0] * num_slabs
    exchange = tiling.exchange(width, few, cores.interpret) if splits > 1 else None

    def kernel(*refs, x_smem, u_smem, v_smem, p_smem, y_smem, u_bars, v_bars, **scratch):
        x_ref, u_ref, v_ref, *rest = refs
        bias_ref: Any = rest.pop(0) if has_bias else None
        y_ref, *rest = rest
        ring, v_ring = Ring(u_bars, tiling.stages), Ring(v_bars, tiling.v_stages)
        j, wg = lax.axis_index("item"), lax.axis_index("wg")
        split = lax.axis_index("cluster") if splits > 1 else jnp.int32(0)
        first = lax.div(split * num_in, jnp.int32(splits))
        count = lax.div((split + 1) * num_in, jnp.int32(splits)) - first  # one at least
        slab = pl.ds(split * 0, SLAB)  # copies end beyond an array if nobody can know that they do

        def x_rows(slot, begin, count):
            return x_smem.at[pl.ds(slot * stride + begin, count)]

        @copying(wg, teams=1, registers=registers)
        def copy_tiles(_):
            def fetch(n, _):
                """Has a tile's factors brought to the cache."""
                high = math.gcd(size, 256)  # a copy's most
                for begin in range(0, size, high):
                    plgpu.async_prefetch(u_ref.at[first + n, pl.ds(begin, high), j])
                for w in range(COMPUTE):
                    plgpu.async_prefetch(v_ref.at[j, first + n, :, pl.ds(w * half, half)])

            def fill(n, _):
                for chunk in range(chunks):
                    step, inner = n * chunks + chunk, pl.ds(chunk * DEPTH, DEPTH)
                    slot = ring.slot(step)
                    ring.reserve(step)
                    depth = pl.ds((first + n) * size + chunk * DEPTH, DEPTH)
                    part = u_ref.at[first + n, inner, j]
                    plgpu.copy_gmem_to_smem(part, u_smem.at[slot], ring.filled.at[slot])
                    for i in range(num_slabs):
                        part, goal = x_ref.at[i, slab, depth], x_rows(slot, i * SLAB, SLAB)
                        plgpu.copy_gmem_to_smem(part, goal, ring.filled.at[slot])
                slot = v_ring.slot(n)
                v_ring.reserve(n)
                for w in range(COMPUTE):
                    part = v_ref.at[j, first + n, :, pl.ds(w * half, half)]
                    plgpu.copy_gmem_to_smem(part, v_smem.at[slot, w], v_ring.filled.at[slot])

            soon = jnp.minimum(count, EARLY)
            cores.begin_early(lambda: lax.fori_loop(0, soon, fetch, None))
            lax.fori_loop(0, count, fill, None)
            ring.drain(count * chunks)
            v_ring.drain(count)

        @pl.when(wg < COMPUTE)
        def multiply():
            if registers:
                plgpu.set_max_registers(232, action="increase")
            cores.begin_early()
            room = Room(outputs=tuple(rest), **scratch)

            def hidden(n):
                """`x u` of a tile."""

                def operands(k):
                    step = n * chunks + k
                    ring.wait(step)
                    return x_rows(ring.slot(step), 0, WG_ROWS), u_smem.at[ring.slot(step)]

                release = lambda k: ring.release(n * chunks + k)
                return cores.sum_beside((WG_ROWS, rank), chunks, operands, release, lambda: None)

            def sums(acc):
                def tile(n, _):
                    p = hidden(n).astype(x.dtype)
                    plgpu.commit_smem()  # all warps are done with the last one
                    p_smem.at[wg][...] = p
                    plgpu.commit_smem()
                    v_ring.wait(n)
                    own = v_smem.at[v_ring.slot(n), wg].transpose((1, 0))
                    plgpu.wgmma(acc, own, p_smem.at[wg, pl.ds(0, few)].transpose((1, 0)))
                    plgpu.wgmma_wait(0)
                    cores.release(v_ring, n)

                lax.fori_loop(0, count, tile, None)
                return acc[...]

            def place_of(piece):
                """The columns of y, and the slab, that a piece is of."""
                column = lax.div(piece, jnp.int32(num_slabs))
                place = pl.ds(j * width + column * PIECE[0], PIECE[0])
                return place, piece - column * num_slabs

            def bias_of(piece):
                place, _ = place_of(piece)
                return plgpu.load(bias_ref.at[place], layout=ROW, optimized=False)

            def finish(total, piece, bias):
                """Writes the columns and rows of y that are a piece, given their sums."""
                if has_bias:
                    bias = bias_of(piece) if bias is None else bias
                    total = total + per_row(bias.astype(jnp.float32), PIECE)
                total = total if activation is None else activation(total)
                y_smem.at[wg].transpose((1, 0))[...] = total.astype(x.dtype)
                plgpu.commit_smem()
                place, i = place_of(piece)
                plgpu.copy_smem_to_gmem(y_smem.at[wg], y_ref.at[i, slab, place])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            def part(value, n):
                column, row = n // num_slabs * PIECE[0], n % num_slabs * SLAB
                return value[column : column + PIECE[0], row : row + SLAB]

            computed = [wg * own_pieces + n for n in range(own_pieces)]
            slots = range(0 if exchange is None else -(-exchange.slots // COMPUTE))
            slots = [wg + COMPUTE * n for n in slots]  # of this block, to its warpgroups in turn
            mine = computed if exchange is None else [slot * splits + split for slot in slots]
            last = jnp.int32(pieces - 1)
            early = has_bias and not registers  # or there are none to keep it in
            biases = [bias_of(jnp.minimum(n, last)) if early else None for n in mine]
            value = pl.run_scoped(sums, ACC((half, few), jnp.float32))
            if exchange is None:
                for n, (piece, bias) in enumerate(zip(mine, biases, strict=True)):
                    finish(part(value, n), piece, bias)
                return
            for n, piece in enumerate(computed):
                slot = lax.div(piece, jnp.int32(splits))
                room.send(part(value, n), piece - slot * splits, slot)
            room.meet()
            read = lambda ref: plgpu.load(ref, layout=MATRIX, optimized=False)
            for slot, piece, bias in zip(slots, mine, biases, strict=True):

                @pl.when(piece <= last)
                def _(slot=slot, piece=piece, bias=bias):
                    finish(room.total(slot, read), piece, bias)

    out_type = (jax.ShapeDtypeStruct((*x.shape[:2], num_out * width), x.dtype),)
    scratch = {}
    if exchange is not None:
        out_type, scratch = out_type + exchange.outputs(num_out), exchange.scratch()
    return launch(
        kernel, "tsvd_split", num_out, out_type, interpret, cluster=splits, teams=1,
        x_smem=lined(((tiling.stages - 1) * stride + WG_ROWS, DEPTH), x.dtype, rank),
        u_smem=lined((tiling.stages, DEPTH, rank), x.dtype, rank),
        v_smem=lined((tiling.v_stages, COMPUTE, rank, half), x.dtype, rank),
        p_smem=lined((COMPUTE, WG_ROWS, rank), x.dtype, rank),
        y_smem=plgpu.SMEM((COMPUTE, *reversed(PIECE)), x.dtype),
        u_bars=Ring.barriers(tiling.stages, num_slabs + 1),
        v_bars=Ring.barriers(tiling.v_stages, COMPUTE),
        **scratch,
    )  # fmt: skip
