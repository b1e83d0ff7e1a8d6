"""Arguments that an operation cannot take, refused with what must hold and what was given."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from sparsax.compound import CompoundPattern
from sparsax.layouts import BlockPattern
from sparsax.lowrank import CommonFactors, TiledFactors
from sparsax.routing import FFNBlocks, FFNLoRA, RoutingPlan
from sparsax.typing import Implementation, known

IMPLEMENTATIONS = ("reference", "xla", "pallas")
DTYPES = ("float32", "bfloat16", "float16")


def one_of(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Refuses a value that is not among the allowed ones."""
    if value not in (allowed := tuple(allowed)):
        raise ValueError(f"{name} must be one of {allowed}; got {value!r}.")


def implementation(name: Implementation | None, default: Implementation) -> Implementation:
    """The implementation that runs: the named one, or the default for None."""
    if name is None:
        return default
    one_of("implementation", name, (None, *IMPLEMENTATIONS))
    return name


def kernel_runs(refusal: str | None) -> None:
    """Refuses implementation='pallas' for what its kernels cannot do, naming what can."""
    if refusal is not None:
        raise NotImplementedError(
            f"implementation='pallas' {refusal}. implementation='xla' runs this on every device."
        )


def attention_inputs(q, k, v) -> None:
    """Refuses q, k, v that do not belong together."""
    if q.ndim != 4 or k.ndim != 4:
        raise ValueError(
            "q must be [B, T, N, H] and k, v [B, S, K, H]; "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}."
        )
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape; got {tuple(k.shape)} and {tuple(v.shape)}.")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "q and k must agree in batch B and head features H; "
            f"got q {tuple(q.shape)} and k {tuple(k.shape)}."
        )
    if k.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"the number of query heads N must be a multiple of the kv heads K; "
            f"got N={q.shape[2]} and K={k.shape[2]}."
        )
    dtypes = {str(x.dtype) for x in (q, k, v)}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        raise ValueError(
            f"q, k, v must share one dtype of {DTYPES}; "
            f"got {q.dtype}, {k.dtype}, {v.dtype}. Cast with x.astype(jnp.float32)."
        )


def pool(size: int | None) -> None:
    """Refuses a block size to pool over that is none."""
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise ValueError(f"pool must be None or a block size of at least 1 token; got {size!r}.")


def pattern_fits(pattern: BlockPattern, q, k) -> None:
    """Refuses a pattern that was made for other lengths or heads, or that is not usable."""
    if not isinstance(pattern, BlockPattern):
        raise ValueError(
            "pattern must be a sparsax.BlockPattern (see sparsax.patterns, or "
            f"BlockPattern.from_block_mask); got {type(pattern).__name__}."
        )
    if pattern.kv_num_blocks.ndim != 2:
        raise ValueError(
            "pattern must be single, with kv_num_blocks [P, I]; got a stacked one of shape "
            f"{tuple(pattern.kv_num_blocks.shape)}. Scan over it, or take one of unstack()."
        )
    if (pattern.q_len, pattern.kv_len) != (q.shape[1], k.shape[1]):
        raise ValueError(
            f"pattern is for q_len={pattern.q_len}, kv_len={pattern.kv_len}; "
            f"got q of length {q.shape[1]} and k of length {k.shape[1]}."
        )
    heads, kv_heads, mine = q.shape[2], k.shape[2], pattern.num_heads
    if heads % mine or (mine % kv_heads and kv_heads % mine):
        raise ValueError(
            f"a pattern's heads P must be 1, K={kv_heads} or N={heads} (or divide them evenly); "
            f"got P={mine}."
        )
    if known(lambda *_: pattern.valid(), *jax.tree.leaves(pattern)) is False:
        raise ValueError(
            "pattern is not valid: a list overflowed its capacity or was marked invalid under "
            "jit (see BlockPattern.valid()). Build it with kv_width=None, q_width=None, or from "
            "a finite score map."
        )


