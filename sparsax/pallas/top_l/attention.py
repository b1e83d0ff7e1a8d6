"""Attention over the kept keys, in the block-sparse kernels, and what these refuse.

All blocks that a query may see are walked: unstructured choices rarely leave one empty.
"""

import jax.numpy as jnp
import numpy as np

from sparsax.pallas import support
from sparsax.pallas.block_sparse.attention import run_backward, run_forward
from sparsax.pallas.block_sparse.config import CODED
from sparsax.pallas.block_sparse.problem import Problem
from sparsax.pallas.block_sparse.tiles import ROWS, TileLists
from sparsax.pallas.block_sparse.tiling import Config
from sparsax.pallas.top_l.matches import Matches, codes_refusal, key_ids, query_ids
from sparsax.quantise.codes import Codes

FEATURES = tuple(CODED)  # with more of them a mask finds no registers


def refusal(q, codes: Codes) -> str | None:
    """Why the kernels cannot take these queries and codes; None if they can."""
    if refused := codes_refusal(codes):
        return refused
    if q.shape[-1] not in FEATURES:
        return f"takes head features H in {FEATURES}; got H={q.shape[-1]}"
    return support.refusal(q, ROWS, ROWS)


def forward(
    q, k, v, queries, keys, tau, first, key_mask, *, num_codes, scale, causal,
    config: Config | None = None, interpret=None,
):  # fmt: skip
    """`o [B, T, N, H]`, 0 in a row that keeps nothing, and what is saved."""
    problem = _problem(q, k, queries.shape[-1], scale, causal)
    ids = query_ids(queries, tau, first, num_codes), key_ids(keys, key_mask)
    lists, config = _lists(problem.T, causal, keys_in_rows=False), config or CODED[problem.H]
    (o,), saved = run_forward(problem, lists, ids, [q], [k], [v], config, interpret)
    return o, saved


def backward(
    q, k, v, o, saved, do, queries, keys, tau, first, key_mask, *, num_codes, scale, causal,
    config: Config | None = None, interpret=None,
):  # fmt: skip
    """`(dq, dk, dv)`; probabilities are computed again from the saved lse."""
    problem = _problem(q, k, queries.shape[-1], scale, causal)
    ids = query_ids(queries, tau, first, num_codes), key_ids(keys, key_mask)
    by_query, by_key = (_lists(problem.T, causal, keys_in_rows) for keys_in_rows in (False, True))
    (dq,), (dk,), (dv,) = run_backward(
        problem, by_query, by_key, ids, [q], [k], [v], [o], saved, [do], 0.0,
        config or CODED[problem.H], interpret,
    )  # fmt: skip
    return dq, dk, dv


def _problem(q, k, words: int, scale: float, causal: bool) -> Problem:
    (batch, length, heads, features), kv_heads = q.shape, k.shape[2]
    return Problem(
        batch, length, length, heads, kv_heads, features, 1, q.dtype, ROWS, ROWS, scale, None,
        None, ids=True, rule=Matches(words, causal),
    )  # fmt: skip


def _lists(length: int, causal: bool, keys_in_rows: bool) -> TileLists:
    """All blocks that may hold a pair: with causality, key block by query block, a triangle."""
    tiles = -(-length // ROWS)
    row, entry = np.arange(tiles), np.arange(tiles)
    count, cols = np.full(tiles, tiles), np.broadcast_to(entry, (tiles, tiles))
    if causal and keys_in_rows:
        count, cols = tiles - row, np.minimum(row[:, None] + entry, tiles - 1)
    elif causal:
        count = row + 1
    constant = lambda x: jnp.asarray(x[None], jnp.int32)  # or each of them costs a kernel
    return TileLists(None, constant(count), constant(cols), None)
