"""The routed feed-forward layer: every token through every block, and what it did not choose is 0.

w_up `[G, D, E]`, w_down `[G, E, D]`; blocks and coefficients `[N, k]`, block G is none at all.
"""

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


def routed_ffn(x, weights, lora, blocks, coefficients, *, scaled, activation):
    """`sum over chosen g of c_g FFN_g(x), + b_down`, float32 `[N, D]`; 0 for tokens of no block."""
    chosen = blocks[..., None] == jnp.arange(len(weights.w_up))  # N k G
    c = jnp.where(chosen, coefficients[..., None], 0.0).sum(1)
    inner, outer = (c, jnp.ones_like(c)) if scaled == "products" else (jnp.ones_like(c), c)
    scale = 0.0 if lora is None else lora.scale

    def product(w, bias, a, b):
        y = _einsum("nd,gde->nge", x, w) + (0 if bias is None else bias.astype(jnp.float32))
        low = 0 if lora is None else scale * _einsum("nd,dr,gre->nge", x, a, b)
        return inner[..., None] * y + low

    name = lambda n: None if lora is None else getattr(lora, n)
    h = product(weights.w_up, weights.b_up, name("up_a"), name("up_b"))
    gated = weights.w_gate is not None
    gate = product(weights.w_gate, weights.b_gate, name("gate_a"), name("gate_b")) if gated else h
    h = jnp.where(chosen.any(1)[..., None], activation(gate) * (h if gated else 1.0), 0.0)
    h = outer[..., None] * h
    y = _einsum("nge,ged->nd", inner[..., None] * h, weights.w_down)
    y = y if lora is None else y + scale * _einsum("nge,ger,rd->nd", h, lora.down_a, lora.down_b)
    y = y if weights.b_down is None else y + weights.b_down.astype(jnp.float32)
    return jnp.where(chosen.any((1, 2))[:, None], y, 0.0)


def _einsum(spec, *arrays):
    return jnp.einsum(spec, *(a.astype(jnp.float32) for a in arrays), precision=HIGHEST)
