"""Block-sparse attention on Hopper tensor cores: prepares lists and vectors, runs the kernels.

What launches kernels is jitted, so that equal layers of a model are traced and lowered once.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsax.layouts import BlockPattern
from sparsax.pallas.block_sparse.combine import combine
from sparsax.pallas.block_sparse.config import best_config
from sparsax.pallas.block_sparse.deal import deal
from sparsax.pallas.block_sparse.dkv import dkv_kernel
from sparsax.pallas.block_sparse.dq import dq_kernel
from sparsax.pallas.block_sparse.forward import forward_kernel
from sparsax.pallas.block_sparse.problem import Problem
from sparsax.pallas.block_sparse.regroup import tile_lists, tile_shape
from sparsax.pallas.block_sparse.schedule import NOTHING, Expected, Schedule, units
from sparsax.pallas.block_sparse.tiles import ROWS, Every, TileLists
from sparsax.pallas.block_sparse.tiling import Config
from sparsax.pallas.hopper import LOG2E
from sparsax.pallas.listed import Listed, put
from sparsax.pallas.support import vary

CACHE = 40 * 2**20  # bytes; an H100's and an H200's L2 cache is of 50 MB
FEW_LISTS = 64  # of a head, by row and by column, that a kernel reads for each row tile


class Saved(NamedTuple):
    """What the backward pass wants of the forward pass, as its kernels read it.

    Attributes:
        lse: `[B, N, T']` in units of log 2 and infinite for a row that keeps nothing; T' are all
            positions, padded to row tiles. Of the queries past the end, which are zeros, it is
            infinite or at least 0: their probabilities are at most 1, and meet cotangents of 0.
        dealt: the table of the rows that dQ walks as well, and of those that are split, whose
            unused places are not written; None where rows are not dealt out by their lists.
    """

    lse: Any
    dealt: Any

    def natural(self, length: int):
        """The log-sum-exps `[B, N, T]`; -inf for a row that keeps nothing."""
        lse = self.lse[..., :length]
        return jnp.where(lse == jnp.inf, -jnp.inf, lse / LOG2E)

    def of_natural(self, lse) -> "Saved":
        """With other log-sum-exps, `[B, N, T]`."""
        units = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E)
        return self._replace(lse=_behind([units], jnp.inf))


def forward(
    q, k, v, kv_num_blocks, kv_indices, q_num_blocks, q_indices, q_ids, kv_ids, *, block_q,
    block_kv, scale, causal, window, asked: bool = False, config: Config | None = None,
    interpret=None,
):  # fmt: skip
    """`o [B, T, N, H]`, 0 in a row that keeps nothing, and what is saved.

    Lists that are not to be used are those below 0 or, for whole heads if `asked`, too long.
    """
    problem = _problem(q, k, kv_num_blocks, q_ids, block_q, block_kv, scale, causal, window)
    lists = tile_lists(kv_num_blocks, kv_indices, problem.q_bounds, block_q, block_kv)
    if asked:
        widths = kv_indices.shape[-1], q_indices.shape[-1]
        every = Every((kv_num_blocks, q_num_blocks), widths)
        lists = dataclasses.replace(lists, every=every)
    (o,), saved = run_forward(problem, lists, (q_ids, kv_ids), [q], [k], [v], config, interpret)
    return o, saved


def asks_lists(q, k, pattern: BlockPattern, q_ids, causal: bool, window) -> bool:
    """Whether kernels find heads with lists that are not to be used, sparing XLA two launches.

    What deals rows out does; where none are, each row tile reads all lists of its head, if few.
    """
    counts, by_key = pattern.kv_num_blocks, pattern.q_num_blocks
    if counts.shape[1] + by_key.shape[1] <= FEW_LISTS:
        return True
    blocks = pattern.block_q, pattern.block_kv
    problem = _problem(q, k, counts, q_ids, *blocks, 1.0, causal, window)
    bounds, width = problem.q_bounds, pattern.kv_indices.shape[-1]
    rows, width, bits = tile_shape(counts.shape[1], width, bounds, *blocks)
    config = best_config(problem, bits or bounds.partial(pattern.block_kv))
    return not _schedule(problem, rows, width, NOTHING, config.forward.teams).single


def run_forward(
    problem: Problem, lists: TileLists, ids, q, k, v, config: Config | None, interpret,
    expected: Expected = NOTHING, listed_rows: Listed | None = None,
):  # fmt: skip
    """`forward` over the lists of row tiles: of each array in q an o, and what is saved.

    q, k and v are lists of arrays that stand behind each other: queries and global rows; keys,
    packed keys and those of global rows. `ids` are those of queries and keys, `(None, None)` or
    what the problem's rule reads; `expected` is what is known of a head's lists without them. The
    outputs of global rows go to `listed_rows` of the queries', too.
    """
    config = config or best_config(problem, _masked(problem, lists))
    return _run_forward(problem, config, interpret, expected, lists, ids, q, k, v, listed_rows)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run_forward(
    problem: Problem, config: Config, interpret, expected: Expected, lists, ids, q, k, v,
    listed_rows,
):  # fmt: skip
    teams = config.forward.teams
    schedule, table, splits = _of_queries(problem, lists, expected, interpret, teams)
    if not schedule.single:  # what deals the rows out has looked through all lists
        lists = dataclasses.replace(lists, every=None)
    kernel = forward_kernel(
        problem, schedule, lists.given, **config.forward.keywords, interpret=interpret
    )
    arrays = [_copyable(x) for x in (*q, *k, *v)]
    results = kernel(*_operands(lists, table, ids), *arrays)
    o, lse, parts = results[: len(q)], results[len(q)], results[len(q) + 1 :]
    if parts:
        (o,), lse = combine(
            schedule, problem.samples, (table, splits), parts, [list(o)], problem.q_starts, lse,
            interpret,
        )  # fmt: skip
    o = _put_rows(o, listed_rows, interpret)
    saved = Saved(lse, None if schedule.beforehand else (table, splits))
    return vary((_cut(o, problem.q_lengths), saved), (arrays, lists, ids))


def backward(
    q, k, v, o, saved, do, dlse, kv_num_blocks, kv_indices, q_num_blocks, q_indices, q_ids, kv_ids,
    *, block_q, block_kv, scale, causal, window, config: Config | None = None, interpret=None,
):  # fmt: skip
    """`(dq, dk, dv)`; probabilities are computed again from the saved lse: it may hold a sink."""
    problem = _problem(q, k, kv_num_blocks, q_ids, block_q, block_kv, scale, causal, window)
    by_query = tile_lists(kv_num_blocks, kv_indices, problem.q_bounds, block_q, block_kv)
    by_key = tile_lists(q_num_blocks, q_indices, problem.kv_bounds, block_kv, block_q)
    (dq,), (dk,), (dv,) = run_backward(
        problem, by_query, by_key, (q_ids, kv_ids), [q], [k], [v], [o], saved, [do], dlse, config,
        interpret,
    )  # fmt: skip
    return dq, dk, dv


def run_backward(
    problem: Problem, by_query: TileLists, by_key: TileLists, ids, q, k, v, o, saved: Saved, do,
    dlse, config: Config | None, interpret,
    expected: tuple[Expected, Expected] = (NOTHING, NOTHING), listed_rows: Listed | None = None,
):  # fmt: skip
    """`backward` over the lists of row tiles, of lists of arrays as `run_forward` takes them.

    `expected` is that of the lists by query and by key; the gradients of global rows go to
    `listed_rows` of the queries', too.
    """
    if config is None:
        of_rows = _masked(problem, by_query)
        of_columns = of_rows or by_key.bits is not None
        config = dataclasses.replace(
            best_config(problem, of_rows), dkv=best_config(problem, of_columns).dkv
        )
    arrays = q, k, v, o, saved, do, dlse, listed_rows
    return _run_backward(problem, config, interpret, expected, by_query, by_key, ids, *arrays)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run_backward(
    problem: Problem, config: Config, interpret, expected: tuple[Expected, Expected], by_query,
    by_key, ids, q, k, v, o, saved: Saved, do, dlse, listed_rows,
):  # fmt: skip
    # ds = p * (dp - delta + dlse): what a row subtracts, FlashAttention-2 section 3.1.2.
    delta = [
        (x.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1).swapaxes(1, 2) - dlse
        for x, y in zip(o, do, strict=True)
    ]
    if len(delta) > 1:  # or XLA fuses the sums into the concatenation, six times as slow
        delta = jax.lax.optimization_barrier(delta)
    q, k, v, do = ([_copyable(x) for x in each] for each in (q, k, v, do))
    arrays = *q, *k, *v, *do, saved.lse, _behind(delta, 0.0)

    schedule, table, splits = _of_queries(
        problem, by_query, expected[0], interpret, dealt=saved.dealt
    )
    kernel = dq_kernel(problem, schedule, by_query.given, **config.dq.keywords, interpret=interpret)
    results = kernel(*_operands(by_query, table, ids), *arrays)
    dq, parts = results[: len(q)], results[len(q) :]
    if parts:
        (dq,), _ = combine(
            schedule, problem.samples, (table, splits), parts, [list(dq)], problem.q_starts, None,
            interpret,
        )  # fmt: skip
    dk, dv = _of_keys(problem, config.dkv, by_key, ids, arrays, expected[1], interpret)
    dq = _put_rows(dq, listed_rows, interpret)
    lengths = problem.q_lengths, problem.kv_lengths, problem.kv_lengths
    gradients = tuple(map(_cut, (dq, dk, dv), lengths))
    return vary(gradients, (arrays, by_query, by_key, ids))


def _of_keys(
    problem: Problem, tiling, lists: TileLists, ids, arrays, expected: Expected, interpret
):
    """`dk, dv`, a list of arrays each, split rows and all."""
    rows, samples, starts = lists.count.shape[1], problem.samples, problem.kv_starts
    owners = min(problem.P, problem.K)  # of one sample
    count, block = lists.count.reshape(samples * owners, -1, rows), problem.block_q
    queries = problem.N // max(problem.P, problem.K)  # heads of a kv head that walk one list
    lists_of_row = queries * count.shape[1]
    longest = lists_of_row * units(lists.cols.shape[-1], block)
    copies = problem.B // samples * (problem.K // owners)
    of_rows = tuple(each * lists_of_row for each in expected.of_rows)
    expected = Expected(expected.units * lists_of_row, of_rows)
    # Columns of a pattern differ more in length than its rows: more is left to even them out.
    schedule = Schedule(
        samples * owners, rows, copies, longest, expected, twentieths=18,
        cached=_cached(problem, problem.q_rows, problem.N),
    ).in_any_order()  # fmt: skip
    if count.shape[1] > 1:  # several lists a row: their work is added up
        count, block = units(jnp.clip(count, 0, lists.cols.shape[-1]), block).sum(1), ROWS
    count = count.reshape(samples * owners, rows)
    table, splits = deal(schedule, count, block=block, times=queries, interpret=interpret)
    operands = *_operands(lists, table, ids), *arrays
    found = []
    for features in [(0, 128), (128, 256)] if problem.H == 256 else [None]:
        kernel = dkv_kernel(
            problem, schedule, lists.given, **tiling.keywords, features=features,
            interpret=interpret,
        )  # fmt: skip
        results = kernel(*operands)
        many = len(starts)
        targets = [list(results[:many]), list(results[many : 2 * many])]
        if parts := results[2 * many :]:
            targets, _ = combine(
                schedule, samples, (table, splits), parts, targets, starts, None, interpret
            )
        found.append(targets)
    if len(found) == 1:
        return found[0]
    return jax.tree.map(lambda *halves: jnp.concatenate(halves, -1), *found)


def _of_queries(
    problem: Problem, lists: TileLists, expected: Expected, interpret, teams: int = 1, dealt=None
):  # fmt: skip
    """The schedule of the forward pass or of dQ, its table and that of split rows.

    Both have one table, if they have any: dQ reads what was `dealt`.
    """
    _, rows, width = lists.cols.shape
    schedule = _schedule(problem, rows, width, expected, teams)
    if dealt is not None:
        return schedule, *dealt
    extra = (lists.count,) if lists.full is None else (lists.full, lists.count)
    table, splits = deal(
        schedule, lists.count, *extra, block=problem.block_kv, every=lists.every,
        interpret=interpret,
    )  # fmt: skip
    return schedule, table, splits


def _schedule(problem: Problem, rows: int, width: int, expected: Expected, teams: int) -> Schedule:
    """Of so many row tiles a head, with lists of so many entries."""
    copies = problem.B // problem.samples * (problem.N // problem.P)
    longest = units(width, problem.block_kv)
    cached = _cached(problem, problem.kv_rows, problem.K)
    schedule = Schedule(problem.owners, rows, copies, longest, expected, teams, cached=cached)
    return schedule.in_any_order()


def _cached(problem: Problem, length: int, heads: int) -> bool:
    """Whether the L2 cache holds two arrays of columns, of all positions, samples and heads."""
    elements = problem.B * length * heads * problem.H
    return 2 * elements * jnp.dtype(problem.dtype).itemsize <= CACHE


def _masked(problem: Problem, by_query: TileLists) -> bool:
    """Whether any tile may need a mask."""
    return by_query.bits is not None or problem.q_bounds.partial(problem.block_kv)


def _problem(q, k, counts, q_ids, block_q, block_kv, scale, causal, window) -> Problem:
    left, right = (None, None) if window is None else window
    if causal:
        right = 0 if right is None else min(right, 0)
    (batch, q_len, heads, features), (_, kv_len, kv_heads, _) = q.shape, k.shape
    return Problem(
        batch, q_len, kv_len, heads, kv_heads, features, counts.shape[0], q.dtype, block_q,
        block_kv, scale, left, right, q_ids is not None,
    )  # fmt: skip


def _copyable(x):
    """With a length that tile copies accept: whole groups of 8 rows. They clip tiles themselves."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % 8), (0, 0), (0, 0))) if x.shape[1] % 8 else x


