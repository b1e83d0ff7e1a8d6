"""Products with factored matrices: the dense matrix is put together, tile by tile."""

import jax
import jax.numpy as jnp

HIGHEST = jax.lax.Precision.HIGHEST


def tsvd_matmul(x, u, v, bias, *, activation):
    """`activation(x w + bias)`, float32; tile (i, j) of w is `u[i, :, j] @ v[j, i]`."""
    tile = lambda i, j: _matmul(u[i, :, j], v[j, i])
    w = jnp.block([[tile(i, j) for j in range(u.shape[2])] for i in range(u.shape[0])])
    return _linear(x, w, bias, activation)


def tsvd_common_matmul(x, tiles, common, bias, *, side, activation):
    """The same with one factor for all tiles: `tiles[:, j] @ common`, or `common @ tiles[i]`."""
    if side == "right":
        w = jnp.hstack([_matmul(tiles[:, j], common) for j in range(tiles.shape[1])])
    else:
        w = jnp.vstack([_matmul(common, tiles[i]) for i in range(tiles.shape[0])])
    return _linear(x, w, bias, activation)


def _linear(x, w, bias, activation):
    y = _matmul(x, w)
    y = y if bias is None else y + bias.astype(jnp.float32)
    return y if activation is None else activation(y)


def _matmul(a, b):
    return jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision=HIGHEST)
