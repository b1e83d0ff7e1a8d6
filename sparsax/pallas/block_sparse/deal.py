"""The table of a schedule, written by one small kernel where XLA would launch ten."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from sparsax.layouts import INVALID
from sparsax.pallas.block_sparse.schedule import HEADER, OF_ROW, Schedule
from sparsax.pallas.block_sparse.tiles import ROWS, Every, unusable
from sparsax.pallas.hopper import multiprocessors

LEAST = 8  # units of a piece of a row at least: each costs about as much as two units more
STRIP = 8  # rows that a thread block ranks at most, one after another
AT_ONCE = 4  # thread blocks for each multiprocessor; with more rows, each of them ranks more
CHUNK = 4096  # numbers that its registers hold at once
THREADS = 128


def deal(
    schedule: Schedule, entries: Int[Array, "A R"], *extra: Int[Array, "A R"],
    block: int = ROWS, times: int = 1, every: Every | None = None, interpret,
) -> tuple[Int[Array, " F"], Int[Array, "2 E"] | None]:  # fmt: skip
    """What `Schedule.read` reads; and for each added piece, if it is a row's second, row and more.

    `entries` are those of each row's list of blocks of so many columns, which is walked so many
    times; below 0 they are no work. `extra` is what else its kernel wants to know of a row; with
    `every` the last of it are its entries, `INVALID` where a list of its head is not to be used.
    The table is the number of added pieces, if rows may be cut; for one and for two teams of a
    thread block, how many rows are so long that a team should do nothing else, if few rows are
    dealt and none may be cut; and then fields: of the pieces, and of rows from the longest to the
    shortest, of each head or, if they are few, of all together. What is said of pieces beyond those
    that were added, and numbers that do not apply, are left as they were. Of rows that are dealt
    beforehand the table is `Schedule.hands`, of single ones a number that nobody reads.

    Every thread block adds up all work for itself, so that none waits for another.
    """
    s = schedule
    if s.single:
        return jnp.zeros(1, jnp.int32), None  # nobody reads it
    if s.beforehand:
        return jnp.asarray(s.hands().ravel()), None
    per_unit = ROWS // block
    strip_rows = min(STRIP, -(-s.rows // (AT_ONCE * multiprocessors())))
    items, strips = s.extra + s.rows, -(-s.tiles // strip_rows)
    heads, ranked = (1, s.rows) if s.stay else (s.owners, s.tiles)  # ranked together
    of_heads = () if every is None else every.counts
    counts = [
        _long_enough(entries, s.rows if s.stay else s.tiles),
        *(_long_enough(x, x.shape[-1]) for x in of_heads),
    ]
    numbers = max(counts[0].size, THREADS)
    chunk = min(CHUNK, numbers // THREADS * THREADS)
    chunks = -(-numbers // chunk)

    def kernel(*refs, smem, bar):
        one_by_one, refs = refs[0], list(refs)
        entries, *others_of_head = _whole([refs.pop(0) for _ in counts], smem, bar)
        others = [refs.pop(0) for _ in extra]
        table, *splits = refs
        owner, strip = lax.axis_index("owner"), lax.axis_index("strip")

        def work_of(found):
            """As `units` has it, in registers: before the kernel it would be a launch."""
            found = jnp.clip(found, 0, s.longest * per_unit // times)
            if per_unit > 1:
                whole = jnp.broadcast_to(jnp.int32(per_unit), found.shape)
                found = lax.div(found + (per_unit - 1), whole)
            return times * found if times > 1 else found

        begin = 0 if heads == 1 else owner * ranked
        own, here, together = _load_head(entries, jnp.minimum(owner, heads - 1), ranked)
        own, wrong = work_of(own), jnp.int32(0)
        if every is not None:
            for ref, like, width in zip(others_of_head, every.counts, every.widths, strict=True):
                found, theirs = _load_head(ref, owner, like.shape[-1])[::2]
                wrong += jnp.where(unusable(found, width) & theirs, 1, 0).sum()

        def put(index, *fields):
            for i, x in enumerate(fields):
                table[HEADER + i * items + index] = x

        def rows_of(share, before):
            """Ranks the strip's rows and cuts those of more than a share."""

            def visit(i, _):
                nth_of_head = strip * strip_rows + i
                row = owner * s.tiles + nth_of_head

                @pl.when(nth_of_head < s.tiles)
                def _():
                    mine, fields = work_of(one_by_one[row]), [x[row] for x in others]
                    if every is not None:
                        fields[-1] = jnp.where(wrong > 0, INVALID, fields[-1])
                    longer = (own > mine) | ((own == mine) & (here < row))
                    place = s.extra + begin + jnp.where(longer & together, 1, 0).sum()
                    if share is None:
                        put(place, row, 0, mine, -1, *fields)
                        return
                    nth = before + jnp.where(together & (here < row), _pieces(own, share), 0).sum()
                    more = _pieces(mine, share)
                    length = lax.div(mine + more, more + 1)
                    part = jnp.where(more > 0, s.extra + nth, -1)
                    put(place, row, 0, jnp.minimum(length, mine), part, *fields)

                    def cut(j, _):
                        first = jnp.minimum((j + 1) * length, mine)
                        last = jnp.minimum(first + length, mine)
                        put(nth + j, row, first, last, nth + j, *fields)
                        splits[0][0, nth + j] = row
                        splits[0][1, nth + j] = jnp.where(j == 0, more, 0)

                    lax.fori_loop(0, more, cut, None)

            lax.fori_loop(0, strip_rows, visit, None)

        is_first = (owner == 0) & (strip == 0)
        if not s.extra:
            rows_of(None, None)

            @pl.when(is_first)
            def _():
                for teams in (1, 2) if s.stay else ():
                    table[teams] = jnp.where(together & _alone(s, teams, own, together), 1, 0).sum()

            return

        of_chunks = lambda add, start: lax.fori_loop(0, chunks, add, start)

        def of_chunk(i):
            x, place = _load(entries, i * chunk, chunk)
            return jnp.where((place >= i * chunk) & (place < s.rows), work_of(x), 0), place

        total = of_chunks(lambda i, total: total + of_chunk(i)[0].sum(), jnp.int32(0))
        # So that at most `extra` are added.
        share = jnp.maximum(LEAST, lax.div(total + (s.extra - 1), jnp.int32(s.extra)))

        def count(i, carry):
            before, many = carry
            work, place = of_chunk(i)
            pieces = _pieces(work, share)
            return before + jnp.where(place < begin, pieces, 0).sum(), many + pieces.sum()

        before, many = of_chunks(count, (jnp.int32(0), jnp.int32(0)))
        rows_of(share, before)

        @pl.when(is_first)
        def _():
            table[0] = many

    scratch: dict[str, Any] = {"smem": None, "bar": None}
    if short := sum(x.size < THREADS for x in counts):
        scratch["smem"] = plgpu.SMEM((short, THREADS), jnp.int32)
        scratch["bar"] = plgpu.Barrier(num_arrivals=short)
    int32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    table, *splits = plgpu.kernel(
        kernel,
        out_type=(
            int32(HEADER + (4 + len(extra)) * items),
            *([int32(2, s.extra)] if s.extra else []),
        ),
        grid=(s.owners, strips),
        grid_names=("owner", "strip"),
        scratch_types=scratch,
        kernel_name="block_sparse_deal",
        interpret=interpret,
    )(*counts, *(x.reshape(-1) for x in extra))
    return table, splits[0] if splits else None


