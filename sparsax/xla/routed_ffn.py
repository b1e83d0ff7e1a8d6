"""The routed feed-forward layer as grouped matmuls over choices sorted by block.

x `[N, D]` tokens, `weights` as `FFNBlocks`, `lora` as `FFNLoRA` or None, `plan` as `RoutingPlan`;
M = N * k sorted choices ("rows"). Gathers alone move rows, in both directions, so that two runs
give the same bits. Inputs may have 16 bits, sums have 32. Tokens of no block are rows past the last
group: products give 0 for them, and gradients leave them out.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp

from sparsax.xla.grouped_matmul import gmm, group_sums, tgmm
from sparsax.xla.walk import take


class _Product(typing.NamedTuple):
    """One of the matrices that x meets, its LoRA, and what became of both in the forward pass."""

    name: str  # "up" or "gate"
    base: typing.Any  # x w + bias, rows
    z: typing.Any  # with coefficient and LoRA, float32 rows
    low: typing.Any  # scale * x a, rows; None without LoRA


def routed_ffn_forward(x, weights, lora, plan, *, activation):
    """`sum over chosen g of c_g FFN_g(x), + b_down` in x's dtype; 0 for tokens of no block."""
    h, _ = _hidden(x, take(x, plan.tokens), weights, lora, plan, activation)
    c = plan.coefficients
    y = _sum_choices(gmm(h, weights.w_down, plan.group_sizes), plan, c)
    if lora is not None:
        y += lora.scale * _matmul("nr,rd->nd", _low_sum(h, lora, plan).astype(x.dtype), lora.down_b)
    y = y if weights.b_down is None else y + weights.b_down.astype(jnp.float32)
    return jnp.where(plan.mask()[:, None], y, 0.0).astype(x.dtype)


def routed_ffn_backward(x, weights, lora, plan, dy, *, activation, frozen: bool):
    """`(dx, dweights, dlora, dcoefficients)`; the hidden units are computed again.

    With `frozen`, dweights is None. Under jit, what is not asked for is not computed.
    """
    sizes, dtype, products = plan.group_sizes, x.dtype, plan.scaled == "products"
    xs, dys, c = take(x, plan.tokens), take(dy, plan.tokens), _sorted(plan)
    h, (parts, pull) = _hidden(x, xs, weights, lora, plan, activation)
    dh = gmm(dys, weights.w_down, sizes, transpose_w=True).astype(jnp.float32)
    low, dlow = 0.0, None
    if lora is not None:
        dlow = (lora.scale * _matmul("nd,rd->nr", dy, lora.down_b)).astype(dtype)
        dlow = take(dlow, plan.tokens)
        low = gmm(dlow, lora.down_a, sizes, transpose_w=True).astype(jnp.float32)
    # y = sum of c * (h w), so dc = (h w) dy = h (w dy): the product h w is not needed again.
    dc = (h * (dh if products else dh + low)).sum(1, dtype=jnp.float32)
    dz = pull(c * dh + low if products else c * (dh + low))
    h_scaled = (c * h).astype(dtype)
    dweights = None
    if not frozen:
        dweights = {"w_down": tgmm(h_scaled, dys, sizes), "b_down": dy.sum(0, dtype=jnp.float32)}
    dlora = {}
    if lora is not None:
        q = _low_sum(h, lora, plan).astype(dtype)
        dlora["down_a"] = tgmm(h if products else h_scaled, dlow, sizes)
        dlora["down_b"] = lora.scale * _matmul("nr,nd->rd", q, dy)
    dx = jnp.zeros((), jnp.float32)
    for part, d in zip(parts, dz, strict=True):
        name, dbase = part.name, (c * d if products else d).astype(dtype)
        dc += (d * part.base).sum(1, dtype=jnp.float32) if products else 0.0
        w = getattr(weights, f"w_{name}")
        dx += _sum_choices(gmm(dbase, w, sizes, transpose_w=True), plan)
        if dweights is not None:
            dweights |= {f"w_{name}": tgmm(xs, dbase, sizes), f"b_{name}": group_sums(dbase, sizes)}
        if lora is not None:
            a, b, d = getattr(lora, f"{name}_a"), getattr(lora, f"{name}_b"), d.astype(dtype)
            du = lora.scale * _sum_choices(gmm(d, b, sizes, transpose_w=True), plan)
            du = du.astype(dtype)
            dx += _matmul("nr,dr->nd", du, a)
            dlora |= {
                f"{name}_a": _matmul("nd,nr->dr", x, du), f"{name}_b": tgmm(part.low, d, sizes),
            }  # fmt: skip
    dcoefficients = take(dc, plan.position).reshape(plan.coefficients.shape)
    return dx.astype(dtype), _like(weights, dweights), _like(lora, dlora), dcoefficients


def _hidden(x, xs, weights, lora, plan, activation):
    """Hidden units of every row, and what their gradient needs: `(products, pull)`."""
    names = ["up"] if weights.w_gate is None else ["up", "gate"]
    c, sizes = _sorted(plan), plan.group_sizes

    def product(name):
        bias = getattr(weights, f"b_{name}")
        base = gmm(xs, getattr(weights, f"w_{name}"), sizes, bias).astype(jnp.float32)
        z, low = c * base if plan.scaled == "products" else base, None
        if lora is not None:
            # Once for a token, whatever the number of its blocks.
            low = lora.scale * _matmul("nd,dr->nr", x, getattr(lora, f"{name}_a"))
            low = take(low.astype(x.dtype), plan.tokens)
            z += gmm(low, getattr(lora, f"{name}_b"), sizes).astype(jnp.float32)
        return _Product(name, base, z, low)

    parts = [product(name) for name in names]
    join = lambda up, gate=None: activation(up) if gate is None else activation(gate) * up
    h, pull = jax.vjp(join, *(part.z for part in parts))
    return h.astype(x.dtype), (parts, pull)


def _low_sum(h, lora, plan):
    """What a token's blocks give LoRA's R columns of the second matrix, `[N, R]` float32."""
    c = plan.coefficients if plan.scaled == "output" else None
    return _sum_choices(gmm(h, lora.down_a, plan.group_sizes), plan, c)


def _sum_choices(rows, plan, coefficients=None):
    """The sum over each token's k choices, float32 `[N, F]`, in the order of its blocks."""
    chosen = take(rows, plan.position).astype(jnp.float32)
    chosen = chosen.reshape(*plan.coefficients.shape, rows.shape[1])
    return (chosen if coefficients is None else coefficients[..., None] * chosen).sum(1)


def _sorted(plan):
    """The coefficient of every row, float32 `[M, 1]`."""
    return take(plan.coefficients.reshape(-1), plan.order)[:, None]


def _like(tree, found):
    """The gradients as a pytree like the one that they are of, in its dtypes."""
    if tree is None or found is None:
        return None
    arrays = {f.name: getattr(tree, f.name) for f in dataclasses.fields(tree)}
    return dataclasses.replace(tree, **{
        name: found[name].astype(array.dtype)
        for name, array in arrays.items() if isinstance(array, jax.Array)
    })  # fmt: skip


def _matmul(spec, a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
