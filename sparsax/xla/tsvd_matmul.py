"""Products with factored matrices as batched matmuls, forward and backward.

Axes as in `sparsax.lowrank.factors`: x `[M, I*A]`, u `[I, A, J, R]`, v `[J, I, R, C]`, y
`[M, J*C]`; with a common factor, x `[M, D]` and y `[M, F]`. Inputs may have 16 bits, sums have 32.
"""

import jax.numpy as jnp


def tsvd_forward(x, u, v, bias, *, activation):
    """`activation(x w + bias)` in x's dtype, w given by the factors of its tiles."""
    return _finish(_columns(_hidden(x, u), v), bias, activation, x.dtype)


def tsvd_backward(x, u, v, dy):
    """`(dx, du, dv)`; the product `x u`, I * J * R numbers a row, is computed again."""
    rows, (num_in, size, *_), (num_out, *_, columns) = x.shape[0], u.shape, v.shape
    dys = dy.reshape(rows, num_out, columns)
    dp = _matmul("mjc,jirc->imjr", dys, v).astype(x.dtype)
    dx = _matmul("imjr,iajr->mia", dp, u).reshape(x.shape)
    du = _matmul("mia,imjr->iajr", x.reshape(rows, num_in, size), dp)
    dv = _matmul("jmir,mjc->jirc", _hidden(x, u), dys)
    return dx.astype(x.dtype), du.astype(u.dtype), dv.astype(v.dtype)


def _hidden(x, u):
    """`x u`, laid out for the second matmul, `[J, M, I, R]`."""
    xs = x.reshape(x.shape[0], u.shape[0], u.shape[1])
    return _matmul("mia,iajr->jmir", xs, u).astype(x.dtype)


def _columns(p, v):
    return _matmul("jmir,jirc->mjc", p, v).reshape(p.shape[1], -1)


def tsvd_common_forward(x, tiles, common, bias, *, side, activation):
    """`(activation(x w + bias), x times the first factor)`, w given by a common factor.

    Two plain matmuls: with `[D, J*R]` and `[R, C]`, or with `[A, R]` and `[I*R, F]`.
    """
    p = tsvd_common_hidden(x, tiles, common, side=side)
    y = _matmul("mr,rc->mc", p, _flat(tiles, common, side)[1]).reshape(x.shape[0], -1)
    return _finish(y, bias, activation, x.dtype), p


def tsvd_common_hidden(x, tiles, common, *, side):
    """`x` times the first factor, as many rows and columns as the second one takes."""
    first, second = _flat(tiles, common, side)
    p = _matmul("ma,ar->mr", x.reshape(-1, first.shape[0]), first).astype(x.dtype)
    return p.reshape(-1, second.shape[0])


def tsvd_common_backward(x, p, tiles, common, dy, *, side):
    """`(dx, dtiles, dcommon)`; whichever is not asked for is never computed under jit."""
    first, second = _flat(tiles, common, side)
    xs, dys = x.reshape(-1, first.shape[0]), dy.reshape(-1, second.shape[1])
    dp = _matmul("mc,rc->mr", dys, second).astype(x.dtype).reshape(-1, first.shape[1])
    dx = _matmul("mr,ar->ma", dp, first).reshape(x.shape).astype(x.dtype)
    dfirst, dsecond = _matmul("ma,mr->ar", xs, dp), _matmul("mr,mc->rc", p, dys)
    dtiles, dcommon = (dfirst, dsecond) if side == "right" else (dsecond, dfirst)
    return dx, dtiles.reshape(tiles.shape).astype(tiles.dtype), dcommon.astype(common.dtype)


def _flat(tiles, common, side):
    """The two factors as matrices, in the order in which x meets them."""
    if side == "right":
        return tiles.reshape(tiles.shape[0], -1), common
    return common, tiles.reshape(-1, tiles.shape[-1])


def _finish(y, bias, activation, dtype):
    y = y if bias is None else y + bias.astype(jnp.float32)
    return (y if activation is None else activation(y)).astype(dtype)


def _matmul(spec, a, b):
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
