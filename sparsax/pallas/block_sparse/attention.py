"""Block-sparse attention on Hopper tensor cores: prepares lists and vectors, runs the kernels."""

import jax
import jax.numpy as jnp

from sparsax.pallas.block_sparse.combine import combine
from sparsax.pallas.block_sparse.config import Config, best_config
from sparsax.pallas.block_sparse.dkv import dkv_kernel
from sparsax.pallas.block_sparse.dq import dq_kernel
from sparsax.pallas.block_sparse.forward import forward_kernel
from sparsax.pallas.block_sparse.problem import Problem
from sparsax.pallas.block_sparse.schedule import Schedule, units
from sparsax.pallas.block_sparse.tiles import ROWS, tile_lists
from sparsax.pallas.hopper import LOG2E

LONG = 32  # lists that may take this many units of work may be worth cutting


def forward(
    q, k, v, kv_num_blocks, kv_indices, q_ids, kv_ids, *, block_q, block_kv, scale, causal, window,
    config: Config | None = None, interpret=None,
):  # fmt: skip
    """`(o [B, T, N, H], lse [B, N, T])`; a row that keeps nothing has o = 0 and lse = -inf."""
    problem = _problem(q, k, kv_num_blocks, q_ids, block_q, block_kv, scale, causal, window)
    config = config or best_config(problem)
    lists = tile_lists(kv_num_blocks, kv_indices, problem.q_bounds, block_q, block_kv)
    schedule, table, splits = _of_queries(problem, lists)
    kernel = forward_kernel(
        problem, schedule, lists.bits is not None, **config.forward.keywords, interpret=interpret
    )
    q, k, v = (_copyable(x) for x in (q, k, v))
    o, lse, *parts = kernel(*_operands(lists, table, q_ids, kv_ids), q, k, v)
    if parts:
        o, lse = combine(schedule, splits, parts, [o, lse], interpret)
    return _vary((o[:, : problem.T], lse[..., : problem.T] / LOG2E), (q, k, v, lists, q_ids))


def backward(
    q, k, v, o, lse, do, dlse, kv_num_blocks, kv_indices, q_num_blocks, q_indices, q_ids, kv_ids,
    *, block_q, block_kv, scale, causal, window, config: Config | None = None, interpret=None,
):  # fmt: skip
    """`(dq, dk, dv)`; probabilities are computed again from `lse`, which may hold a sink."""
    problem = _problem(q, k, kv_num_blocks, q_ids, block_q, block_kv, scale, causal, window)
    config = config or best_config(problem)
    padded = ((0, 0), (0, 0), (0, -problem.T % ROWS))
    # ds = p * (dp - delta + dlse): what a row subtracts, FlashAttention-2 section 3.1.2.
    products = o.astype(jnp.float32) * do.astype(jnp.float32)
    delta = jnp.pad(products.sum(-1).swapaxes(1, 2) - dlse, padded)
    # A row with lse = -inf keeps nothing; +inf makes every probability of it zero.
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse * LOG2E)
    lse = jnp.pad(lse, padded, constant_values=jnp.inf)
    vectors = *(_copyable(x) for x in (q, k, v, do)), lse, delta

    lists = tile_lists(kv_num_blocks, kv_indices, problem.q_bounds, block_q, block_kv)
    schedule, table, splits = _of_queries(problem, lists)
    kernel = dq_kernel(
        problem, schedule, lists.bits is not None, **config.dq.keywords, interpret=interpret
    )
    dq, *parts = kernel(*_operands(lists, table, q_ids, kv_ids), *vectors)
    if parts:
        (dq,) = combine(schedule, splits, parts, [dq], interpret)

    lists = tile_lists(q_num_blocks, q_indices, problem.kv_bounds, block_kv, block_q)
    owners = min(problem.P, problem.K)
    work = units(jnp.maximum(lists.count, 0), block_q).reshape(owners, -1, lists.count.shape[1])
    queries = problem.N // max(problem.P, problem.K)  # heads of a kv head that walk one list
    longest = queries * work.shape[1] * units(lists.cols.shape[-1], block_q)
    copies = problem.B * (problem.K // owners)
    schedule = Schedule(owners, work.shape[2], copies, longest, split=longest >= LONG)
    table, splits = schedule.table(queries * work.sum(1))
    operands = *_operands(lists, table, q_ids, kv_ids), *vectors
    parts = []
    for features in [(0, 128), (128, 256)] if problem.H == 256 else [None]:
        kernel = dkv_kernel(
            problem, schedule, lists.bits is not None, **config.dkv.keywords, features=features,
            interpret=interpret,
        )  # fmt: skip
        dk, dv, *sums = kernel(*operands)
        targets = combine(schedule, splits, sums, [dk, dv], interpret) if sums else (dk, dv)
        parts.append(targets)
    dk, dv = (
        parts[0] if len(parts) == 1 else (jnp.concatenate(x, -1) for x in zip(*parts, strict=True))
    )
    gradients = dq[:, : problem.T], dk[:, : problem.S], dv[:, : problem.S]
    return _vary(gradients, (vectors, lists, q_ids))


def _vary(outputs, inputs):
    """Outputs of a kernel, said to vary over the mesh axes that its inputs vary over.

    Inside `jax.shard_map` a kernel's outputs come without that type, which gradients must have.
    """
    axes = frozenset().union(*(jax.typeof(x).mat.varying for x in jax.tree.leaves(inputs)))
    return jax.tree.map(lambda x: jax.lax.pcast(x, tuple(axes), to="varying"), outputs)


def _of_queries(problem: Problem, lists):
    """The schedule of the forward pass and of dQ, its table and that of split rows."""
    work = units(jnp.maximum(lists.count, 0), problem.block_kv)
    longest, copies = units(lists.cols.shape[-1], problem.block_kv), problem.B * problem.N
    schedule = Schedule(
        problem.P, work.shape[1], copies // problem.P, longest, split=longest >= LONG
    )
    return schedule, *schedule.table(work, lists.full, lists.count)


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


def _operands(lists, table, q_ids, kv_ids):
    operands = [table, lists.full, lists.count, lists.cols]
    operands += [] if lists.bits is None else [lists.bits]
    if q_ids is not None:
        # Lengths that a copy of whole tiles can read; no padded id equals another one.
        for ids, fill in ((q_ids, -2), (kv_ids, -3)):
            padded = ((0, 0), (0, -ids.shape[1] % ROWS))
            operands.append(jnp.pad(ids, padded, constant_values=fill))
    return operands
