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


class RoutedProducts(typing.NamedTuple):
    """The grouped products that the layer is made of: those of this folder, or of kernels."""

    # `(terms, sizes, bias=None, *, transpose_w=False)`: the sum of `x w` over terms `(x, w)`, rows.
    gmm: typing.Callable[..., jax.Array]
    tgmm: typing.Callable[..., jax.Array]
    # `(xs, parts, sizes)`: the hidden units of every row in one go; None to compose them.
    hidden: typing.Callable[..., jax.Array] | None = None
    # `(zs, dh, c, *, needs_hidden)`: c h, gradients of zs and of c in one go, as `_through_hidden`
    # composes them where this is None.
    hidden_gradient: typing.Callable[..., tuple] | None = None
    # Whether the terms of a sum make one kernel.
    sums_terms: bool = False


class Part(typing.NamedTuple):
    """One of the matrices that x meets, and its LoRA: `x w + bias + low b`."""

    name: str  # "up" or "gate"
    w: typing.Any
    bias: typing.Any
    low: typing.Any  # scale * x a, rows; None without LoRA
    b: typing.Any

    def terms(self, xs):
        """What is multiplied and summed: the large product, then LoRA's."""
        return [(xs, self.w)] if self.low is None else [(xs, self.w), (self.low, self.b)]


def gmm_sum(terms, sizes, bias=None, *, transpose_w=False):
    """The sum of `gmm` over terms `(x, w)`; float32 when there are several."""
    (x, w), *rest = terms
    y = gmm(x, w, sizes, bias, transpose_w=transpose_w)
    for x, w in rest:
        y = y.astype(jnp.float32) + gmm(x, w, sizes, transpose_w=transpose_w)
    return y


ROUTED_PRODUCTS = RoutedProducts(gmm_sum, tgmm)


def routed_ffn_keep(x, weights, lora, plan, products=ROUTED_PRODUCTS):
    """The large products that both passes would do, `[M, E]` of each part in x's dtype: `kept`.

    Kernels round them alike when they are done again; the sums that `gmm_sum` makes with LoRA are
    rounded here alone.
    """
    wide = _wide(take(x, plan.tokens), _parts(x, weights, lora, plan), plan, products)
    return [z.astype(x.dtype) for z in wide]


def routed_ffn_forward(
    x, weights, lora, plan, products=ROUTED_PRODUCTS, *, activation, kept=None
):  # fmt: skip
    """`sum over chosen g of c_g FFN_g(x), + b_down` in x's dtype; 0 for tokens of no block."""
    xs, parts = take(x, plan.tokens), _parts(x, weights, lora, plan)
    if kept is None and products.hidden is not None and plan.scaled != "products":
        h = products.hidden(xs, parts, plan.group_sizes)
    else:
        _, zs = _sums(xs, parts, plan, products, kept)
        h = _join(activation)(*zs).astype(x.dtype)
    into_y, merged = [(h, weights.w_down)], _merges(products, plan)
    low = None if lora is None else products.gmm([(h, lora.down_a)], plan.group_sizes)
    if lora is not None and merged:
        into_y.append(_shared(lora.scale, low, lora.down_b, plan))
    y = _sum_choices(products.gmm(into_y, plan.group_sizes), plan, plan.coefficients)
    if lora is not None and not merged:
        c = plan.coefficients if plan.scaled == "output" else None
        low = _sum_choices(low, plan, c).astype(x.dtype)
        y += lora.scale * _matmul("nr,rd->nd", low, lora.down_b)
    y = y if weights.b_down is None else y + weights.b_down.astype(jnp.float32)
    return plan.zeroed(y).astype(x.dtype)


def routed_ffn_backward(
    x, weights, lora, plan, dy, products=ROUTED_PRODUCTS, *, activation, frozen: bool, kept=None
):  # fmt: skip
    """`(dx, dweights, dlora, dcoefficients)`; the hidden units are computed again, or of `kept`.

    With `frozen`, dweights is None. Under jit, what is not asked for is not computed.
    """
    sizes, dtype, gmm, tgmm = plan.group_sizes, x.dtype, products.gmm, products.tgmm
    xs, dys = take(x, plan.tokens), take(dy, plan.tokens)
    parts = _parts(x, weights, lora, plan)
    into_h = [(dys, weights.w_down)]
    if lora is not None:
        dlow = lora.scale * _matmul("nd,rd->nr", dy, lora.down_b)
        into_h.append((take(dlow.astype(dtype), plan.tokens), lora.down_a))
    if products.hidden_gradient is not None and plan.scaled != "products":
        zs = _wide(xs, parts, plan, products) if kept is None else kept
        dh, needed = gmm(into_h, sizes, transpose_w=True), not frozen or lora is not None
        c_h, ds, dc = products.hidden_gradient(zs, dh, _sorted(plan), needs_hidden=needed)
        h_low, dbases = c_h, ds
    else:
        sums = _sums(xs, parts, plan, products, kept)
        c_h, h_low, ds, dbases, dc = _through_hidden(sums, into_h, plan, gmm, activation, dtype)
    into_x = [(d, part.w) for d, part in zip(dbases, parts, strict=True)]
    merged = _merges(products, plan)
    dlows = []  # of `low` of each part
    if lora is not None:
        dlows = [gmm([(d, p.b)], sizes, transpose_w=True) for d, p in zip(ds, parts, strict=True)]
        if merged:
            into_x += [
                _shared(lora.scale, dlow, getattr(lora, f"{part.name}_a"), plan)
                for dlow, part in zip(dlows, parts, strict=True)
            ]
    dx = _sum_choices(gmm(into_x, sizes, transpose_w=True), plan)
    dweights = dlora = None
    if not frozen:
        dweights = {"w_down": tgmm(c_h, dys, sizes), "b_down": dy.sum(0, dtype=jnp.float32)}
        for part, d in zip(parts, dbases, strict=True):
            dweights[f"w_{part.name}"] = tgmm(xs, d, sizes)
            dweights[f"b_{part.name}"] = group_sums(d, sizes)
    if lora is not None:
        low = _sum_choices(gmm([(h_low, lora.down_a)], sizes), plan).astype(dtype)
        dlora = {
            "down_a": tgmm(h_low, into_h[1][0], sizes),
            "down_b": lora.scale * _matmul("nr,nd->rd", low, dy),
        }
        for part, d, dlow in zip(parts, ds, dlows, strict=True):
            du = (lora.scale * _sum_choices(dlow, plan)).astype(dtype)
            if not merged:
                dx += _matmul("nr,dr->nd", du, getattr(lora, f"{part.name}_a"))
            dlora[f"{part.name}_a"] = _matmul("nd,nr->dr", x, du)
            dlora[f"{part.name}_b"] = tgmm(part.low, d, sizes)
    dcoefficients = take(dc, plan.position).reshape(plan.coefficients.shape)
    return dx.astype(dtype), _like(weights, dweights), _like(lora, dlora), dcoefficients


