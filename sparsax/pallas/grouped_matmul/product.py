"""The kernel of both products: thread blocks walk over tiles of the result.

One warpgroup copies tiles of both operands to a ring in shared memory, running ahead into the next
tile of the result while two others, 64 rows each, finish the current one.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsax.pallas.grouped_matmul.tables import DEPTH
from sparsax.pallas.hopper import (
    COMPUTE,
    WG_ROWS,
    Ring,
    TensorCores,
    copying,
    launch,
    multiprocessors,
    tiled,
)

STAGES = 4  # 48 KiB each for 256 columns
CHUNK = 64  # columns that leave for global memory at once: a line of shared memory
CHUNKS = 2  # of them on their way
BAND = 16  # row tiles that share columns in the L2 cache, as thread blocks run side by side


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static part of a product: its operands' tiles, `rows x DEPTH` and `DEPTH x width`."""

    width: int
    dtype: Any
    matrices: int = 1  # b that meet the same a, each with a sum of its own
    transpose_a: bool = False  # tiles of a arrive as `DEPTH x rows`
    transpose_b: bool = False  # tiles of b arrive as `width x DEPTH`
    chunk: int = CHUNK  # columns of the result that leave at once, at most CHUNK
    cluster: int = 1  # thread blocks that walk side by side and may share their copies
    stages: int | None = None  # slots of the ring; STAGES when None
    steps: int | None = None  # of every tile, where all have as many and one matrix


class Plan(NamedTuple):
    """What is multiplied, as functions that run in the kernel."""

    count: Any  # tiles of the result
    item: Callable[[Any], Any]  # what there is to know of a tile; `.steps` at least
    fill: Callable[..., None]  # `(item, step, a, b, barrier)`: COMPUTE + matrices copies
    finish: Callable[..., jax.Array]  # `(item, sums of all matrices)`: the tile of the result
    store: Callable[..., None]  # `(item, warpgroup, tile, staging)`
    idle: Callable[..., Any] | None = None  # `(item, warpgroup)`: whether it has nothing to store


def width_of(columns: int, matrices: int = 1) -> int:
    """Columns of a tile: so many that the sums of all matrices fit into the registers."""
    return next(w for w in (256, 128, 64) if columns % w == 0 and matrices * w <= 256)


def side_by_side(tiles: int) -> int:
    """How many thread blocks take neighbouring ones of so many tiles, and share what both read.

    With tiles of 256 columns they read a sixth less from the cache where they share rows of 128, a
    third where they share the columns.
    """
    return 2 if tiles % 2 == 0 else 1


def beside(cluster: int) -> Any:
    """Which of a cluster's thread blocks this is."""
    return lax.axis_index("cluster") if cluster > 1 else 0


def together(cluster: int) -> dict[str, Any]:
    """How to copy what the thread blocks of a cluster share: each brings its part to all."""
    return {"collective_axes": "cluster"} if cluster > 1 else {}


