"""The product with tiled factors whose `x u` stays in shared memory.

A thread block owns rows and a few columns of tiles. First it computes all that these need of `x u`,
one row of tiles after another; then it multiplies that with v, a piece of y at a time. Nothing is
computed twice and nothing but y is written, while tiles may be larger than registers could hold
(`fused` cuts none). The price is shared memory: I R numbers for each row and column of tiles; but
of one row of tiles, whose `x u` is there only when all of x was read, they take x's place.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from sparsax.pallas.activations import ACTIVATIONS
from sparsax.pallas.grouped_matmul.product import CHUNK, CHUNKS, each_chunk
from sparsax.pallas.grouped_matmul.tables import DEPTH
from sparsax.pallas.hopper import (
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
    shared,
)

WIDTHS = (256, 128, 64)  # columns of a tile of the first product: the wider the less is read
PANEL = 128  # of them side by side in shared memory, and the most of a tile of the second product


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a thread block goes about it.

    `group` columns of tiles are its own, whose ranks together are the columns of its products. To
    share copies of factors with a thread block beside it was measured to be slower.
    """

    group: int
    stages: int

    @staticmethod
    def of(u, v, rows: int = ROWS) -> "Tiling | None":
        """The tiling for factors of such shapes and so many rows, or None where there is none.

        Columns are grouped where that leaves no multiprocessor without work. With five slots for
        tiles it took 1.1 times as long as with eight, with three 1.5 times.
        """
        (num_in, size, num_out, rank), columns = u.shape, v.shape[3]
        if rank % DEPTH or size % DEPTH:
            return None
        items = lambda group: -(-rows // ROWS) * num_out // group
        groups = [w // rank for w in WIDTHS if w % rank == columns % w == 0]
        groups = [g for g in groups if num_out % g == 0 and (num_in == 1 or g * rank <= PANEL)]
        busy = [g for g in groups if items(g) >= multiprocessors()]
        # A slot of 256 columns holds as much as two of 128, so four of them do.
        least = lambda group: 4 if group * rank > PANEL else 5
        tilings = (Tiling(g, n) for g in busy or groups[-1:] for n in (8, 6, 5, 4) if n >= least(g))
        fits = lambda tiling: tiling.bytes(u) <= SHARED_BYTES and tiling.runs(u)
        return next(filter(fits, tilings), None)

    def in_place(self, u) -> bool:
        """Whether `x u` takes x's place."""
        num_in, _, _, rank = u.shape
        return num_in == 1 and self.stages * DEPTH >= self.group * rank

    def runs(self, u) -> bool:
        """Whether the kernel can: panels want one row of tiles, and a piece of y slots enough.

        With fewer than three slots `TensorCores.sum_beside` would wait for itself.
        """
        num_in, _, _, rank = u.shape
        wide = self.group * rank > PANEL
        return self.stages >= 3 and not (wide and (num_in > 1 or self.stages < rank // DEPTH))

    def bytes(self, u) -> int:
        """What a thread block needs of shared memory for 16-bit arrays, barriers apart."""
        num_in, _, _, rank = u.shape
        width = self.group * rank
        more = CHUNKS * CHUNK if self.in_place(u) else num_in * width
        return 2 * (self.stages * DEPTH * (ROWS + width) + ROWS * more)


def forward(x, u, v, bias, *, activation: str | None, interpret=None, tiling: Tiling | None = None):
    """`activation(x w + bias)` `[M, J*C]`, w given by the factors of its tiles."""
    rows, apply = len(x), ACTIVATIONS.get(activation or "")
    tiling = tiling or Tiling.of(u, v, rows)
    assert tiling is not None
    assert tiling.runs(u)
    x = padded_rows(x)
    operands = [x, u.reshape(-1, u.shape[2] * u.shape[3]), v.reshape(-1, v.shape[3])]
    operands += [] if bias is None else [bias.astype(jnp.float32)]
    (y,) = _kernel(x, u, v, bias is not None, apply, tiling, interpret)(*operands)
    return y[:rows]


def _kernel(x, u, v, has_bias: bool, activation, tiling: Tiling, interpret):
    """A function of `(x, u [I*A, J*R], v [J*I*R, C], [bias])` that returns `y [M, J*C]`."""
    (num_in, size, num_out, rank), columns = u.shape, v.shape[3]
    group, stages, in_place = tiling.group, tiling.stages, tiling.in_place(u)
    width, groups, rows = group * rank, num_out // group, len(x)
    panel, panels = min(width, PANEL), max(1, width // PANEL)
    cores = TensorCores(interpret is not None)
    steps, lines = size // DEPTH, rank // DEPTH  # of a row of tiles; of its ranks
    inner, pieces = num_in * lines, columns // width  # steps of a piece of y; pieces of a tile
    first_steps = num_in * steps

    def kernel(*refs, x_smem, b_smem, other_smem, x_bars, b_bars):
        x_ref, u_ref, v_ref, *rest = refs
        bias_ref = rest.pop(0) if has_bias else None
        (y_ref,) = rest
        x_ring, ring = Ring(x_bars, stages), Ring(b_bars, stages)
        item, wg = lax.axis_index("item"), lax.axis_index("wg")
        row_tile = lax.div(item, jnp.int32(groups))
        own = lax.rem(item, jnp.int32(groups))  # group of columns of tiles
        part = row_tile * COMPUTE  # of the rows, for each warpgroup

        def place(n):
            """Which of its tiles piece n of y belongs to, and where in it."""
            tile = lax.div(n, jnp.int32(pieces))
            return tile, n - tile * pieces

        def first_column(n, side):
            """Of a panel of piece n, in panels."""
            tile, piece = place(n)
            return ((own * group + tile) * pieces + piece) * panels + side

        @copying(wg, teams=1)
        def copy_tiles(_):
            def bring(source, depth, first, step):
                """Panels side by side of a factor."""
                ring.reserve(step)
                slot = ring.slot(step)
                for side in range(panels):
                    own_panel = source.at[depth, pl.ds((first + side) * panel, panel)]
                    plgpu.copy_gmem_to_smem(own_panel, b_smem.at[slot, side], ring.filled.at[slot])

            def fill(step, _):
                slot, depth = x_ring.slot(step), pl.ds(step * DEPTH, DEPTH)
                x_ring.reserve(step)
                for half in range(COMPUTE):
                    source = x_ref.at[pl.ds((part + half) * WG_ROWS, WG_ROWS), depth]
                    plgpu.copy_gmem_to_smem(source, x_smem.at[half, slot], x_ring.filled.at[slot])
                bring(u_ref, depth, own * panels, step)

            def fill_piece(n, _):
                tile, piece = place(n)
                for k in range(inner):
                    depth = pl.ds(((own * group + tile) * inner + k) * DEPTH, DEPTH)
                    bring(v_ref, depth, piece * panels, first_steps + n * inner + k)

            lax.fori_loop(0, first_steps, fill, None)
            lax.fori_loop(0, group * pieces, fill_piece, None)
            x_ring.drain(jnp.int32(first_steps))
            ring.drain(jnp.int32(first_steps + group * pieces * inner))

        @pl.when(wg < COMPUTE)
        def multiply():
            plgpu.set_max_registers(232, action="increase")

            # All of x was read when `x u` is kept in its place, or pieces of y are staged there.
            kept_smem, staging = (x_smem, other_smem) if in_place else (other_smem, x_smem)

            def hidden(i, meanwhile):
                """`x_i u_i`, for all ranks of the group."""

                def operands(k):
                    step = i * steps + k
                    x_ring.wait(step)
                    ring.wait(step)
                    sides = [b_smem.at[ring.slot(step), side] for side in range(panels)]
                    return x_smem.at[wg, x_ring.slot(step)], sides

                def release(k):
                    x_ring.release(i * steps + k)
                    ring.release(i * steps + k)

                if panels > 1:  # there is nothing to do meanwhile
                    sums = cores.sums((WG_ROWS, panel), panels, steps, operands, release)
                    return [p.astype(x.dtype) for p in sums]
                one = lambda k: (lambda a, sides: (a, sides[0]))(*operands(k))
                p = cores.sum_beside((WG_ROWS, panel), steps, one, release, meanwhile)
                return [p.astype(x.dtype)]

            def keep(i, p):
                if in_place:
                    plgpu.commit_smem()  # no warp may still multiply what another overwrites
                for tile, line in itertools.product(range(group), range(lines)):
                    side, begin = divmod(tile * rank + line * DEPTH, panel)
                    goal = kept_smem.at[wg, tile * inner + i * lines + line]
                    goal[...] = p[side][:, begin : begin + DEPTH]

            def piece_of(m):
                """Piece and panel of output m."""
                n = lax.div(m, jnp.int32(panels))
                return n, m - n * panels

            def when(wanted, action):
                """`action()` for one of the panels that share the slots of a piece."""
                action() if panels == 1 else pl.when(wanted)(action)

            def output(m, meanwhile):
                """A panel of a piece of y."""
                n, side = piece_of(m)
                begin, (tile, _) = first_steps + n * inner, place(n)

                def operands(k):
                    when(side == 0, lambda: ring.wait(begin + k))
                    return kept_smem.at[wg, tile * inner + k], b_smem.at[ring.slot(begin + k), side]

                release = lambda k: when(side == panels - 1, lambda: ring.release(begin + k))
                y = cores.sum_beside((WG_ROWS, panel), inner, operands, release, meanwhile)
                if bias_ref is not None:
                    at = pl.ds(first_column(n, side) * panel, panel)
                    row = plgpu.load(bias_ref.at[at], layout=COL, optimized=False)
                    y = y + per_col(row, y.shape)
                return (y if activation is None else activation(y)).astype(x.dtype)

            def store(m, y):
                begin = first_column(*piece_of(m)) * (panel // CHUNK)

                def copy(chunk, at):
                    at_rows = pl.ds((part + wg) * WG_ROWS, WG_ROWS)
                    goal = y_ref.at[at_rows, pl.ds((begin + at // CHUNK) * CHUNK, CHUNK)]
                    there = (part + wg) * WG_ROWS < rows
                    pl.when(there)(lambda: plgpu.copy_smem_to_gmem(chunk, goal))

                each_chunk(y, staging.at[wg], x.dtype, copy)

            def last_first(count, compute, use):
                """`use(i, compute(i))` for all, beside the products of the next one."""
                go = lambda i, last: compute(i, lambda: use(i - 1, last))
                first = compute(jnp.int32(0), lambda: None)
                use(count - 1, lax.fori_loop(1, count, go, first))

            last_first(num_in, hidden, keep)
            plgpu.commit_smem()
            last_first(group * pieces * panels, output, store)
            plgpu.wait_smem_to_gmem(0)

    return launch(
        kernel, "tsvd_resident", -(-rows // ROWS) * groups,
        (jax.ShapeDtypeStruct((rows, num_out * columns), x.dtype),), interpret,
        teams=1,
        x_smem=shared((COMPUTE, stages, WG_ROWS, DEPTH), x.dtype),
        b_smem=shared((stages, panels, DEPTH, panel), x.dtype),
        other_smem=shared(
            (COMPUTE, CHUNKS if in_place else group * inner, WG_ROWS, DEPTH), x.dtype
        ),
        x_bars=Ring.barriers(stages, COMPUTE),
        b_bars=Ring.barriers(stages, panels),
    )  # fmt: skip
