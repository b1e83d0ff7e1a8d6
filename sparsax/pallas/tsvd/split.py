"""Few rows times tiled factors: the factors are read once, by as many thread blocks as there are.

A step of decoding takes as long as its weights take to arrive. A thread block owns a column of
tiles and a share of the tiles in it, and has all it will read on the way from the start, where two
products would wait for each other. What it adds up is a part of y, in float32; the parts are added
in order, outside.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsax.pallas.activations import ACTIVATIONS
from sparsax.pallas.grouped_matmul.product import CHUNK, each_chunk
from sparsax.pallas.hopper import (
    COMPUTE,
    MATRIX,
    SHARED_BYTES,
    WG_ROWS,
    Ring,
    TensorCores,
    copying,
    launch,
    multiprocessors,
    shared,
    zeros,
)
from sparsax.pallas.tsvd.fused import lined

ROWS = WG_ROWS  # the most
RANK = 128  # the largest
WIDTHS = (128, 256, 512)  # of a tile; each warpgroup has half of its columns
DEPTH = 64


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Slots for `DEPTH` rows of u, and for tiles of v."""

    stages: int
    v_stages: int

    @staticmethod
    def of(u, v) -> "Tiling | None":
        """The tiling for factors of such shapes, or None where the kernel has none."""
        (_, size, _, rank), width = u.shape, v.shape[3]
        if rank % 16 or rank > RANK or width not in WIDTHS or size % DEPTH:
            return None
        tilings = (Tiling(stages, n) for n in (2, 1) for stages in (6, 4, 3, 2))
        return next((t for t in tilings if t.bytes(rank, width) <= SHARED_BYTES), None)

    def bytes(self, rank: int, width: int) -> int:
        """What a thread block needs of shared memory for 16-bit arrays, barriers apart."""
        steps = self.stages * DEPTH * (WG_ROWS + rank)
        return 2 * (steps + self.v_stages * rank * width) + 4 * COMPUTE * WG_ROWS * CHUNK


def forward(x, u, v, bias, *, activation: str | None, interpret=None):
    """`activation(x w + bias)` `[M, J*C]`, w given by the factors of its tiles; M at most 64."""
    rows = x.shape[0]
    assert rows <= ROWS
    x = jnp.pad(x, ((0, -rows % 8), (0, 0)))  # copies take slabs of 8 rows
    (parts,) = _kernel(x, u, v, interpret)(x, u, v)
    y = parts.sum(0)[:rows]
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return (y if activation is None else ACTIVATIONS[activation](y)).astype(x.dtype)


def _kernel(x, u, v, interpret):
    """A function of `(x, u, v)` that returns parts of the product `[S, M, J*C]`, float32."""
    tiling = Tiling.of(u, v)
    assert tiling is not None
    (num_in, size, num_out, rank), width, few = u.shape, v.shape[3], x.shape[0]
    half, chunks, cores = width // COMPUTE, size // DEPTH, TensorCores(interpret is not None)
    v_lines = rank if half < 256 else math.gcd(rank, 32)
    splits = max(1, min(num_in, multiprocessors() // num_out))

    def kernel(x_ref, u_ref, v_ref, y_ref, *, x_smem, u_smem, v_smem, y_smem, u_bars, v_bars):
        ring, v_ring = Ring(u_bars, tiling.stages), Ring(v_bars, tiling.v_stages)
        item, wg = lax.axis_index("item"), lax.axis_index("wg")
        split, j = item // num_out, lax.rem(item, jnp.int32(num_out))
        first = lax.div(split * num_in, jnp.int32(splits))
        count = lax.div((split + 1) * num_in, jnp.int32(splits)) - first  # one at least

        @copying(wg)
        def copy_tiles():
            def fill(n, _):
                for chunk in range(chunks):
                    step, inner = n * chunks + chunk, pl.ds(chunk * DEPTH, DEPTH)
                    slot = ring.slot(step)
                    ring.reserve(step)
                    own = x_ref.at[:, pl.ds((first + n) * size + chunk * DEPTH, DEPTH)]
                    goal = x_smem.at[slot, pl.ds(0, few)]
                    plgpu.copy_gmem_to_smem(own, goal, ring.filled.at[slot])
                    part = u_ref.at[first + n, inner, j]
                    plgpu.copy_gmem_to_smem(part, u_smem.at[slot], ring.filled.at[slot])
                slot = v_ring.slot(n)
                v_ring.reserve(n)
                for w in range(COMPUTE):
                    part = v_ref.at[j, first + n, :, pl.ds(w * half, half)]
                    plgpu.copy_gmem_to_smem(part, v_smem.at[slot, w], v_ring.filled.at[slot])

            lax.fori_loop(0, count, fill, None)
            ring.drain(count * chunks)
            v_ring.drain(count)

        @pl.when(wg < COMPUTE)
        def multiply():
            plgpu.set_max_registers(232, action="increase")

            def tile(n, acc):
                p = zeros((WG_ROWS, rank), MATRIX)
                for chunk in range(chunks):
                    step = n * chunks + chunk
                    ring.wait(step)
                    operands = x_smem.at[ring.slot(step)], u_smem.at[ring.slot(step)]
                    p = cores.start([(p, *operands)], lambda get: get())
                    cores.release(ring, step)
                v_ring.wait(n)
                own = v_smem.at[v_ring.slot(n), wg]
                acc = cores.start([(acc, p.astype(x.dtype), own)], lambda get: get())
                cores.release(v_ring, n)
                return acc

            acc = lax.fori_loop(0, count, tile, zeros((WG_ROWS, half), MATRIX))

            def copy(chunk, at):
                place = pl.ds(j * width + wg * half + at, CHUNK)
                plgpu.copy_smem_to_gmem(chunk.at[pl.ds(0, few)], y_ref.at[split, :, place])

            each_chunk(acc, y_smem.at[wg], jnp.float32, copy)
            plgpu.wait_smem_to_gmem(0)

    return launch(
        kernel, "tsvd_split", splits * num_out,
        (jax.ShapeDtypeStruct((splits, few, num_out * width), jnp.float32),), interpret,
        x_smem=lined((tiling.stages, WG_ROWS, DEPTH), x.dtype, rank),
        u_smem=lined((tiling.stages, DEPTH, rank), x.dtype, rank),
        v_smem=lined((tiling.v_stages, COMPUTE, rank, half), x.dtype, v_lines),
        y_smem=shared((COMPUTE, 1, WG_ROWS, CHUNK), jnp.float32),
        u_bars=Ring.barriers(tiling.stages, 2),
        v_bars=Ring.barriers(tiling.v_stages, COMPUTE),
    )  # fmt: skip