def compound_fits(pattern: CompoundPattern, q, k) -> None:
    """Refuses a compound pattern for another length, batch or heads, or that is not usable."""
    if not isinstance(pattern, CompoundPattern):
        raise ValueError(
            "pattern must be a sparsax.CompoundPattern (see sparsax.patterns.compound, or "
            f"CompoundPattern.from_parts(T, blocks=...)); got {type(pattern).__name__}."
        )
    if pattern.num_rows.ndim != 1 or pattern.num_columns.ndim != 1:
        raise ValueError(
            "pattern must be single, with rows [B, R]; got a stacked one of shape "
            f"{tuple(pattern.rows.shape)}. Scan over it."
        )
    if not pattern.seq_len == q.shape[1] == k.shape[1]:
        raise ValueError(
            f"pattern is for seq_len={pattern.seq_len}; got q of length {q.shape[1]} and k of "
            f"length {k.shape[1]}."
        )
    masks = [] if pattern.token_mask is None else [pattern.token_mask]
    batches = {len(x) for x in (pattern.columns, pattern.rows, *masks)}
    if not batches <= {1, q.shape[0]}:
        raise ValueError(
            f"the pattern's batch must be 1 or that of q, B={q.shape[0]}; got {sorted(batches)}."
        )
    heads = {x.num_heads for x in (pattern.blocks, pattern.elements) if x is not None}
    kv_heads, most = k.shape[2], pattern.num_heads
    if not heads <= {1, most} or q.shape[2] % most or (most % kv_heads and kv_heads % most):
        raise ValueError(
            f"heads P of blocks and elements must be 1, K={kv_heads} or N={q.shape[2]} (or divide "
            f"them evenly) and agree; got {sorted(heads)}."
        )
    if known(lambda *_: pattern.valid(), *jax.tree.leaves(pattern)) is False:
        raise ValueError(
            "pattern is not valid: positions were outside the sequence, or a count outside its "
            "capacity, under jit (see CompoundPattern.valid())."
        )


def global_projections(projected, pattern: CompoundPattern, q, k) -> None:
    """Refuses q_global, k_global, v_global that are not given together or do not fit."""
    names = "q_global [B, R, N, H], k_global and v_global [B, T, K, H]"
    if all(x is None for x in projected):
        return
    if any(x is None for x in projected):
        raise ValueError(
            f"{names} must be given together; got "
            f"{[None if x is None else tuple(x.shape) for x in projected]}."
        )
    want = [(q.shape[0], pattern.rows.shape[-1], *q.shape[2:]), k.shape, k.shape]
    got = [tuple(x.shape) for x in projected]
    if got != [tuple(x) for x in want]:
        raise ValueError(
            f"{names} must have shapes {[tuple(x) for x in want]}; got {got}. q_global is a "
            "projection of pattern.take_rows(x)."
        )
    if any(x.dtype != q.dtype for x in projected):
        raise ValueError(
            f"{names} must have q's dtype {q.dtype}; got {[str(x.dtype) for x in projected]}."
        )


def window(value) -> None:
    """Refuses a window that is not a pair of non-negative ints or Nones."""
    good = isinstance(value, tuple) and len(value) == 2
    good = good and all(x is None or (type(x) is int and x >= 0) for x in value)
    if value is not None and not good:
        raise ValueError(
            f"window must be (left, right) with non-negative ints or None; got {value!r}."
        )


