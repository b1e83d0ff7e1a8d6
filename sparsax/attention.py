"""Attention over a pattern: what the arguments must be, which implementation runs, its gradient."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparsax import checks, pallas, reference, xla
from sparsax.compound import CompoundPattern
from sparsax.layouts import BlockPattern
from sparsax.lowrank import TiledFactors
from sparsax.quantise import Codes
from sparsax.typing import (
    ArrayLike,
    Implementation,
    Key,
    LogSumExp,
    Pruned,
    Query,
    Value,
    Window,
    is_concrete,
)

SegmentIds = Int[Array, "B T"] | tuple[Int[Array, "B T"], Int[Array, "B S"]]


@typing.overload
def block_sparse_attention(
    q: Query, k: Key, v: Value, pattern: BlockPattern, *, scale: float | None = None,
    causal: bool = False, window: Window | None = None, segment_ids: SegmentIds | None = None,
    key_mask: Bool[Array, "B S"] | None = None, pruned: Pruned = "drop",
    implementation: Implementation | None = None, return_lse: typing.Literal[False] = False,
) -> Query: ...  # fmt: skip


@typing.overload
def block_sparse_attention(
    q: Query, k: Key, v: Value, pattern: BlockPattern, *, scale: float | None = None,
    causal: bool = False, window: Window | None = None, segment_ids: SegmentIds | None = None,
    key_mask: Bool[Array, "B S"] | None = None, pruned: Pruned = "drop",
    implementation: Implementation | None = None, return_lse: typing.Literal[True],
) -> tuple[Query, LogSumExp]: ...  # fmt: skip


def block_sparse_attention(
    q: Query,
    k: Key,
    v: Value,
    pattern: BlockPattern,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: Window | None = None,
    segment_ids: SegmentIds | None = None,
    key_mask: Bool[Array, "B S"] | None = None,
    pruned: Pruned = "drop",
    implementation: Implementation | None = None,
    return_lse: bool = False,
) -> Query | tuple[Query, LogSumExp]:
    """Softmax attention over the blocks of keys that a pattern lists for each block of queries.

    Work and memory follow the number of listed blocks, forward and backward: the backward pass
    computes probabilities again from the saved log-sum-exp. Differentiable in reverse mode, works
    under jit, vmap, scan, `jax.checkpoint` and shard_map (batch and heads), and is deterministic.
    Lengths need not be multiples of the pattern's blocks: the tails are padded inside.

    Args:
        q: queries `[B, T, N, H]`: float32, bfloat16 or float16; softmax runs in float32.
        k: keys `[B, S, K, H]`; K divides N (grouped-query and multi-query attention).
        v: values, shaped as the keys.
        pattern: the listed blocks for T queries and S keys, shared by all heads (P = 1) or per
            head (P = N, or P = K to share one among the queries of a kv head). It is data: a new
            pattern of the same capacity does not recompile.
        scale: factor of the logits; `1 / sqrt(H)` when None.
        causal: a query sees keys of its own index and below only.
        window: `(left, right)`, how many keys before and after its own index a query sees; None
            for a side means no limit there. (None, as a whole: no window.)
        segment_ids: non-negative integers; a query sees keys of its own segment only. One array
            `[B, T]` for self-attention, or the pair `(of queries, of keys)`.
        key_mask: False for keys that are padding.
        pruned: what a key outside the listed blocks counts in the softmax. "drop": nothing (its
            logit is minus infinity). "zero": logit 0, SPION's semantics, which adds one
            `exp(0)` to the denominator for every key that the pattern took away; keys that are
            padding, of another segment, or behind the causal mask never count.
        implementation: "reference" (dense, float32), "xla" (any device), "pallas" (Hopper GPUs;
            bfloat16 or float16, head features 32, 64, 96, 128 or 256, pattern blocks of 32, 64 or
            128), or None for what `default_implementation` names. A name runs or raises: nothing
            falls back.
        return_lse: also return the log of the softmax's denominator.

    Returns:
        `o [B, T, N, H]` in q's dtype, and with `return_lse` also `lse [B, T, N]` in float32. A
        query that keeps no key has o = 0 and zero gradients (and lse = -inf for "drop"). Under
        jit, a head whose pattern is not `valid()` is NaN throughout, and so are its gradients, at
        least of all pairs that its lists name and that the masks admit.

    Raises:
        ValueError: shapes, dtypes, lengths, pattern or a name are wrong.
        NotImplementedError: the named implementation cannot do this.

    Source: Dao, "FlashAttention-2" (arXiv 2307.08691) section 3.1 for the recomputation; Yoon et
    al., "Layer-Wise Sparse Training of Transformer via Convolutional Flood Filling" (PAKDD 2024)
    for `pruned="zero"`.

    Example:
        >>> import jax
        >>> import sparsax
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 256, 4, 32))
        >>> pattern = sparsax.patterns.sliding_window(256, left=64, right=0, block=64)
        >>> o = sparsax.block_sparse_attention(q, k, v, pattern, causal=True)
        >>> o.shape
        (1, 256, 4, 32)
    """
    checks.attention_inputs(q, k, v)
    checks.pattern_fits(pattern, q, k)
    checks.window(window)
    checks.one_of("pruned", pruned, ("drop", "zero"))
    chosen = checks.implementation(implementation, default_implementation(q, pattern))
    if chosen == "pallas":
        checks.kernel_runs(pallas.refusal(q, pattern.block_q, pattern.block_kv))
    q_ids, kv_ids = _segments(q, k, segment_ids, key_mask)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)

    if chosen == "reference":
        mask, valid = pattern.to_mask(), pattern.valid()
        o, lse = reference.block_sparse_attention(
            q, k, v, mask, q_ids, kv_ids, scale=scale, causal=causal, window=window, pruned=pruned
        )
        # A factor, so that the gradients of an invalid head are NaN as well.
        poison = jnp.where(valid, 1.0, jnp.nan).repeat(q.shape[2] // pattern.num_heads)
        o, lse = (o * poison[:, None]).astype(q.dtype), lse * poison
    else:
        # `checks.pattern_fits` has seen the values of concrete lists.
        unknown = not is_concrete(pattern.kv_num_blocks)
        asked = chosen == "pallas" and pallas.asks_lists(q, k, pattern, q_ids, causal, window)
        if unknown and not asked:
            pattern = pattern.invalidate(~pattern.valid())
        if chosen == "xla":  # kernels leave out themselves what nobody sees
            pattern = _trim(pattern, causal, window)
        log_pruned = None
        if pruned == "zero":
            counts = xla.pruned_counts(
                pattern.to_block_mask(), q_ids, kv_ids, **pattern.geometry, causal=causal,
                window=window,
            )  # fmt: skip
            log_pruned = jnp.log(counts).repeat(q.shape[2] // pattern.num_heads, axis=1)
        interpret = pallas.interpret() if chosen == "pallas" else None
        call = _Call(
            chosen, pattern.block_q, pattern.block_kv, scale, causal, window, interpret,
            asked and unknown,
        )  # fmt: skip
        q, k, v = xla.vary_alike((q, k, v), *jax.tree.leaves((pattern, q_ids, kv_ids)))
        o, lse = _attend(call, q, k, v, pattern, q_ids, kv_ids, log_pruned)
        lse = lse.swapaxes(1, 2)
    return (o, lse) if return_lse else o


def score_map(
    q: Query,
    k: Key,
    *,
    scale: float | None = None,
    causal: bool = False,
    segment_ids: SegmentIds | None = None,
    key_mask: Bool[Array, "B S"] | None = None,
    per_head: bool = False,
    pool: int | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "P T S"] | Float[Array, "P I J"]:
    """The softmax probabilities of dense attention, averaged over the batch and the heads.

    What SPION's pattern search reads. The maps of all heads are never held at once: probabilities
    are added up as they are computed. No gradient flows through the map.

    Args:
        q: queries `[B, T, N, H]`.
        k: keys `[B, S, K, H]`.
        scale: factor of the logits; `1 / sqrt(H)` when None.
        causal: a query sees keys of its own index and below only.
        segment_ids: as for `block_sparse_attention`.
        key_mask: False for keys that are padding. In self-attention (T = S) the rows of padded
            queries count as zeros in the average.
        per_head: one map for each of the N heads rather than their mean.
        pool: tokens in a block, to get the mean of every block alone (of its real entries, where
            the last ones are ragged): what SPION's variant F searches,
            `patterns.spion.search(..., variant="F", block=pool, length=T)`. Nothing of size T x S
            is held then.
        implementation: "reference" (dense, float32), "xla" (any device), "pallas" (Hopper GPUs;
            bfloat16 or float16, head features 32, 64, 96, 128 or 256, `pool` a multiple of 8), or
            None for "pallas" where it can and "xla" elsewhere. A name runs or raises.

    Returns:
        The map, float32 `[1, T, S]`, or `[N, T, S]` per head; with `pool` its blocks' means,
        `[P, ceil(T / pool), ceil(S / pool)]`.

    Raises:
        ValueError: shapes, dtypes, a block size or a name are wrong.
        NotImplementedError: the named implementation cannot do this.

    Example:
        >>> import jax
        >>> import sparsax
        >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 256, 4, 32))
        >>> sparsax.score_map(q, k).shape, sparsax.score_map(q, k, pool=32).shape
        ((1, 256, 256), (1, 8, 8))
    """
    checks.attention_inputs(q, k, k)
    checks.pool(pool)
    refused = pallas.score_map_refusal(q, pool)
    chosen = checks.implementation(implementation, "xla" if refused else "pallas")
    if chosen == "pallas":
        checks.kernel_runs(refused)
    q_ids, kv_ids = _segments(q, k, segment_ids, key_mask)
    if key_mask is not None and q_ids is not None and q.shape[1] == k.shape[1]:
        q_ids = jnp.where(key_mask, q_ids, -2)  # matches nothing: the row of a padded query is 0
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    module = {"reference": reference, "xla": xla, "pallas": pallas}[chosen]
    options = {"interpret": pallas.interpret()} if chosen == "pallas" else {}
    q, k = jax.lax.stop_gradient((q, k))
    return module.score_map(
        q, k, q_ids, kv_ids, scale=scale, causal=causal, per_head=per_head, pool=pool, **options
    )


def default_implementation(
    q: Query | Float[ArrayLike, "*B D"],
    pattern: BlockPattern | CompoundPattern | Codes | TiledFactors,
) -> Implementation:
    """The implementation that `implementation=None` runs for these queries and this pattern.

    "pallas" on a Hopper GPU for the dtypes, head features, blocks, parts and codes that its kernels
    cover, else "xla". It follows from shapes and from the machine alone, never from values.

    Args:
        q: queries `[B, T, N, H]`; or the inputs of `tsvd_matmul`, `[*B, D]`.
        pattern: of `block_sparse_attention`, or of `compound_attention`; or the codes of
            `top_l_attention`; or the factors of `tsvd_matmul`, whose gradients are
            always "xla", as are few rows under `jax.vmap` and what has an activation that the
            kernels lack.

    Raises:
        ValueError: it is none of these.

    Example:
        >>> import jax.numpy as jnp
        >>> import sparsax
        >>> q = jnp.zeros((1, 256, 4, 64), jnp.bfloat16)
        >>> sparsax.default_implementation(q, sparsax.patterns.causal(256, block=64))
        'xla'
    """
    if isinstance(pattern, CompoundPattern):
        refused = pallas.compound.refusal(q, pattern)
    elif isinstance(pattern, Codes):
        refused = pallas.top_l.refusal(q, pattern)
    elif isinstance(pattern, TiledFactors):
        return "pallas" if pallas.tsvd_is_faster(q, pattern.u, pattern.v, None) else "xla"
    elif isinstance(pattern, BlockPattern):
        refused = pallas.refusal(q, pattern.block_q, pattern.block_kv)
    else:
        raise ValueError(
            "pattern must be a sparsax.BlockPattern, a sparsax.CompoundPattern, codes of "
            f"ProductQuantizer.codes, or sparsax.TiledFactors; got {type(pattern).__name__}."
        )
    return "pallas" if refused is None else "xla"


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static part of a call, hashable for `custom_vjp`."""

    implementation: Implementation
    block_q: int
    block_kv: int
    scale: float
    causal: bool
    window: Window | None
    interpret: typing.Any  # of the kernels; None on hardware
    asked: bool  # whether the kernels are to find what lists are not to be used

    @property
    def module(self):
        return {"xla": xla, "pallas": pallas}[self.implementation]

    @property
    def static(self):
        names = ["block_q", "block_kv", "scale", "causal", "window"]
        names += ["interpret"] if self.implementation == "pallas" else []
        return {name: getattr(self, name) for name in names}

    def forward(self, q, k, v, pattern, q_ids, kv_ids):
        """`(o, lse [B, N, T])`, and what to save of the latter: kernels have their own form."""
        lists, ids = (pattern.kv_num_blocks, pattern.kv_indices), (q_ids, kv_ids)
        if self.implementation == "xla":
            o, lse = xla.forward(q, k, v, *lists, *ids, **self.static)
            return o, lse, lse
        lists = *lists, pattern.q_num_blocks, pattern.q_indices
        o, saved = pallas.forward(q, k, v, *lists, *ids, asked=self.asked, **self.static)
        return o, saved.natural(q.shape[1]), saved