def _put_rows(arrays, listed: Listed | None, interpret):
    """What belongs to queries, with that of global rows written over their listed ones."""
    if listed is None:
        return arrays
    of_queries, of_rows = arrays
    return [put(of_queries, listed, of_rows, interpret), of_rows]


def _cut(arrays, lengths):
    """Arrays of these lengths, without what copies needed."""
    return [x[:, :length] for x, length in zip(arrays, lengths, strict=True)]


def _behind(vectors, fill: float):
    """Vectors `[B, N, T]` one behind the other, each padded to row tiles."""
    padded = [
        jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[-1] % ROWS)), constant_values=fill)
        for x in vectors
    ]
    return padded[0] if len(padded) == 1 else jnp.concatenate(padded, -1)


def _operands(lists, table, ids):
    arrays = lists.full, lists.count, lists.cols, lists.bits
    operands = [table, *(x for x in arrays if x is not None)]
    of_queries, of_keys = ids
    if of_queries is not None:
        if of_keys.ndim == 2:
            # Lengths that a copy of whole tiles can read, and a row tile of keys that stand for
            # absent ones, as a rule's have them already; no padded id equals another one.
            of_queries = _padded(of_queries, -2, 0)[:, None, None]
            of_keys = _padded(of_keys, -3, ROWS)[:, None, None]
        operands += [of_queries, of_keys]
    return operands if lists.every is None else [*operands, *lists.every.counts]


def _padded(ids, fill: int, more: int):
    widths = *((0, 0),) * (ids.ndim - 1), (0, -ids.shape[-1] % ROWS + more)
    return jnp.pad(ids, widths, constant_values=fill)