def segments(q, k, segment_ids, key_mask) -> None:
    """Refuses segment ids and key masks whose shape or dtype does not fit q and k."""
    if segment_ids is not None:
        pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids,) * 2
        want = (q.shape[:2], k.shape[:2])
        got = tuple(tuple(x.shape) for x in pair)
        if len(pair) != 2 or got != want:
            raise ValueError(
                f"segment_ids must be [B, T]={want[0]} for queries and [B, S]={want[1]} for "
                f"keys (one array when T = S, else a pair); got {got}."
            )
        for ids in pair:
            if not jnp.issubdtype(ids.dtype, jnp.integer):
                raise ValueError(f"segment_ids must be integers; got {ids.dtype}.")
            if known(lambda x: x >= 0, ids) is False:
                raise ValueError("segment_ids must be non-negative; got a negative one.")
    if key_mask is not None and (key_mask.shape != k.shape[:2] or key_mask.dtype != bool):
        raise ValueError(
            f"key_mask must be boolean [B, S]={tuple(k.shape[:2])}, False where padding; "
            f"got {key_mask.dtype} {tuple(key_mask.shape)}."
        )


def linear_inputs(x, factors, kind: type[TiledFactors] | type[CommonFactors], bias) -> None:
    """Refuses x, factors and bias that do not belong together."""
    if not isinstance(factors, kind):
        made_by = "tsvd" if kind is TiledFactors else "tsvd_common"
        raise ValueError(
            f"factors must be sparsax.{kind.__name__}, from sparsax.{made_by}; "
            f"got {type(factors).__name__}."
        )
    ranks = {leaf.ndim for leaf in jax.tree.leaves(factors)}
    if ranks != ({4} if kind is TiledFactors else {2, 3}):
        shapes = [tuple(leaf.shape) for leaf in jax.tree.leaves(factors)]
        raise ValueError(
            f"factors must be those of one matrix; got stacked ones of shapes {shapes}. "
            "Scan or vmap over them."
        )
    if x.ndim < 1 or x.shape[-1] != factors.in_features:
        raise ValueError(
            f"x must end in the factors' D={factors.in_features} input features; "
            f"got {tuple(x.shape)}."
        )
    dtypes = {str(array.dtype) for array in (x, *jax.tree.leaves(factors))}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        raise ValueError(
            f"x and factors must share one dtype of {DTYPES}; got {x.dtype} and "
            f"{', '.join(str(leaf.dtype) for leaf in jax.tree.leaves(factors))}. "
            "Cast with factors.astype(x.dtype)."
        )
    if bias is not None and bias.shape != (factors.out_features,):
        raise ValueError(
            f"bias must have the factors' F={factors.out_features} output features; "
            f"got {tuple(bias.shape)}."
        )


def grouped_inputs(x, w, group_sizes, bias, transpose_w: bool) -> None:
    """Refuses x, w, group sizes and bias that do not belong together."""
    wanted = "w must be [G, F, D] with transpose_w" if transpose_w else "w must be [G, D, F]"
    if x.ndim != 2 or w.ndim != 3 or w.shape[2 if transpose_w else 1] != x.shape[1]:
        raise ValueError(
            f"x must be [M, D] and {wanted}; got {tuple(x.shape)} and {tuple(w.shape)}."
        )
    _one_dtype("x and w", x, w)
    _sizes_fit(group_sizes, x.shape[0])
    groups, features = w.shape[0], w.shape[1 if transpose_w else 2]
    if group_sizes.shape != (groups,) or groups < 1:
        raise ValueError(
            f"group_sizes must be [G] with one size for each of w's G={groups} >= 1 matrices; "
            f"got {tuple(group_sizes.shape)}."
        )
    if bias is not None and bias.shape != (groups, features):
        raise ValueError(f"bias must be [G, F]={(groups, features)}; got {tuple(bias.shape)}.")


def grouped_rows(x, dy, group_sizes) -> None:
    """Refuses x, dy and group sizes that do not belong together."""
    if x.ndim != 2 or dy.ndim != 2 or len(x) != len(dy):
        raise ValueError(
            f"x must be [M, D] and dy [M, F]; got {tuple(x.shape)} and {tuple(dy.shape)}."
        )
    _one_dtype("x and dy", x, dy)
    _sizes_fit(group_sizes, x.shape[0])