def _attend_values(call: _Call, q, k, v, pattern, q_ids, kv_ids, log_pruned) -> tuple[Array, Array]:
    """`(o, lse [B, N, T])`; `log_pruned [B or 1, N, T]` joins the softmax as a sink."""
    return _attend_forward(call, q, k, v, pattern, q_ids, kv_ids, log_pruned)[0]


_attend = jax.custom_vjp(_attend_values, nondiff_argnums=(0,))  # as a decorator it loses the types


def _attend_forward(call, q, k, v, pattern, q_ids, kv_ids, log_pruned):
    o, lse, saved = call.forward(q, k, v, pattern, q_ids, kv_ids)
    if log_pruned is not None:
        # Z = Z_kept + n_pruned exp(0): o = o_kept * Z_kept / Z, an attention sink with value 0.
        total = jnp.logaddexp(lse, log_pruned)
        share = jnp.where(total == -jnp.inf, 0.0, jnp.exp(lse - total))
        o = (o * share.swapaxes(1, 2)[..., None]).astype(o.dtype)
        lse, saved = total, total if call.implementation == "xla" else saved.of_natural(total)
    return (o, lse), (q, k, v, pattern, q_ids, kv_ids, o, saved)


def _attend_backward(call, residuals, cotangents):
    q, k, v, pattern, q_ids, kv_ids, o, saved = residuals
    # The sink's logit is a constant, so the kept pairs' gradient needs only the total lse.
    dq, dk, dv = call.module.backward(
        q, k, v, o, saved, *cotangents, pattern.kv_num_blocks, pattern.kv_indices,
        pattern.q_num_blocks, pattern.q_indices, q_ids, kv_ids, **call.static,
    )  # fmt: skip
    return dq, dk, dv, None, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _segments(q, k, segment_ids, key_mask):
    """Ids of queries and keys that must be equal, or `(None, None)`; padded keys get -1."""
    checks.segments(q, k, segment_ids, key_mask)
    if segment_ids is None and key_mask is None:
        return None, None
    if segment_ids is None:
        q_ids = jnp.zeros(q.shape[:2], jnp.int32)
        kv_ids = jnp.zeros(k.shape[:2], jnp.int32)
    else:
        q_ids, kv_ids = segment_ids if isinstance(segment_ids, tuple) else (segment_ids,) * 2
    kv_ids = kv_ids if key_mask is None else jnp.where(key_mask, kv_ids, -1)
    return q_ids.astype(jnp.int32), kv_ids.astype(jnp.int32)


