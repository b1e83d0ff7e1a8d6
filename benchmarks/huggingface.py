"""Hugging Face's Longformer self-attention in PyTorch, as a peer."""

from typing import Any

import numpy as np
from timing import queued_milliseconds


def longformer_attention(
    chosen: np.ndarray, heads: int, features: int, window: int
) -> dict[str, Any]:
    """Milliseconds of forward alone and of forward and backward, projections among them.

    bfloat16; gradients are those of the input and of all parameters. Its output projection is
    another module's, and not timed.

    Args:
        chosen: True where a token is global, `[B, T]`; T a multiple of twice the window.
        heads: N.
        features: of a head.
        window: one-sided.
    """
    import torch
    import transformers
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    (batch, length), width = chosen.shape, heads * features
    config = LongformerConfig(
        hidden_size=width, num_attention_heads=heads, num_hidden_layers=1,
        attention_window=[2 * window], attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    layer = LongformerSelfAttention(config, layer_id=0).to("cuda", torch.bfloat16)
    x, dy = torch.randn((2, batch, length, width), device="cuda", dtype=torch.bfloat16)
    is_global = torch.tensor(chosen, device="cuda")
    # Its convention: above 0 is global, below 0 is padding.
    arguments = {
        "attention_mask": is_global.to(torch.bfloat16), "is_index_global_attn": is_global,
        "is_index_masked": torch.zeros_like(is_global), "is_global_attn": bool(chosen.any()),
    }  # fmt: skip
    forward = lambda leaf: layer(leaf, **arguments)[0]

    def both():
        layer.zero_grad(set_to_none=True)
        forward(x.detach().requires_grad_()).backward(dy)

    wait = torch.cuda.synchronize
    with torch.no_grad():
        alone = queued_milliseconds(lambda: forward(x), wait)
    return {
        "forward_ms": alone, "both_ms": queued_milliseconds(both, wait),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }  # fmt: skip
