"""The product with a common right factor, which stays in shared memory.

Thread blocks walk over tiles of the product of x and the tiles' own factors, as those of `products`
do. Such a tile never leaves: it waits in registers, its parts times the common factor are panels of
y, and these leave one by one between the steps of the next tile's sum. So nothing but y is written,
and the large product does not wait for the small one, nor for y to be written.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsax.pallas.activations import ACTIVATIONS
from sparsax.pallas.grouped_matmul.product import CHUNK, each_chunk, raster
from sparsax.pallas.grouped_matmul.tables import DEPTH
from sparsax.pallas.hopper import (
    ACC,
    COL,
    COMPUTE,
    ROWS,
    SHARED_BYTES,
    WG_ROWS,
    Ring,
    TensorCores,
    copying,
    launch,
    multiprocessors,
    padded_rows,
    per_col,
    tiled,
)
from sparsax.pallas.tsvd.fused import lined

# Columns of a tile of the first product: its sums, the tile before it, rounded, and a panel of y
# have registers together. Of 256 columns panels would leave beside nothing: no faster in a single
# run, of which no result is kept.
WIDTH = 128


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a thread block goes about it.

    `panel` columns of y leave at once: a line of shared memory, or two where steps are too few.
    Slots are worth more than what else shared memory is for, in single runs: that is why no second
    step is in flight, which would keep a slot longer, y is staged in one line, and thread blocks
    share no copies: they would wait for each other.
    """

    panel: int
    stages: int

    @staticmethod
    def of(tiles, common) -> "Tiling | None":
        """The tiling for factors of such shapes, or None where the kernel has none."""
        (inner, num_out, rank), columns = tiles.shape, common.shape[1]
        if rank % 16 or WIDTH % rank or num_out * rank < WIDTH or num_out * rank % DEPTH:
            return None
        if inner % DEPTH:
            return None
        steps = inner // DEPTH
        enough = lambda panel: columns % panel == 0 and steps >= WIDTH // rank * columns // panel
        tilings = (
            Tiling(panel, n) for panel in (CHUNK, 2 * CHUNK) if enough(panel) for n in (6, 5)
        )
        return next((t for t in tilings if t.bytes(rank, columns) <= SHARED_BYTES), None)

    def bytes(self, rank: int, columns: int) -> int:
        """What a thread block needs of shared memory for 16-bit arrays, barriers apart."""
        return 2 * (self.stages * DEPTH * (ROWS + WIDTH) + rank * columns + ROWS * CHUNK)


