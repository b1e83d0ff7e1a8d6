"""Block-sparse attention on Hopper tensor cores: prepares lists and vectors, runs the kernels."""

import jax.numpy as jnp

from sparsax.pallas.block_sparse.combine import combine
from sparsax.pallas.block_sparse.config import Config, best_config
from sparsax.pallas.block_sparse.deal import deal
from sparsax.pallas.block_sparse.dkv import dkv_kernel
from sparsax.pallas.block_sparse.dq import dq_kernel
from sparsax.pallas.block_sparse.forward import forward_kernel
from sparsax.pallas.block_sparse.problem import Problem
from sparsax.pallas.block_sparse.schedule import Schedule, units
from sparsax.pallas.block_sparse.tiles import ROWS, TileLists, tile_lists
from sparsax.pallas.hopper import LOG2E
from sparsax.pallas.support import vary


def forward(
    q, k, v, kv_num_blocks, kv_indices, q_ids, kv_ids, *, block_q, block_kv, scale, causal, window,
    config: Config | None = None, interpret=None,
):  # fmt: skip
    """`(o [B, T, N, H], lse [B, N, T])`; a row that keeps nothing has o = 0 and lse = -inf."""
    problem = _problem(q, k, kv_num_blocks, q_ids, block_q, block_kv, scale, causal, window)
    lists = tile_lists(kv_num_blocks, kv_indices, problem.q_bounds, block_q, block_kv)
    return run_forward(problem, lists, (q_ids, kv_ids), (), q, k, v, config, interpret)


def run_forward(
    problem: Problem, lists: TileLists, ids, packed, q, k, v, config: Config | None, interpret
):
    """`forward` over the lists of row tiles.

    `ids` are those of queries and keys, `(None, None)` or what the problem's rule reads. `packed`
    is empty or the packed keys and their values.
    """
    config = config or best_config(problem, _masked(problem, lists))
    schedule, table, splits = _of_queries(problem, lists, interpret)
    kernel = forward_kernel(
        problem, schedule, lists.bits is not None, **config.forward.keywords, interpret=interpret
    )
    q, k, v = (_copyable(x) for x in (q, k, v))
    o, lse, *parts = kernel(*_operands(lists, table, ids, packed), q, k, v)
    if parts:
        o, lse = combine(schedule, problem.samples, splits, parts, [o, lse], interpret)
    return vary((o[:, : problem.T], lse[..., : problem.T] / LOG2E), (q, k, v, lists, ids))


def backward(
    q, k, v, o, lse, do, dlse, kv_num_blocks, kv_indices, q_num_blocks, q_indices, q_ids, kv_ids,
    *, block_q, block_kv, scale, causal, window, config: Config | None = None, interpret=None,
):  # fmt: skip
    """`(dq, dk, dv)`; probabilities are computed again from `lse`, which may hold a sink."""
    problem = _problem(q, k, kv_num_blocks, q_ids, block_q, block_kv, scale, causal, window)
    by_query = tile_lists(kv_num_blocks, kv_indices, problem.q_bounds, block_q, block_kv)
    by_key = tile_lists(q_num_blocks, q_indices, problem.kv_bounds, block_kv, block_q)
    return run_backward(
        problem, by_query, by_key, (q_ids, kv_ids), (), q, k, v, o, lse, do, dlse, config, interpret
    )


def run_backward(
    problem: Problem, by_query: TileLists, by_key: TileLists, ids, packed, q, k, v, o, lse, do,
    dlse, config: Config | None, interpret,
):  # fmt: skip
    """`backward` over the lists of row tiles; dk and dv have `problem.kv_rows` rows."""
    config = config or best_config(problem, _masked(problem, by_query))
    padded = ((0, 0), (0, 0), (0, -problem.T % ROWS))
    # ds = p * (dp - delta + dlse): what a row subtracts, FlashAttention-2 section 3.1.2.
    products = o.astype(jnp.float32) * do.astype(jnp.float32)
    delta = jnp.pad(products.sum(-1).swapaxes(1, 2) - dlse, padded)
    # A row with lse = -inf keeps nothing; +inf makes every probability of it zero.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E)
    lse = jnp.pad(lse, padded, constant_values=jnp.inf)
    vectors = *(_copyable(x) for x in (q, k, v, do)), lse, delta

    schedule, table, splits = _of_queries(problem, by_query, interpret)
    kernel = dq_kernel(
        problem, schedule, by_query.bits is not None, **config.dq.keywords, interpret=interpret
    )
    dq, *parts = kernel(*_operands(by_query, table, ids, packed), *vectors)
    if parts:
        (dq,) = combine(schedule, problem.samples, splits, parts, [dq], interpret)
    dk, dv = _of_keys(problem, config.dkv, by_key, ids, packed, vectors, interpret)
    gradients = dq[:, : problem.T], dk[:, : problem.kv_rows], dv[:, : problem.kv_rows]
    return vary(gradients, (vectors, by_query, by_key, ids))


def _of_keys(problem: Problem, tiling, lists: TileLists, ids, packed, vectors, interpret):
    """`dk, dv`, split rows and all."""
    rows, samples = lists.count.shape[1], problem.samples
    owners = min(problem.P, problem.K)  # of one sample
    work = units(jnp.maximum(lists.count, 0), problem.block_q).reshape(samples * owners, -1, rows)
    queries = problem.N // max(problem.P, problem.K)  # heads of a kv head that walk one list
    longest = queries * work.shape[1] * units(lists.cols.shape[-1], problem.block_q)
    copies = problem.B // samples * (problem.K // owners)
    schedule = Schedule(samples * owners, rows, copies, longest)
    table, splits = deal(schedule, queries * work.sum(1), interpret=interpret)
    operands = *_operands(lists, table, ids, packed), *vectors
    parts = []
    for features in [(0, 128), (128, 256)] if problem.H == 256 else [None]:
        kernel = dkv_kernel(
            problem, schedule, lists.bits is not None, **tiling.keywords, features=features,
            interpret=interpret,
        )  # fmt: skip
        dk, dv, *sums = kernel(*operands)
        targets = [dk, dv]
        if sums:
            targets = combine(schedule, samples, splits, sums, targets, interpret)
        parts.append(targets)
    if len(parts) == 1:
        return parts[0]
    return [jnp.concatenate(x, -1) for x in zip(*parts, strict=True)]


def _of_queries(problem: Problem, lists: TileLists, interpret):
    """The schedule of the forward pass and of dQ, its table and that of split rows."""
    work = units(jnp.maximum(lists.count, 0), problem.block_kv)
    longest = units(lists.cols.shape[-1], problem.block_kv)
    copies = problem.B // problem.samples * (problem.N // problem.P)
    schedule = Schedule(problem.owners, work.shape[1], copies, longest)
    return schedule, *deal(schedule, work, lists.full, lists.count, interpret=interpret)


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


def _operands(lists, table, ids, packed):
    operands = [table, lists.full, lists.count, lists.cols]
    operands += [] if lists.bits is None else [lists.bits]
    if ids[0] is not None:
        of_queries, of_keys = ids
        if of_keys.ndim == 2:
            of_keys = of_keys[:, None]
        # Lengths that a copy of whole tiles can read, and a row tile of keys that stand for absent
        # ones; no padded id equals another one.
        for each, fill, more in ((of_queries, -2, 0), (of_keys, -3, ROWS)):
            padded = *((0, 0),) * (each.ndim - 1), (0, -each.shape[-1] % ROWS + more)
            operands.append(jnp.pad(each, padded, constant_values=fill))
    return [*operands, *packed]