def raster(n, rows, columns: int) -> tuple[Any, Any]:
    """Row and column of tile n, in bands of rows: neighbours share both operands."""
    band = n // (BAND * columns)
    inner = n - band * BAND * columns
    high = jnp.minimum(rows - band * BAND, BAND)
    if isinstance(rows, int):  # divisors that are known make a multiplication of a division
        rest = rows % BAND or BAND
        column = jnp.where(high == BAND, inner // BAND, inner // rest)
    else:
        column = inner // high
    return band * BAND + inner - column * high, column


def product(make: Callable[..., Plan], shape: Shape, name: str, most: int, out_type, interpret):
    """The kernel `make(*refs)` describes, as a function of its operands; `most` tiles at most."""
    thread_blocks = min(most, multiprocessors() // shape.cluster)
    stages = shape.stages or STAGES
    assert shape.steps is None or stages >= 3, "sum_beside would wait for itself"
    cores = TensorCores(interpret is not None)

    def kernel(*refs, a_smem, b_smem, y_smem, bars):
        plan, ring = make(*refs), Ring(bars, stages)
        block, wg = lax.axis_index("item"), lax.axis_index("wg")
        rounds = (plan.count - block + thread_blocks - 1) // thread_blocks

        def read(r):
            return plan.item(jnp.minimum(block + r * thread_blocks, plan.count - 1))

        def each_item(visit):
            """`visit(item, steps before it)` for the block's tiles, each read one ahead."""

            def go(r, state):
                here, begin = state
                coming = read(r + 1)
                visit(here, begin)
                return coming, begin + here.steps

            return lax.fori_loop(0, rounds, go, (read(0), jnp.int32(0)))[1]

        @copying(wg, teams=1)
        def copy_tiles(_):
            def copy(here, begin):
                def fill(i, _):
                    slot = ring.slot(begin + i)
                    ring.reserve(begin + i)
                    plan.fill(here, i, a_smem.at[slot], b_smem.at[slot], ring.filled.at[slot])

                lax.fori_loop(0, here.steps, fill, None)

            ring.drain(each_item(copy))

        def operands_since(begin):
            def operands(i):
                ring.wait(begin + i)
                slot = ring.slot(begin + i)
                turn = lambda ref, wanted: ref.transpose((1, 0)) if wanted else ref
                bs = [b_smem.at[slot, i] for i in range(shape.matrices)]
                return (
                    turn(a_smem.at[slot, wg], shape.transpose_a),
                    [turn(b, shape.transpose_b) for b in bs],
                )

            return operands, lambda i: ring.release(begin + i)

        def add_up(here, begin):
            def multiply():
                totals = cores.sums(
                    (WG_ROWS, shape.width), shape.matrices, here.steps, *operands_since(begin)
                )
                plan.store(here, wg, plan.finish(here, totals), y_smem.at[wg])

            def skip():  # the products of the other one have the tensor cores
                def one(i, _):
                    ring.wait(begin + i)
                    plgpu.commit_smem()  # gathers the warps, which no product does here
                    ring.release(begin + i)

                lax.fori_loop(0, here.steps, one, None)

            if plan.idle is None:
                multiply()
            else:
                lax.cond(plan.idle(here, wg), skip, multiply)

        def add_up_beside(steps):
            """Stores a tile beside the products of the next: short sums would else wait for it."""

            def add(here, r, meanwhile):
                operands, release = operands_since(r * steps)
                one = lambda i: (lambda a, bs: (a, bs[0]))(*operands(i))
                total = cores.sum_beside((WG_ROWS, shape.width), steps, one, release, meanwhile)
                return plan.finish(here, [total]).astype(shape.dtype)

            def store(here, tile):
                plan.store(here, wg, tile, y_smem.at[wg])

            def go(r, state):
                coming = read(r)
                return coming, add(coming, r, lambda: store(*state))

            first = read(0)
            store(*lax.fori_loop(1, rounds, go, (first, add(first, jnp.int32(0), lambda: None))))

        @pl.when(wg < COMPUTE)
        def multiply():
            plgpu.set_max_registers(232, action="increase")
            if shape.steps is None:
                each_item(add_up)
            else:
                add_up_beside(shape.steps)
            plgpu.wait_smem_to_gmem(0)

    b_tile = (shape.width, DEPTH) if shape.transpose_b else (DEPTH, shape.width)
    lined = lambda *sizes: tiled(sizes, shape.dtype, DEPTH, 2 * DEPTH)
    return launch(
        kernel, name, thread_blocks, out_type, interpret, cluster=shape.cluster, teams=1,
        a_smem=lined(stages, COMPUTE, WG_ROWS, DEPTH),
        b_smem=lined(stages, shape.matrices, *b_tile),
        y_smem=tiled(
            (COMPUTE, CHUNKS * CHUNK // shape.chunk, WG_ROWS, shape.chunk), shape.dtype,
            shape.chunk, 2 * shape.chunk,
        ),
        bars=Ring.barriers(stages, COMPUTE + shape.matrices, shape.cluster),
    )  # fmt: skip


def each_chunk(
    total: jax.Array,
    staging,
    dtype,
    copy: Callable[[Any, int], None],
    finish: Callable[[jax.Array, int], jax.Array] = lambda part, begin: part,
) -> None:
    """`copy(chunk in shared memory, its first column)` for all columns of a tile, in turn.

    `finish(part of the tile, its first column)` makes what is copied, where registers are too few
    to do so for all columns at once.
    """
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last tile's, long ago
    slots, _, width = staging.shape
    for number, begin in enumerate(range(0, total.shape[1], width)):
        chunk = staging.at[number % slots]
        if number >= slots:
            # Waiting for all but the last copies suffices: a chunk makes one copy at least, or none
            # of this tile's chunks makes any.
            plgpu.wait_smem_to_gmem(slots - 1, wait_read_only=True)
        chunk[...] = finish(total[:, begin : begin + width], begin).astype(dtype)
        plgpu.commit_smem()
        copy(chunk, begin)