def _through_hidden(sums, into_h, plan, gmm, activation, dtype):
    """`(c h, h as LoRA meets it, gradients of z and of the large products, dc)`: rows, all but dc.

    `sums` are those of `_sums`, and `into_h` the terms whose sum is the gradient of h, c apart.
    """
    bases, zs = sums
    c, scaled = _sorted(plan), plan.scaled == "products"
    h, pull = jax.vjp(_join(activation), *zs)
    h = h.astype(dtype)
    dc, dh = _into_hidden(h, into_h, plan, gmm)
    dz = pull(dh)
    if scaled:
        dc += sum((d * base).sum(1, dtype=jnp.float32) for d, base in zip(dz, bases, strict=True))
    ds = [d.astype(dtype) for d in dz]
    dbases = [(c * d).astype(dtype) for d in dz] if scaled else ds
    c_h = (c * h).astype(dtype)
    # Without scaled products LoRA meets c h, so that h itself need not be stored.
    return c_h, h if scaled else c_h, ds, dbases, dc


def _into_hidden(h, terms, plan, gmm):
    """The gradients of the coefficients, as far as they come from the output, and of h; float32.

    y = sum of c * (h w), so dc = (h w) dy = h (w dy): the product h w is not needed again.
    """
    c, sizes, float32 = _sorted(plan), plan.group_sizes, jnp.float32
    if plan.scaled == "products":
        of_w, *of_lora = (gmm([term], sizes, transpose_w=True).astype(float32) for term in terms)
        return (h * of_w).sum(1, dtype=float32), sum(of_lora, c * of_w)
    dh = gmm(terms, sizes, transpose_w=True).astype(float32)
    return (h * dh).sum(1, dtype=float32), c * dh


def _parts(x, weights, lora, plan) -> list[Part]:
    names = ["up"] if weights.w_gate is None else ["up", "gate"]

    def part(name):
        low = b = None
        if lora is not None:
            # Once for a token, whatever the number of its blocks.
            low = lora.scale * _matmul("nd,dr->nr", x, getattr(lora, f"{name}_a"))
            low, b = take(low.astype(x.dtype), plan.tokens), getattr(lora, f"{name}_b")
        return Part(name, getattr(weights, f"w_{name}"), getattr(weights, f"b_{name}"), low, b)

    return [part(name) for name in names]


def _wide(xs, parts, plan, products: RoutedProducts):
    """The large products: `x w + bias` of each part, with LoRA where nothing comes in between."""
    own = slice(1) if plan.scaled == "products" else slice(None)
    return [products.gmm(part.terms(xs)[own], plan.group_sizes, part.bias) for part in parts]


def _sums(xs, parts, plan, products: RoutedProducts, kept=None):
    """`x w + bias` of each part, None unless the coefficients scale it; z: with those and LoRA."""
    wide = _wide(xs, parts, plan, products) if kept is None else kept
    wide = [z.astype(jnp.float32) for z in wide]
    if plan.scaled != "products":
        return [None] * len(parts), wide
    c, zs = _sorted(plan), []
    for part, base in zip(parts, wide, strict=True):
        # Small, so that it need not be kept: base and z both follow from the base.
        low = (products.gmm([term], plan.group_sizes) for term in part.terms(xs)[1:])
        zs.append(sum(low, c * base))
    return wide, zs


def _merges(products: RoutedProducts, plan) -> bool:
    """Whether LoRA's last product is best a term of the large one: c multiplies both alike."""
    return products.sums_terms and plan.scaled == "output"


def _shared(scale, low, matrix, plan):
    """The term `scale * low matrix` of a sum over rows, the matrix the same for every block."""
    matrix = (scale * matrix).astype(low.dtype)
    return low, jnp.broadcast_to(matrix, (len(plan.group_sizes), *matrix.shape))


def _join(activation):
    """The hidden units as a function of the values before the activation."""
    return lambda up, gate=None: activation(up) if gate is None else activation(gate) * up


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
