"""FlashAttention-4's block-sparse kernels for Hopper, from the package flash-attn-4 (CuTe DSL)."""

from collections.abc import Callable

import numpy as np
from timing import replayed_milliseconds


def flash4_attention(heads: int, length: int, features: int, block: int) -> Callable:
    """A function of a boolean block mask `[heads, I, J]`: `(forward, forward + backward)` in ms.

    Every listed block is a full block, as ours are. bfloat16, batch 1; the backward pass is the
    default one, which adds dQ up in whatever order thread blocks come. The output of one call, with
    every block listed, is held to that of dense attention.
    """
    import torch

    arrays = draw(heads, length, features)
    every = np.ones((heads, length // block, length // block), bool)
    with torch.no_grad():
        (listed,) = forward(arrays, every, block)()
        turned = (x.transpose(1, 2) for x in arrays[:3])
        dense = torch.nn.functional.scaled_dot_product_attention(*turned).transpose(1, 2)
        torch.testing.assert_close(listed, dense, atol=2e-2, rtol=2e-2)

    def measure(mask: np.ndarray) -> tuple[float, float]:
        with torch.no_grad():
            alone = replayed_milliseconds(forward(arrays, mask, block))
        return alone, replayed_milliseconds(both(arrays, mask, block))

    return measure


def draw(heads: int, length: int, features: int) -> list:
    """q, k, v and the cotangent of the output."""
    import torch

    shape = 1, length, heads, features
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]


def forward(arrays, mask: np.ndarray, block: int) -> Callable[[], list]:
    """A call of the forward pass."""
    from flash_attn.cute.interface import flash_attn_func

    lists = _lists(mask, block)
    return lambda: [flash_attn_func(*arrays[:3], block_sparse_tensors=lists)[0]]


def both(arrays, mask: np.ndarray, block: int) -> Callable[[], list]:
    """A call of both passes."""
    from flash_attn.cute.interface import flash_attn_func

    by_rows, by_columns = _lists(mask, block), _lists(mask.swapaxes(1, 2), block)
    options = {"block_sparse_tensors": by_rows, "block_sparse_tensors_bwd": by_columns}

    def run():
        leaves = [x.detach().requires_grad_() for x in arrays[:3]]
        flash_attn_func(*leaves, **options)[0].backward(arrays[3])
        return [x.grad for x in leaves]

    return run


def _lists(mask: np.ndarray, block: int):
    import torch
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    counts, indices = mask.sum(-1), np.argsort(~mask, -1, kind="stable")
    counts, indices = (
        torch.tensor(x[None], dtype=torch.int32, device="cuda") for x in (counts, indices)
    )
    none = torch.zeros_like(counts)
    return BlockSparseTensorsTorch(none, indices, counts, indices, block_size=(block, block))
