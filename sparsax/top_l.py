"""Attention over the best keys of every query: arguments, which implementation runs, gradient."""

import dataclasses
import functools
import typing

import jax
from jaxtyping import Array, Bool

from sparsax import checks, pallas, reference, xla
from sparsax.layouts import BlockPattern
from sparsax.patterns import topl
from sparsax.quantise import Codes
from sparsax.typing import Implementation, Key, Query, Value


def top_l_attention(
    q: Query,
    k: Key,
    v: Value,
    codes: Codes,
    *,
    keep: int,
    causal: bool = False,
    key_mask: Bool[Array, "B S"] | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Query:
    """Softmax attention of every query over the L keys that score best by their codes.

    The choice is exact: the L best by integer scores, the most recent of equals, the own key
    always, all keys where a query sees fewer than L. It is stored as two integers a query and found
    again from the codes, so memory is linear in the length. Scores of all pairs are computed: this
    saves memory, not time (`top_l_blocks` saves time). The kernels hold none of them in memory,
    neither for the choice nor for attention. Differentiable in reverse mode (the choice itself has
    no gradient), works under jit, vmap, scan, `jax.checkpoint` and shard_map (batch and heads), and
    is deterministic.

    Args:
        q: queries `[B, T, N, H]`: float32, bfloat16 or float16; softmax runs in float32.
        k: keys `[B, T, K, H]`; K divides N (grouped-query and multi-query attention).
        v: values, shaped as the keys.
        codes: `quantizer.codes(q, k, score=...)`, see `ProductQuantizer.codes`.
        keep: L, the keys that a query keeps, its own among them; the paper's choice is T / 8.
        causal: whether a query sees keys of its own index and below only.
        key_mask: False for keys that are padding.
        scale: factor of the logits; `1 / sqrt(H)` when None.
        implementation: "reference" (dense, float32), "xla" (any device), "pallas" (Hopper GPUs;
            bfloat16 or float16, head features 32, 64, 96 or 128, codes of score="match", at most 16
            of a token and head), or None for what `default_implementation(q, codes)` names. A name
            runs or raises: nothing falls back.

    Returns:
        `o [B, T, N, H]` in q's dtype. A query that keeps no key has o = 0 and zero gradients.

    Raises:
        ValueError: shapes, dtypes, lengths, codes or a name are wrong.
        NotImplementedError: the named implementation cannot do this.

    Source: Gui et al., "SPT" (arXiv 2312.10365), section 4.1.

    Example:
        >>> import jax
        >>> import sparsax
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 256, 4, 32))
        >>> quantizer = sparsax.ProductQuantizer.fit(jax.random.key(1), k)
        >>> codes = quantizer.codes(q, k, score="adc")
        >>> sparsax.top_l_attention(q, k, v, codes, keep=32, causal=True).shape
        (1, 256, 4, 32)
    """
    checks.attention_inputs(q, k, v)
    topl.check_codes(codes, keep, key_mask)
    got = codes.queries.shape[:3], codes.keys.shape[:3]
    if got != (q.shape[:3], k.shape[:3]):
        raise ValueError(
            f"codes must be those of these q and k, {q.shape[:3]} and {k.shape[:3]}; got codes of "
            f"{got[0]} and {got[1]}. Call quantizer.codes(q, k)."
        )
    refused = pallas.top_l.refusal(q, codes)
    chosen = checks.implementation(implementation, "xla" if refused else "pallas")
    if chosen == "pallas":
        checks.kernel_runs(refused)
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    if chosen == "reference":
        o = reference.top_l_attention(
            q, k, v, codes.query_codes, codes.key_codes, key_mask, keep=keep, causal=causal,
            scale=scale,
        )  # fmt: skip
        return o.astype(q.dtype)
    interpret = None
    if chosen == "pallas":
        interpret = pallas.interpret()
        tau, first = pallas.top_l.select(
            codes, key_mask, keep=keep, causal=causal, interpret=interpret
        )
    else:
        kept = topl.tokens(codes, keep=keep, causal=causal, key_mask=key_mask)
        tau, first = kept.tau, kept.first
    choice = codes.queries, codes.keys, tau, first, key_mask
    q, k, v = xla.vary_alike((q, k, v), *jax.tree.leaves(choice))
    return _attend(_Call(chosen, codes.num_codes, scale, causal, interpret), q, k, v, *choice)


def top_l_blocks(
    codes: Codes,
    *,
    keep: int,
    block: int = 64,
    voters: int | None = None,
    causal: bool = False,
    key_mask: Bool[Array, "B S"] | None = None,
    implementation: Implementation | None = None,
) -> BlockPattern:
    """The blocks of keys that hold most of the L best keys of the queries of a block, by vote.

    Queries of a block, of every head of a group, vote for the blocks of their L best keys. The own
    block and the first one (the sink) are always kept. All rows of blocks have
    `max(2, ceil(keep / block))` entries, as far as there are that many: what is kept costs the same
    for all data, and new data does not recompile. Scores of the voters with all keys are computed:
    with 8 voters in blocks of 128, a sixteenth of all pairs.

    Args:
        codes: of queries and keys, from `ProductQuantizer.codes`.
        keep: L, votes of a query and, rounded up to blocks, keys that it attends to.
        block: tokens in a block, of queries and of keys.
        voters: queries of a block that vote, every `block / voters`-th from its first on, at a cost
            in proportion; 8 when None, or as many of them as divide the block.
        causal: whether a query sees keys of its own index and below only. Give the attention over
            the pattern the same.
        key_mask: False where a token is padding: it neither votes nor is voted for.
        implementation: "xla" (any device; "reference" is the same, as whole numbers leave nothing
            to differ), "pallas" (Hopper GPUs; codes of score="match", at most 16 of a token and
            head, blocks of 32, 64 or 128), or None for "pallas" where it can and "xla" elsewhere. A
            name runs or raises.

    Returns:
        A stacked pattern, one for each sample with a pattern head for each kv head: `[B, K, I]`.
        `block_sparse_attention` takes one of them: vmap or `lax.map` over samples.

    Raises:
        ValueError: lengths, L, blocks, voters or a name are wrong.
        NotImplementedError: the named implementation cannot do this.

    Source: Gui et al., "SPT" (arXiv 2312.10365), section 4.1, for the scores.

    Example:
        >>> import jax
        >>> import sparsax
        >>> q, k = jax.random.normal(jax.random.key(0), (2, 1, 256, 4, 32))
        >>> quantizer = sparsax.ProductQuantizer.fit(jax.random.key(1), k, queries=q)
        >>> pattern = sparsax.top_l_blocks(quantizer.codes(q, k), keep=64, block=32, causal=True)
        >>> pattern.kv_num_blocks[0, 0].tolist()
        [1, 2, 2, 2, 2, 2, 2, 2]
    """
    stride = topl.check_votes(codes, keep, key_mask, block, voters)
    refused = pallas.top_l.votes_refusal(codes, block)
    chosen = checks.implementation(implementation, "xla" if refused else "pallas")
    static = {"keep": keep, "block": block, "stride": stride, "causal": causal}
    if chosen == "pallas":
        checks.kernel_runs(refused)
        found = pallas.top_l.votes(codes, key_mask, **static, interpret=pallas.interpret())
    else:
        found = topl.votes(codes, **static, key_mask=key_mask)
    return topl.elect(found, codes, **static)


@dataclasses.dataclass(frozen=True)
class _Call:
    """The static part of a call, hashable for `custom_vjp`."""

    implementation: Implementation
    num_codes: int
    scale: float
    causal: bool
    interpret: typing.Any  # of the kernels; None on hardware

    @property
    def functions(self):
        """Forward and backward, as functions of arrays."""
        static = {"num_codes": self.num_codes, "scale": self.scale, "causal": self.causal}
        functions = xla.top_l_forward, xla.top_l_backward
        if self.implementation == "pallas":
            functions = pallas.top_l.forward, pallas.top_l.backward
            static["interpret"] = self.interpret
        return tuple(functools.partial(f, **static) for f in functions)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: _Call, q, k, v, *choice):
    return _forward(call, q, k, v, *choice)[0]


def _forward(call, q, k, v, *choice):
    o, saved = call.functions[0](q, k, v, *choice)  # the log-sum-exps, in a form of its own
    return o, (q, k, v, o, saved, choice)


def _backward(call, residuals, do):
    q, k, v, o, saved, choice = residuals
    gradients = call.functions[1](q, k, v, o, saved, do, *choice)
    return *gradients, *(None for _ in choice)


_attend.defvjp(_forward, _backward)
