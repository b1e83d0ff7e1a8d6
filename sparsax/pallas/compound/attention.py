"""Attention over a compound pattern, and what the kernels refuse."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from sparsax.compound import CompoundPattern
from sparsax.pallas import support
from sparsax.pallas.block_sparse.attention import Saved as SavedOfLists
from sparsax.pallas.block_sparse.attention import run_backward, run_forward
from sparsax.pallas.block_sparse.places import STRIDE
from sparsax.pallas.block_sparse.problem import Problem
from sparsax.pallas.block_sparse.tiling import Config
from sparsax.pallas.compound.cover import expected_work
from sparsax.pallas.compound.keys import BLOCK, Keys, poison, problem_of
from sparsax.pallas.compound.lists import key_lists, query_lists
from sparsax.pallas.listed import Wanted, gather


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


class Saved(NamedTuple):
    """What the backward pass wants of the forward pass."""

    lists: SavedOfLists | None  # of queries, and of global rows behind them; None: no pair
    brought: Any  # q of global rows, k and v of packed keys; as far as there are any


def forward(
    q, k, v, own, pattern: CompoundPattern, *, scale: float, config: Config | None = None,
    interpret=None,
):  # fmt: skip
    """`o [B, T, N, H]`, and what is saved.

    `own` is `(q_global, k_global, v_global)` or three times None. Padded rows have o = 0.
    """
    problem = problem_of(q, k, pattern, scale, own[1] is not None)
    if _empty(pattern):
        return _zeros(q, poison(problem, pattern)), Saved(None, None)
    keys = Keys(problem, pattern)
    brought = _bring(keys, q, k, v, own[0], interpret)
    qs, ks, vs = _arrays(keys, q, k, v, own, brought)
    (o, *_), saved = run_forward(
        problem, query_lists(keys), keys.places, qs, ks, vs, config, interpret,
        expected_work(problem, pattern, keys_in_rows=False),
        keys.listed_rows if problem.rows else None,
    )  # fmt: skip
    if problem.rows or pattern.token_mask is not None:
        there = keys.row_is_there if problem.rows else None
        saved = _silence(problem, saved, pattern.token_mask, there)
    if pattern.token_mask is not None:  # whole tiles ask nobody
        o = jnp.where(pattern.token_mask[:, :, None, None], o, poison(problem, pattern))
        o = o.astype(q.dtype)
    return o, Saved(saved, brought)


def backward(
    q, k, v, own, o, saved: Saved, do, pattern: CompoundPattern, *, scale: float,
    config: Config | None = None, interpret=None,
):  # fmt: skip
    """`(dq, dk, dv)` and those of `own`; rows that keep nothing have no part in them."""
    problem = problem_of(q, k, pattern, scale, own[1] is not None)
    if _empty(pattern):
        # Without blocks all heads are valid, or none is.
        return *(_zeros(x, poison(problem, pattern)[:, :, :1]) for x in (q, k, v)), (None,) * 3
    keys = Keys(problem, pattern)
    assert saved.lists is not None
    os, dos, of_lists = [o], [do], saved.lists
    if problem.rows:
        # As an ordinary row a global one keeps nothing.
        of_lists = _silence(problem, of_lists, ~keys.is_row, None)
        os, dos = ([x, _rows(keys, pattern.take_rows(x))] for x in (o, do))
    qs, ks, vs = _arrays(keys, q, k, v, own, saved.brought)
    work = lambda keys_in_rows: expected_work(problem, pattern, keys_in_rows)
    (dq, *of_rows), dk, dv = run_backward(
        problem, query_lists(keys), key_lists(keys), keys.places, qs, ks, vs, os, of_lists, dos,
        0.0, config, interpret, (work(False), work(True)),
        keys.listed_rows if problem.rows and not problem.own else None,
    )  # fmt: skip
    of_own = [None, None, None]
    if problem.own:
        of_own = [of_rows[0][:, : pattern.rows.shape[-1]], dk.pop(), dv.pop()]
    dk, dv = (keys.unpack(*x) if problem.packed else x[0] for x in (dk, dv))
    return dq, dk, dv, tuple(of_own)


def _silence(problem: Problem, saved: SavedOfLists, queries, rows) -> SavedOfLists:
    """As if queries, and global rows, kept nothing where their mask is False; None keeps all."""
    begins = *problem.q_starts, saved.lse.shape[-1]
    masks = []
    for mask, begin, end in zip((queries, rows), begins, begins[1:], strict=False):
        mask = jnp.ones((1, 0), bool) if mask is None else mask
        widths = (0, 0), (0, end - begin - mask.shape[-1])
        masks.append(jnp.pad(mask, widths, constant_values=True))
    samples = max(map(len, masks))
    there = jnp.concatenate([jnp.broadcast_to(x, (samples, x.shape[1])) for x in masks], 1)
    return saved._replace(lse=jnp.where(there[:, None], saved.lse, jnp.inf))


def _bring(keys: Keys, q, k, v, q_global, interpret):
    """Queries of global rows without projections of their own, and packed keys and values."""
    x = keys.problem
    of_rows = [q] if x.rows and q_global is None else []
    of_columns = [k, v] if x.packed else []
    by_rows = Wanted(keys.listed_rows, x.rows, of_rows)
    return gather([by_rows, Wanted(keys.listed_columns, x.packed, of_columns)], interpret)


def _arrays(keys: Keys, q, k, v, own, brought):
    """Queries, keys and values, lists of what stands behind each other."""
    q_global, *others = own
    of_rows, packed = brought
    queries, of_keys = [q, *of_rows], [[k, *packed[:1]], [v, *packed[1:]]]
    if keys.problem.rows and q_global is not None:
        queries.append(_rows(keys, q_global))
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