def items(rows: int, tiles) -> int:
    """How many tiles of the first product there are."""
    return -(-rows // ROWS) * -(-tiles.shape[1] * tiles.shape[2] // WIDTH)


def forward(x, tiles, common, bias, *, activation: str | None, interpret=None):
    """`activation(x w + bias)` `[M, J*C]` of tiles `[K, J, R]` and their common factor `[R, C]`."""
    rows, apply, tiling = len(x), ACTIVATIONS.get(activation or ""), Tiling.of(tiles, common)
    assert tiling is not None
    x = padded_rows(x)
    operands = [x, tiles.reshape(len(tiles), -1), common]
    operands += [] if bias is None else [bias.astype(jnp.float32)]
    (y,) = _kernel(x, tiles, common, bias is not None, apply, tiling, interpret)(*operands)
    return y[:rows]


def _kernel(x, tiles, common, has_bias: bool, activation, tiling: Tiling, interpret):
    """A function of `(x, tiles [K, J*R], common [R, C], [bias])` that returns `y [M, J*C]`."""
    (inner, num_out, rank), columns, rows = tiles.shape, common.shape[1], len(x)
    panel, stages = tiling.panel, tiling.stages
    cores = TensorCores(interpret is not None)
    steps, sides = inner // DEPTH, columns // panel
    many = WIDTH // rank  # tiles of w that a tile of the first product belongs to
    panels = many * sides  # of y, that it makes
    high, wide = -(-rows // ROWS), -(-num_out // many)
    thread_blocks = min(high * wide, multiprocessors())

    def kernel(*refs, x_smem, tiles_smem, common_smem, y_smem, bars, common_bar):
        x_ref, tiles_ref, common_ref, *rest = refs
        bias_ref = rest.pop(0) if has_bias else None
        (y_ref,) = rest
        ring = Ring(bars, stages)
        block, wg = lax.axis_index("item"), lax.axis_index("wg")
        rounds = (high * wide - block + thread_blocks - 1) // thread_blocks

        def place(r):
            """Rows, in those of a warpgroup, and columns of a round's tile."""
            row, column = raster(block + r * thread_blocks, high, wide)
            return row * COMPUTE, column

        @copying(wg, teams=1)
        def copy_tiles(_):
            for side in range(sides):
                source = common_ref.at[:, pl.ds(side * panel, panel)]
                plgpu.copy_gmem_to_smem(source, common_smem.at[side], common_bar)

            def copy(r, _):
                part, column = place(r)

                def fill(i, _):
                    step, depth = r * steps + i, pl.ds(i * DEPTH, DEPTH)
                    slot, filled = ring.slot(step), ring.filled.at[ring.slot(step)]
                    ring.reserve(step)
                    for half in range(COMPUTE):
                        own = x_ref.at[pl.ds((part + half) * WG_ROWS, WG_ROWS), depth]
                        plgpu.copy_gmem_to_smem(own, x_smem.at[slot, half], filled)
                    source = tiles_ref.at[depth, pl.ds(column * WIDTH, WIDTH)]
                    plgpu.copy_gmem_to_smem(source, tiles_smem.at[slot], filled)

                lax.fori_loop(0, steps, fill, None)

            lax.fori_loop(0, rounds, copy, None)
            ring.drain(rounds * steps)

        @pl.when(wg < COMPUTE)
        def multiply():
            plgpu.set_max_registers(232, action="increase")
            plgpu.barrier_wait(common_bar)

            def leave(here, tile, side, p, started, since: int):
                """A panel of y, as `TensorCores.start` has it beside what is started after it."""
                part, of_product = here
                own = of_product * many + tile
                there = ((part + wg) * WG_ROWS < rows) & (own < num_out)
                column = (jnp.minimum(own, num_out - 1) * sides + side) * panel

                def finish(y, at):
                    if bias_ref is not None:
                        at_columns = pl.ds(column + at, CHUNK)
                        row = plgpu.load(bias_ref.at[at_columns], layout=COL, optimized=False)
                        y = y + per_col(row, y.shape)
                    return y if activation is None else activation(y)

                def copy(chunk, at):
                    own_rows = pl.ds((part + wg) * WG_ROWS, WG_ROWS)
                    goal = y_ref.at[own_rows, pl.ds(column + at, CHUNK)]
                    pl.when(there)(lambda: plgpu.copy_smem_to_gmem(chunk, goal))

                product = [(None, p, common_smem.at[side])]
                y = cores.start(product, lambda get: get(since), started)
                each_chunk(y, y_smem.at[wg], x.dtype, copy, finish)

            def each_panel(waiting, visit):
                """`visit(tile, side, part of the product)` for the panels of what waits.

                In loops, for whose sake parts take turns at the head of the list: written out they
                would want more registers than there are.
                """

                def go(tile, parts):
                    lax.fori_loop(0, sides, lambda side, _: visit(tile, side, parts[0]), None)
                    return (*parts[1:], parts[0])

                lax.fori_loop(0, many, go, waiting)

            def operands(step):
                ring.wait(step)
                slot = ring.slot(step)
                return x_smem.at[slot, wg], tiles_smem.at[slot]

            def release(step):
                cores.release(ring, step)

            def total_beside(r, last):
                """The sum of a round's tile; the panels of the one before leave between its steps.

                One step is in flight beside the one that is waited for.
                """
                begin_of_round = r * steps

                def run(acc):
                    def start(i):
                        plgpu.wgmma(acc, *operands(begin_of_round + i))

                    def step(i, _):
                        start(i)
                        plgpu.wgmma_wait(1)
                        release(begin_of_round + i - 1)  # a panel's first step comes before

                    def visit(tile, side, p):
                        number = tile * sides + side
                        begin, end = (lax.div((number + n) * steps, panels) for n in range(2))
                        leave(last[0], tile, side, p, lambda: start(begin), 1)
                        pl.when(begin > 0)(lambda: release(begin_of_round + begin - 1))
                        lax.fori_loop(begin + 1, end, step, None)

                    each_panel(last[1], visit)
                    total = acc[...]
                    release(begin_of_round + steps - 1)
                    return total

                return pl.run_scoped(run, ACC((WG_ROWS, WIDTH), jnp.float32))

            def parts(total):
                """A tile of the product by the tiles of w that its columns belong to."""
                total = total.astype(x.dtype)
                return tuple(total[:, n * rank : (n + 1) * rank] for n in range(many))

            go = lambda r, last: (place(r), parts(total_beside(r, last)))
            first = cores.sum_beside((WG_ROWS, WIDTH), steps, operands, ring.release, lambda: None)
            last = lax.fori_loop(1, rounds, go, (place(jnp.int32(0)), parts(first)))
            alone = lambda tile, side, p: leave(last[0], tile, side, p, lambda: None, 0)
            each_panel(last[1], alone)
            plgpu.wait_smem_to_gmem(0)

    lines = lambda *sizes: tiled(sizes, x.dtype, CHUNK, 2 * CHUNK)
    return launch(
        kernel, "tsvd_shared", thread_blocks,
        (jax.ShapeDtypeStruct((rows, num_out * columns), x.dtype),), interpret,
        teams=1,
        x_smem=lines(stages, COMPUTE, WG_ROWS, DEPTH),
        tiles_smem=lines(stages, DEPTH, WIDTH),
        common_smem=lined((sides, rank, panel), x.dtype, rank),
        y_smem=lines(COMPUTE, 1, WG_ROWS, CHUNK),
        bars=Ring.barriers(stages, COMPUTE + 1),
        common_bar=plgpu.Barrier(num_arrivals=sides),
    )  # fmt: skip
