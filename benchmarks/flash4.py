"""FlashAttention-4's block-sparse kernels for Hopper, from the package flash-attn-4 (CuTe DSL)."""

from collections.abc import Callable

import numpy as np
from gpu import replayed_milliseconds


def flash4_attention(heads: int, length: int, features: int, block: int) -> Callable:
    """A function of a boolean block mask `[heads, I, J]`: `(forward, forward + backward)` in ms.

    Every listed block is a full block, as ours are. bfloat16, batch 1; the backward pass is the
    default one, which adds dQ up in whatever order thread blocks come. The output of one call, with
    every block listed, is held to that of dense attention.
    """
    import torch
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import flash_attn_func

    shape = 1, length, heads, features
    q, k, v, do = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))

    def lists(mask: np.ndarray) -> BlockSparseTensorsTorch:
        counts, indices = mask.sum(-1), np.argsort(~mask, -1, kind="stable")
        counts, indices = (
            torch.tensor(x[None], dtype=torch.int32, device="cuda") for x in (counts, indices)
        )
        none = torch.zeros_like(counts)
        return BlockSparseTensorsTorch(none, indices, counts, indices, block_size=(block, block))

    every = np.ones((heads, length // block, length // block), bool)
    with torch.no_grad():
        listed = flash_attn_func(q, k, v, block_sparse_tensors=lists(every))[0]
        turned = (x.transpose(1, 2) for x in (q, k, v))
        dense = torch.nn.functional.scaled_dot_product_attention(*turned).transpose(1, 2)
        torch.testing.assert_close(listed, dense, atol=2e-2, rtol=2e-2)

    def measure(mask: np.ndarray) -> tuple[float, float]:
        by_rows, by_columns = lists(mask), lists(mask.swapaxes(1, 2))
        options = {"block_sparse_tensors": by_rows, "block_sparse_tensors_bwd": by_columns}

        def both():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            flash_attn_func(*leaves, **options)[0].backward(do)
            return [x.grad for x in leaves]

        with torch.no_grad():
            alone = replayed_milliseconds(lambda: flash_attn_func(q, k, v, **options)[:1])
        return alone, replayed_milliseconds(both)

    return measure
