"""The grouped products of the routed feed-forward layer.

LoRA is part of the products, the activation and a gate too, so what is between them makes one trip.
Outside, XLA's gathers move about 3 M D numbers forward, M = N * k rows of x read and written and of
the result read, where 2 N D would do for kernels that gathered by themselves. At 3.3 TB/s and 700
TFLOP/s, for N = 8192, F = 4 D and 4 of 8 blocks, that is 0.06 ms beside products of 0.10 ms with
D = 1024, and 0.24 ms beside 1.57 ms with D = 4096. (Counted, not measured.)
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp

from sparsax.pallas import grouped_matmul
from sparsax.pallas.activations import ACTIVATIONS
from sparsax.pallas.grouped_matmul import FEATURES, grouped_refusal
from sparsax.pallas.hidden_gradient import hidden_gradient


def routed_refusal(dtype, features: int, unit: int, activation: str) -> str | None:
    """Why the kernels cannot take such a layer, of D features and E units; None if they can."""
    if activation not in ACTIVATIONS:
        return f"takes activation in {tuple(ACTIVATIONS)}; got {activation!r}"
    return grouped_refusal(dtype, features, unit, names=("D", "E"))


class RoutedKernels(NamedTuple):
    """The products as the layer calls them, whatever the rank of LoRA."""

    activation: str
    interpret: Any

    def gmm(self, terms, sizes, bias=None, *, transpose_w: bool = False):
        """The sum of `x w` over terms `(x, w)`, + bias: LoRA and base weights in one kernel."""
        x_axis, y_axis = (2, 1) if transpose_w else (1, 2)
        columns = terms[0][1].shape[y_axis]
        padded = [
            (_whole(x, 1), (_whole(_whole(w, x_axis), y_axis),)) for x, w in terms
        ]  # fmt: skip
        options = {"transpose_w": transpose_w, "interpret": self.interpret}
        y = grouped_matmul.gmm_sum(padded, sizes, (bias,), **options)
        return y[:, :columns]

    def tgmm(self, x, dy, sizes):
        """`x[rows of g].T @ dy[rows of g]`."""
        run = functools.partial(grouped_matmul.tgmm, interpret=self.interpret)
        return run(_whole(x, 1), _whole(dy, 1), sizes)[:, : x.shape[1], : dy.shape[1]]

    def hidden(self, xs, parts, sizes):
        """The hidden units of every row, from one pass over its features."""
        terms = [(xs, [part.w for part in parts])]
        if parts[0].low is not None:
            # One matrix of all parts' low columns, where each part meets but its own.
            low = jnp.concatenate([part.low for part in parts], axis=1)
            begin, bs = 0, []
            for part in parts:
                rank = part.low.shape[1]
                bs.append(jnp.pad(part.b, ((0, 0), (begin, low.shape[1] - begin - rank), (0, 0))))
                begin += rank
            terms.append((_whole(low, 1), [_whole(b, 1) for b in bs]))
        return grouped_matmul.gmm_sum(
            terms, sizes, [part.bias for part in parts], activation=self.activation,
            interpret=self.interpret,
        )  # fmt: skip

    def hidden_gradient(self, zs, dh, c, *, needs_hidden: bool):
        """`(c h, gradients of zs, gradient of c)`, of what `gmm` gave for the matrices of x."""
        return hidden_gradient(
            zs, dh, c, activation=self.activation, needs_hidden=needs_hidden,
            interpret=self.interpret,
        )  # fmt: skip


def _whole(array, axis: int):
    """With zeros up to whole lines of shared memory."""
    more = [(0, 0)] * array.ndim
    more[axis] = (0, -array.shape[axis] % FEATURES)
    return jnp.pad(array, more)
