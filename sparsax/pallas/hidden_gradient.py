"""The gradient of the hidden units of the routed layer, in one pass over what it is made of.

A thread block owns rows and walks over columns. What it computes of a tile replaces it in shared
memory and leaves from there, so that all of the rest can be tiles on their way.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsax.pallas.activations import value_and_slope
from sparsax.pallas.hopper import (
    COMPUTE,
    MATRIX,
    ROW,
    ROWS,
    WG_ROWS,
    Ring,
    copying,
    folded,
    launch,
    multiprocessors,
    padded_rows,
    per_row,
    shared,
    zeros,
)

WIDTH = 64  # columns of a tile: a line of shared memory
TILE = (WG_ROWS, WIDTH)
SPACE = 12  # row tiles of 16 KiB in shared memory
START = 2  # steps that a thread block could have made until its first tiles arrive; a guess


@functools.partial(jax.jit, static_argnames=("activation", "needs_hidden", "interpret"))
def hidden_gradient(zs, dh, c, *, activation: str, needs_hidden: bool = True, interpret=None):
    """`(c * h, gradients of zs, gradient of c)` for `h = activation(z)` times c `[M, 1]`.

    zs are one z, or z and a gate `[M, E]`: `h = activation(gate) * z`; dh `[M, E]` is the gradient
    of c * h, E a multiple of 64. The gradient of c is `[M]`, float32; h is rounded to the dtype of
    the others, also where it is a factor. Unless it is needed, c * h is None.
    """
    rows, columns = dh.shape
    operands = [padded_rows(x) for x in (*zs, dh)]
    tiles = -(-len(operands[0]) // ROWS)
    c = jnp.pad(c.reshape(-1), (0, tiles * ROWS - rows))
    parts = split(tiles, columns // WIDTH)
    run = _kernel(operands, parts, activation, needs_hidden, interpret)
    *found, dc = run(*operands, c)
    found = [x[:rows] for x in found]
    c_h = found.pop() if needs_hidden else None
    return c_h, found, dc.sum(0)[:rows]


def split(tiles: int, steps: int) -> int:
    """Into how many parts to cut the columns of so many row tiles, for even work."""

    def cost(parts):
        rounds = -(-tiles * parts // multiprocessors())
        return rounds * (steps // parts + START)

    return min((n for n in (1, 2, 4, 8) if steps % n == 0), key=cost)


def _kernel(operands, parts: int, activation: str, needs_hidden: bool, interpret):
    """A function of `(*zs, dh, c)`: gradients of zs, c * h if needed, parts of c's `[parts, M]`."""
    dh, many = operands[-1], len(operands)
    (rows, columns), dtype = dh.shape, dh.dtype
    tiles, steps = -(-rows // ROWS), columns // WIDTH // parts
    stages = SPACE // many

    def kernel(*refs, smem, dc_smem, bars):
        sources, c_ref, (*goals, dc_ref) = refs[:many], refs[many], refs[many + 1 :]
        item, wg, ring = lax.axis_index("item"), lax.axis_index("wg"), Ring(bars, stages)
        tile, part = lax.div(item, jnp.int32(parts)), lax.rem(item, jnp.int32(parts))
        rows_of = lambda half: pl.ds((tile * COMPUTE + half) * WG_ROWS, WG_ROWS)
        columns_of = lambda step: pl.ds((part * steps + step) * WIDTH, WIDTH)

        @copying(wg)
        def copy_tiles():
            def fill(step, _):
                slot = ring.slot(step)
                ring.reserve(step)
                for i, source in enumerate(sources):
                    for half in range(COMPUTE):
                        plgpu.copy_gmem_to_smem(
                            source.at[rows_of(half), columns_of(step)], smem.at[slot, i, half],
                            ring.filled.at[slot],
                        )  # fmt: skip

            lax.fori_loop(0, steps, fill, None)
            ring.drain(jnp.int32(steps))

        @pl.when(wg < COMPUTE)
        def compute():
            plgpu.set_max_registers(232, action="increase")
            c = plgpu.load(c_ref.at[rows_of(wg)], layout=ROW, optimized=False)

            def step(i, total):
                ring.wait(i)
                slot = ring.slot(i)
                tiles = [smem.at[slot, n, wg] for n in range(many)]
                *zs, dh = (plgpu.load(x, layout=MATRIX).astype(jnp.float32) for x in tiles)
                found, products = _gradients(zs, dh, per_row(c, TILE), activation, dtype)
                for x, goal in zip(found[: len(goals)], tiles, strict=False):
                    goal[...] = x.astype(dtype)
                plgpu.commit_smem()

                @pl.when((tile * COMPUTE + wg) * WG_ROWS < rows)
                def _():
                    for x, goal in zip(tiles, goals, strict=False):
                        at = goal.at[rows_of(wg), columns_of(i)]
                        plgpu.copy_smem_to_gmem(x, at, commit_group=False)
                    plgpu.commit_smem_to_gmem_group()

                # The copies of the step before have read their slot, if there are any.
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                pl.when(i > 0)(lambda: ring.release(i - 1))
                # Each thread keeps sums of its own, or every tile would wait for their exchange.
                return total + folded(jnp.add, products, 8)

            total = lax.fori_loop(0, steps, step, zeros((WG_ROWS, 8), MATRIX))
            dc_smem.at[wg][...] = total.sum(axis=1)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(dc_smem.at[wg], dc_ref.at[part, rows_of(wg)])
            plgpu.wait_smem_to_gmem(0)
            ring.release(steps - 1)

    like = jax.ShapeDtypeStruct(dh.shape, dtype)
    return launch(
        kernel, "hidden_gradient", tiles * parts,
        (
            *[like] * (many - 1 + needs_hidden),
            jax.ShapeDtypeStruct((parts, tiles * ROWS), jnp.float32),
        ),
        interpret,
        smem=shared((stages, many, COMPUTE, *TILE), dtype),
        dc_smem=plgpu.SMEM((COMPUTE, WG_ROWS), jnp.float32),
        bars=Ring.barriers(stages, many * COMPUTE),
    )  # fmt: skip


def _gradients(zs, dh, c, activation: str, dtype):
    """`([*gradients of zs, c * h], h * dh)` of a tile, float32."""
    up, *gate = zs
    value, slope = value_and_slope(activation, gate[0] if gate else up)
    h = (value * up if gate else value).astype(dtype).astype(jnp.float32)
    scaled = c * dh
    dzs = [scaled * value, scaled * up * slope] if gate else [scaled * slope]
    return [*dzs, c * h], h * dh
