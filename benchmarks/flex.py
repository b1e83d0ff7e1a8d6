"""PyTorch's FlexAttention with a block mask, tuned as far as it tunes itself: the peer to beat."""

from collections.abc import Callable

import numpy as np
from gpu import queued_milliseconds


def flex_attention(heads: int, length: int, features: int, block: int) -> Callable:
    """A function of a boolean block mask `[heads, I, J]`: `(forward, forward + backward)` in ms.

    Every listed block is a full block: its kernels apply no mask, as ours do. bfloat16, batch 1,
    compiled with max-autotune for these sizes, once for all masks.
    """
    import torch
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    attend = torch.compile(flex_attention, mode="max-autotune-no-cudagraphs", dynamic=False)
    shape = 1, heads, length, features
    q, k, v, do = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))

    def milliseconds(run) -> float:
        return queued_milliseconds(run, torch.cuda.synchronize, calls=10)

    def measure(mask: np.ndarray) -> tuple[float, float]:
        counts, indices = mask.sum(-1), np.argsort(~mask, -1, kind="stable")
        counts, indices = (
            torch.tensor(x[None], dtype=torch.int32, device="cuda") for x in (counts, indices)
        )
        none = torch.zeros_like(counts)
        lists = BlockMask.from_kv_blocks(none, indices, counts, indices, BLOCK_SIZE=block)
        forward = lambda: attend(q, k, v, block_mask=lists)

        def both():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            attend(*leaves, block_mask=lists).backward(do)

        with torch.no_grad():
            alone = milliseconds(forward)
        return alone, milliseconds(both)

    return measure
