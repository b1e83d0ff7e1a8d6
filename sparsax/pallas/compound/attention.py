"""Attention over a compound pattern, and what the kernels refuse."""

import jax.numpy as jnp

from sparsax.compound import CompoundPattern
from sparsax.pallas import support
from sparsax.pallas.block_sparse.attention import run_backward, run_forward
from sparsax.pallas.block_sparse.config import Config
from sparsax.pallas.block_sparse.places import STRIDE
from sparsax.pallas.compound.cover import expected_work
from sparsax.pallas.compound.keys import BLOCK, Keys, poison, problem_of
from sparsax.pallas.compound.lists import key_lists, query_lists


def refusal(q, pattern: CompoundPattern) -> str | None:
    """Why the kernels cannot take these queries and this pattern; None if they can."""
    if pattern.elements is not None:
        return "has no kernel of single pairs (the pattern's elements)"
    dilated = [band.dilation for band in pattern.bands if band.dilation > 1]
    if dilated:
        return f"takes bands of dilation 1; got {dilated}"
    if pattern.seq_len >= STRIDE // 2:
        return f"takes lengths below {STRIDE // 2}; got {pattern.seq_len}"
    blocks = pattern.blocks
    sizes = (BLOCK, BLOCK) if blocks is None else (blocks.block_q, blocks.block_kv)
    return support.refusal(q, *sizes)


def forward(
    q, k, v, own, pattern: CompoundPattern, *, scale: float, config: Config | None = None,
    interpret=None,
):  # fmt: skip
    """`o [B, T, N, H]`, and lse `[B, N, T]` and that of global rows `[B, N, R']`.

    `own` is `(q_global, k_global, v_global)` or three times None. Padded rows have o = 0 and
    lse = -inf.
    """
    problem = problem_of(q, k, pattern, scale, own[1] is not None)
    if _empty(pattern):
        return _zeros(q, poison(problem, pattern)), None
    keys = Keys(problem, pattern)
    qs, ks, vs = _arrays(keys, q, k, v, own)
    (o, *rows), lse = run_forward(
        problem, query_lists(keys), keys.places, qs, ks, vs, config, interpret,
        expected_work(problem, pattern, keys_in_rows=False),
    )  # fmt: skip
    if rows:
        o = pattern.put_rows(o, rows[0][:, : pattern.rows.shape[-1]])
        lse[1] = jnp.where(keys.row_is_there[:, None], lse[1], -jnp.inf)
    if pattern.token_mask is not None:  # whole tiles ask nobody
        o = jnp.where(pattern.token_mask[:, :, None, None], o, poison(problem, pattern))
        o = o.astype(q.dtype)
        lse[0] = jnp.where(pattern.token_mask[:, None], lse[0], -jnp.inf)
    return o, lse


def backward(
    q, k, v, own, o, lse, do, pattern: CompoundPattern, *, scale: float,
    config: Config | None = None, interpret=None,
):  # fmt: skip
    """`(dq, dk, dv)` and those of `own`; rows with lse = -inf have no part in them."""
    problem = problem_of(q, k, pattern, scale, own[1] is not None)
    if _empty(pattern):
        # Without blocks all heads are valid, or none is.
        return *(_zeros(x, poison(problem, pattern)[:, :, :1]) for x in (q, k, v)), (None,) * 3
    keys = Keys(problem, pattern)
    os, dos = [o], [do]
    if problem.rows:
        # As an ordinary row a global one keeps nothing.
        lse = [jnp.where(pattern.is_row()[:, None], -jnp.inf, lse[0]), lse[1]]
        os, dos = ([x, _rows(keys, pattern.take_rows(x))] for x in (o, do))
    qs, ks, vs = _arrays(keys, q, k, v, own)
    work = lambda keys_in_rows: expected_work(problem, pattern, keys_in_rows)
    (dq, *of_rows), dk, dv = run_backward(
        problem, query_lists(keys), key_lists(keys), keys.places, qs, ks, vs, os, lse, dos, 0.0,
        config, interpret, (work(False), work(True)),
    )  # fmt: skip
    of_own = [None, None, None]
    if problem.rows:
        rows = of_rows[0][:, : pattern.rows.shape[-1]]
        if problem.own:
            of_own = [rows, dk.pop(), dv.pop()]
        else:
            dq = pattern.put_rows(dq, rows)
    dk, dv = (keys.unpack(*x) if problem.packed else x[0] for x in (dk, dv))
    return dq, dk, dv, tuple(of_own)


def _arrays(keys: Keys, q, k, v, own):
    """Queries, keys and values, lists of what stands behind each other."""
    q_global, *others = own
    queries, of_keys = [q], [[k], [v]]
    if keys.problem.rows:
        rows = keys.pattern.take_rows(q) if q_global is None else q_global
        queries.append(_rows(keys, rows))
    if keys.problem.packed:
        for each, packed in zip(of_keys, keys.pack(k, v), strict=True):
            each.append(packed)
    if keys.problem.own:
        for each, theirs in zip(of_keys, others, strict=True):
            each.append(theirs)
    return queries, *of_keys


def _rows(keys: Keys, x):
    """What belongs to global rows `[B, R, N, H]`, padded to row tiles."""
    return jnp.pad(x, ((0, 0), (0, keys.problem.rows - x.shape[1]), (0, 0), (0, 0)))


def _zeros(like, plus):
    return jnp.broadcast_to(plus, like.shape).astype(like.dtype)


def _empty(pattern: CompoundPattern) -> bool:
    """Whether no pair attends: there is nothing to run."""
    parts = pattern.bands, pattern.columns.shape[-1], pattern.rows.shape[-1]
    return not any(parts) and pattern.blocks is None