def _trim(pattern: BlockPattern, causal: bool, window: Window | None) -> BlockPattern:
    """The pattern without the blocks that causality or the window leaves empty.

    Lists are ascending, so what stays is one run of each list: shift it to the front.
    """
    left, right = (None, None) if window is None else window
    if causal:
        right = 0 if right is None else min(right, 0)
    if left is None and right is None:
        return pattern
    # Key block j meets query block i when first key <= last query + right, last key >= first
    # query - left; for key blocks the two sides change roles.
    kv = _run(pattern.kv_num_blocks, pattern.kv_indices, pattern.block_q, pattern.block_kv,
              left, right)  # fmt: skip
    q = _run(pattern.q_num_blocks, pattern.q_indices, pattern.block_kv, pattern.block_q,
             right, left)  # fmt: skip
    return dataclasses.replace(
        pattern, kv_num_blocks=kv[0], kv_indices=kv[1], q_num_blocks=q[0], q_indices=q[1]
    )


def _run(counts, indices, block_row, block_col, before, after):
    """Counts and lists cut to the columns within `[first row - before, last row + after]`."""
    first_row = (jnp.arange(counts.shape[-1]) * block_row)[:, None]
    used = jnp.arange(indices.shape[-1]) < counts[..., None]
    skipped, kept = jnp.zeros_like(used), used
    if before is not None:
        skipped = used & (indices * block_col + block_col - 1 < first_row - before)
        kept &= ~skipped
    if after is not None:
        kept &= indices * block_col <= first_row + block_row - 1 + after
    start = skipped.sum(-1, keepdims=True)
    slots = jnp.minimum(start + jnp.arange(indices.shape[-1]), indices.shape[-1] - 1)
    count = jnp.where(counts < 0, counts, kept.sum(-1, dtype=counts.dtype))
    return count, jnp.take_along_axis(indices, slots, axis=-1)
