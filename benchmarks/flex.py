"""PyTorch's FlexAttention with a block mask, tuned as far as it tunes itself: the peer to beat."""

from collections.abc import Callable
from typing import Any

import numpy as np
from timing import replayed_milliseconds


def flex_attention(heads: int, length: int, features: int, block: int) -> Callable:
    """A function of a boolean block mask `[heads, I, J]`: `(forward, forward + backward)` in ms.

    Every listed block is a full block: its kernels apply no mask, as ours do. bfloat16, batch 1,
    compiled with max-autotune for these sizes, once for all masks.
    """
    measure = _timer((1, heads, length, features))
    return lambda mask: measure(listed(mask, block))


def listed(mask: np.ndarray, block: int):
    """The lists of full blocks of a boolean block mask."""
    import torch
    from torch.nn.attention.flex_attention import BlockMask

    counts, indices = mask.sum(-1), np.argsort(~mask, -1, kind="stable")
    counts, indices = (
        torch.tensor(x[None], dtype=torch.int32, device="cuda") for x in (counts, indices)
    )
    none = torch.zeros_like(counts)
    return BlockMask.from_kv_blocks(none, indices, counts, indices, BLOCK_SIZE=block)


def flex_compound(batch: int, heads: int, features: int, pattern) -> tuple[float, float]:
    """Milliseconds of exactly the pairs of a `CompoundPattern` as a `mask_mod`, the heads alike.

    Blocks that hold no pair are left out, blocks of pairs alone are not masked.
    """
    import torch
    from torch.nn.attention.flex_attention import create_block_mask

    spread = lambda x: np.broadcast_to(np.asarray(x), (batch, pattern.seq_len)).copy()
    is_row, is_column = (
        torch.tensor(spread(x), device="cuda") for x in (pattern.is_row(), pattern.is_column())
    )
    blocks = pattern.blocks
    table = blocks and torch.tensor(np.asarray(blocks.to_block_mask()[0]), device="cuda")

    def mask_mod(b, h, q, kv):
        kept = is_row[b, q] | is_column[b, kv]
        for band in pattern.bands:
            kept = kept | ((kv - q >= -band.left) & (kv - q <= band.right))
        if blocks is not None:
            kept = kept | table[q // blocks.block_q, kv // blocks.block_kv]
        return kept

    length = pattern.seq_len
    lists = torch.compile(create_block_mask)(mask_mod, batch, None, length, length, device="cuda")
    return _timer((batch, heads, length, features))(lists)


def _timer(shape: tuple[int, ...]) -> Callable[[Any], tuple[float, float]]:
    """Times q, k, v of a shape `[B, N, T, H]` under a block mask."""
    import torch

    calls = passes(shape)

    def measure(lists) -> tuple[float, float]:
        forward, both = calls(lists)
        with torch.no_grad():
            alone = replayed_milliseconds(forward)
        return alone, replayed_milliseconds(both)

    return measure


def passes(shape: tuple[int, ...]) -> Callable[[Any], tuple[Callable, Callable]]:
    """Calls of the forward pass and of both by block mask, of q, k, v of a shape `[B, N, T, H]`."""
    import torch
    from torch.nn.attention.flex_attention import flex_attention

    attend = torch.compile(flex_attention, mode="max-autotune-no-cudagraphs", dynamic=False)
    q, k, v, do = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))

    def of(lists):
        def both():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            attend(*leaves, block_mask=lists).backward(do)
            return [x.grad for x in leaves]

        return lambda: [attend(q, k, v, block_mask=lists)], both

    return of