def _one_dtype(names: str, a, b) -> None:
    if a.dtype != b.dtype or str(a.dtype) not in DTYPES:
        raise ValueError(f"{names} must share one dtype of {DTYPES}; got {a.dtype} and {b.dtype}.")


def _sizes_fit(group_sizes, rows: int) -> None:
    integer = jnp.issubdtype(group_sizes.dtype, jnp.integer)
    if group_sizes.ndim != 1 or group_sizes.shape[0] < 1 or not integer:
        raise ValueError(
            "group_sizes must be integers [G], G >= 1; "
            f"got {group_sizes.dtype} {tuple(group_sizes.shape)}."
        )
    if known(lambda x: (x >= 0) & (x.sum() <= rows), group_sizes) is False:
        raise ValueError(
            f"group_sizes must be non-negative and sum to at most M={rows}; "
            f"got {group_sizes.tolist()}."
        )


def ffn_inputs(x, weights: FFNBlocks, plan: RoutingPlan, lora: FFNLoRA | None) -> None:
    """Refuses x, weights, plan and LoRA of a routed layer that do not belong together."""
    made_by = {"weights": "split_ffn", "plan": "route_top_k", "lora": "FFNLoRA.init"}
    kinds = {"weights": FFNBlocks, "plan": RoutingPlan, "lora": FFNLoRA | None}
    for name, value in {"weights": weights, "plan": plan, "lora": lora}.items():
        if not isinstance(value, kinds[name]):
            raise ValueError(
                f"{name} must come from sparsax.{made_by[name]}; got {type(value).__name__}."
            )
    if weights.w_up.ndim != 3 or plan.order.ndim != 1:
        raise ValueError(
            "weights and plan must be those of one layer; got stacked ones, w_up of shape "
            f"{tuple(weights.w_up.shape)} and order of {tuple(plan.order.shape)}. Scan or vmap "
            "over them."
        )
    if x.ndim < 1 or x.shape[-1] != weights.features:
        raise ValueError(
            f"x must end in the weights' D={weights.features} features; got {tuple(x.shape)}."
        )
    if plan.blocks.shape[:-1] != x.shape[:-1] or plan.num_blocks != weights.num_blocks:
        raise ValueError(
            f"the plan must be for x's tokens {tuple(x.shape[:-1])} and the weights' "
            f"G={weights.num_blocks} blocks; got one for {tuple(plan.blocks.shape[:-1])} and "
            f"G={plan.num_blocks}."
        )
    arrays = (x, *jax.tree.leaves((weights, lora)))
    dtypes = {str(array.dtype) for array in arrays}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        raise ValueError(
            f"x, weights and lora must share one dtype of {DTYPES}; got {x.dtype} and "
            f"{sorted(dtypes - {str(x.dtype)})}. Cast with weights.astype(x.dtype)."
        )
    if lora is not None and (_lora_shapes(lora) != _wanted_lora(weights, lora)):
        raise ValueError(
            f"lora must fit the weights: {_wanted_lora(weights, lora)}; got {_lora_shapes(lora)}."
        )


def _lora_shapes(lora: FFNLoRA) -> dict[str, tuple[int, ...] | None]:
    names = ("up_a", "up_b", "gate_a", "gate_b", "down_a", "down_b")
    shape = lambda array: None if array is None else tuple(array.shape)
    return {name: shape(getattr(lora, name)) for name in names}


def _wanted_lora(weights: FFNBlocks, lora: FFNLoRA) -> dict[str, tuple[int, ...] | None]:
    count, features, unit = weights.w_up.shape
    rank, gated = lora.up_a.shape[-1], weights.w_gate is not None
    first, second = (features, rank), (count, rank, unit)
    return {
        "up_a": first, "up_b": second, "gate_a": first if gated else None,
        "gate_b": second if gated else None, "down_a": (count, unit, rank),
        "down_b": (rank, features),
    }  # fmt: skip