def _long_enough(numbers, together: int):
    """Numbers `[A, n]` of heads behind each other, with zeros, as far as loads of so many need any.

    Fewer than threads are as they are: `_whole` has zeros for them, and padding costs a launch. But
    copies need lines of whole 16 bytes, which vmap makes of them.
    """
    size = -(-together // THREADS) * THREADS
    if numbers.size >= size or (numbers.size < THREADS and numbers.size % 4 == 0):
        return numbers.reshape(-1)
    return jnp.pad(numbers.reshape(-1), (0, size - numbers.size))


def _whole(vectors, smem, bar):
    """References to vectors of as many numbers as threads or more; copies end with zeros."""
    short = [i for i, x in enumerate(vectors) if x.shape[0] < THREADS]
    found = list(vectors)
    begin = 0 * lax.axis_index("owner")  # JAX refuses slices that it sees to be too long
    for place, i in enumerate(short):
        plgpu.copy_gmem_to_smem(vectors[i].at[pl.ds(begin, THREADS)], smem.at[place], bar)
        found[i] = smem.at[place]
    if short:
        plgpu.barrier_wait(bar)
    return found


def _load_head(ref, owner, size: int):
    """So many numbers of a head, with others; their places; and which are the head's."""
    begin = owner * size
    found, places = _load(ref, begin, -(-size // THREADS) * THREADS)
    return found, places, (places >= begin) & (places < begin + size)


def _load(ref, begin, size: int):
    """So many numbers from a place on, and their places: earlier ones where the array ends."""
    layout = plgpu.Layout.WG_STRIDED((size,), vec_size=1)
    begin = jnp.minimum(begin, ref.shape[0] - size)
    x = plgpu.load(ref.at[pl.ds(begin, size)], layout=layout, optimized=False)
    return x, begin + plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout)


def _alone(s: Schedule, teams: int, work, there):
    """Which rows take longer than the mean of all that so many teams have to do.

    Beside such a row a team has nothing to do, and the others still have less than the mean.
    """
    halves = 2 * work + int(2 * OF_ROW)  # whole numbers
    every = s.copies * jnp.where(there, halves, 0).sum()
    return halves * dataclasses.replace(s, teams=teams).staying > every


def _pieces(work, share):
    """How many pieces more than one rows are cut into, so that none is longer than a share."""
    more = jnp.maximum(work - 1, 0)
    return lax.div(more, jnp.broadcast_to(share, more.shape))
