"""The fused product with tiled factors: `x u` never leaves the registers.

The factors of tile (i, j) serve output column j alone, so a thread block that owns rows and a
column of tiles walks over i, `p = x_i u_ij`, `y_j += p v_ij`, and computes nothing twice: flash
attention without the softmax. The price is that x is read once for every column of tiles; a cluster
of thread blocks with the same rows shares these copies.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsax.pallas.activations import ACTIVATIONS
from sparsax.pallas.grouped_matmul.product import CHUNK, CHUNKS, each_chunk
from sparsax.pallas.hopper import (
    ACC,
    COL,
    COMPUTE,
    MATRIX,
    ROWS,
    SHARED_BYTES,
    WG_ROWS,
    Ring,
    TensorCores,
    copying,
    launch,
    padded_rows,
    per_col,
    shared,
    tiled,
    zeros,
)

RANKS = (32, 64, 96, 128)
WIDTHS = (64, 128, 256)
V_STAGES = 2


@dataclasses.dataclass(frozen=True)
class Tiling:
    """What a thread block holds: `depth` rows of u at a time, and a tile of v and y.

    `cluster` thread blocks share copies of x.
    """

    depth: int
    stages: int
    cluster: int = 1

    @staticmethod
    def of(u, v) -> "Tiling | None":
        """The tiling for factors of such shapes, or None where the kernel has none.

        Wider tiles would have to be cut, and `x u` computed again for each piece.
        """
        (_, size, num_out, rank), columns = u.shape, v.shape[3]
        if rank not in RANKS or columns not in WIDTHS:
            return None
        cluster = next(c for c in (4, 2, 1) if num_out % c == 0)
        # Long steps wait less often, but there must be some to come.
        choices = ((128, 4), (128, 3), (64, 4), (64, 3), (64, 2))
        tilings = (Tiling(depth, n, cluster) for depth, n in choices if size % depth == 0)
        return next((t for t in tilings if t.bytes(rank, columns) <= SHARED_BYTES), None)

    def bytes(self, rank: int, columns: int) -> int:
        """What a thread block needs of shared memory for 16-bit arrays, barriers apart."""
        steps = self.stages * self.depth * (ROWS + rank)
        return 2 * (steps + V_STAGES * rank * columns + CHUNKS * ROWS * CHUNK)


def forward(x, u, v, bias, *, activation: str | None, interpret=None, tiling: Tiling | None = None):
    """`activation(x w + bias)` `[M, J*C]`, w given by the factors of its tiles."""
    tiling = tiling or Tiling.of(u, v)
    assert tiling is not None
    rows, apply = x.shape[0], ACTIVATIONS.get(activation or "")
    x = padded_rows(x)
    operands = (x, u, v) if bias is None else (x, u, v, bias.astype(jnp.float32))
    (y,) = _kernel(x, u, v, bias is not None, apply, tiling, interpret)(*operands)
    return y[:rows]


def _kernel(x, u, v, has_bias: bool, activation, tiling: Tiling, interpret):
    """A function of `(x, u, v, [bias])` that returns `y [M, J*C]`, for arrays of these shapes."""
    (num_in, size, num_out, rank), width = u.shape, v.shape[3]
    depth, stages, cluster = tiling.depth, tiling.stages, tiling.cluster
    chunks, cores = size // depth, TensorCores(interpret is not None)
    row_tiles, wide = -(-x.shape[0] // ROWS), num_out // cluster  # clusters beside each other
    together: dict[str, Any] = {"collective_axes": "cluster"} if cluster > 1 else {}

    def kernel(*refs, x_smem, u_smem, v_smem, y_smem, u_bars, v_bars):
        x_ref, u_ref, v_ref, *rest = refs
        bias_ref = rest.pop(0) if has_bias else None
        (y_ref,) = rest
        ring, v_ring = Ring(u_bars, stages), Ring(v_bars, V_STAGES)
        item, wg = lax.axis_index("item"), lax.axis_index("wg")
        first_row, j = item // wide * ROWS, lax.rem(item, jnp.int32(wide)) * cluster
        if cluster > 1:
            j += lax.axis_index("cluster")

        @copying(wg)
        def copy_tiles():
            def fill(i, _):
                for chunk in range(chunks):
                    step = i * chunks + chunk
                    slot, inner = ring.slot(step), chunk * depth
                    ring.reserve(step)
                    for half in range(COMPUTE):
                        rows = pl.ds(first_row + half * WG_ROWS, WG_ROWS)
                        part = x_ref.at[rows, pl.ds(i * size + inner, depth)]
                        goal = x_smem.at[slot, half]
                        plgpu.copy_gmem_to_smem(part, goal, ring.filled.at[slot], **together)
                    part = u_ref.at[i, pl.ds(inner, depth), j]
                    plgpu.copy_gmem_to_smem(part, u_smem.at[slot], ring.filled.at[slot])
                slot = v_ring.slot(i)
                v_ring.reserve(i)
                plgpu.copy_gmem_to_smem(v_ref.at[j, i], v_smem.at[slot], v_ring.filled.at[slot])

            lax.fori_loop(0, num_in, fill, None)
            ring.drain(jnp.int32(num_in * chunks))
            v_ring.drain(jnp.int32(num_in))

        @pl.when(wg < COMPUTE)
        def multiply():
            plgpu.set_max_registers(232, action="increase")

            def hidden_tiles(step):
                ring.wait(step)
                return x_smem.at[ring.slot(step), wg], u_smem.at[ring.slot(step)]

            def v_tile(i):
                v_ring.wait(i)
                return v_smem.at[v_ring.slot(i)]

            def hidden(i):
                """`x_i u_ij`, when nothing else is in flight."""
                p = zeros((WG_ROWS, rank), MATRIX)
                for chunk in range(chunks):
                    p = cores.start([(p, *hidden_tiles(i * chunks + chunk))], lambda get: get())
                    cores.release(ring, i * chunks + chunk)
                return p

            def output(acc, p, i):
                acc = cores.start([(acc, p, v_tile(i))], lambda get: get())
                cores.release(v_ring, i)
                return acc

            def advance(i, carry):
                """Adds `p v` of tile i - 1 while `x_i u_ij` is on its way."""
                acc, p = carry
                if cores.interpret:
                    acc = output(acc, p, i - 1)
                    return acc, hidden(i).astype(x.dtype)

                def run(hidden_acc, y_acc):
                    y_acc[...] = acc
                    plgpu.wgmma(y_acc, p, v_tile(i - 1))
                    for chunk in range(chunks):
                        step = i * chunks + chunk
                        plgpu.wgmma(hidden_acc, *hidden_tiles(step))
                        plgpu.wgmma_wait(1)  # done: all but the product just started
                        previous = (v_ring, i - 1) if chunk == 0 else (ring, step - 1)
                        cores.release(*previous)
                    new = plgpu.wgmma_accumulator_load(hidden_acc, wait_n=0)
                    cores.release(ring, i * chunks + chunks - 1)
                    return plgpu.wgmma_accumulator_load(y_acc, wait_n=0), new.astype(x.dtype)

                hidden_acc = ACC((WG_ROWS, rank), jnp.float32)
                return pl.run_scoped(run, hidden_acc, ACC((WG_ROWS, width), jnp.float32))

            carry = zeros((WG_ROWS, width), MATRIX), hidden(jnp.int32(0)).astype(x.dtype)
            acc, p = lax.fori_loop(1, num_in, advance, carry)
            acc = output(acc, p, jnp.int32(num_in - 1))

            begin = j * width
            if bias_ref is not None:
                row = plgpu.load(bias_ref.at[pl.ds(begin, width)], layout=COL, optimized=False)
                acc = acc + per_col(row, acc.shape)
            acc = acc if activation is None else activation(acc)
            rows = pl.ds(first_row + wg * WG_ROWS, WG_ROWS)

            def copy(chunk, at):
                plgpu.copy_smem_to_gmem(chunk, y_ref.at[rows, pl.ds(begin + at, CHUNK)])

            each_chunk(acc, y_smem.at[wg], x.dtype, copy)
            plgpu.wait_smem_to_gmem(0)

    return launch(
        kernel, "tsvd_fused", row_tiles * wide,
        (jax.ShapeDtypeStruct((x.shape[0], num_out * width), x.dtype),), interpret,
        cluster=cluster,
        x_smem=lined((stages, COMPUTE, WG_ROWS, depth), x.dtype, rank),
        u_smem=lined((stages, depth, rank), x.dtype, rank),
        v_smem=lined((V_STAGES, rank, width), x.dtype, rank if width < 256 else 32),
        y_smem=shared((COMPUTE, CHUNKS, WG_ROWS, CHUNK), x.dtype),
        u_bars=Ring.barriers(stages, COMPUTE + 1, cluster),
        v_bars=Ring.barriers(V_STAGES, 1),
    )  # fmt: skip


def lined(shape, dtype, rank: int) -> Any:
    """Shared memory for factors and x, in lines as long as the rank admits.

    A matrix instruction wants lines of one length in both operands, which divides what is summed.
    """
    columns = math.gcd(rank, 64)
    return tiled(shape, dtype, columns, columns * jnp.dtype(dtype).itemsize)
