"""The kernels inside jit, scan, `jax.checkpoint` and vmap beside a plain loop of calls."""

import contextlib

import jax
import numpy as np
import pytest

from sparsax import BlockPattern, block_sparse_attention, pallas
from tests.helpers import TOLERANCES, Case, assert_near

SMALL = Case(name="layers", B=1, T=128, S=128, N=2, K=1, P=2, H=32, block_q=64, block_kv=64,
             dtype="bfloat16", causal=True)  # fmt: skip
LARGE = Case(name="layers", B=2, T=3000, S=3000, N=4, K=2, P=4, H=64, block_q=64, block_kv=64,
             dtype="bfloat16", causal=True)  # fmt: skip


def layer(x, k, v, pattern):
    return x + block_sparse_attention(x, k, v, pattern, causal=True, implementation="pallas")


def looped(x, k, v, patterns):
    for pattern in patterns.unstack():
        x = layer(x, k, v, pattern)
    return x


def scanned(x, k, v, patterns, wrap=lambda step: step):
    step = wrap(lambda x, pattern: (layer(x, k, v, pattern), None))
    return jax.lax.scan(step, x, patterns)[0]


def checkpointed(x, k, v, patterns):
    return scanned(x, k, v, patterns, jax.checkpoint)


def apart(x, k, v, patterns):
    """One call for every pattern, added up: what `vmapped` does at once."""
    return sum(layer(x, k, v, pattern) for pattern in patterns.unstack())


def vmapped(x, k, v, patterns):
    return jax.vmap(layer, (None, None, None, 0))(x, k, v, patterns).sum(0)


def value_and_gradients(function, c: Case):
    q, k, v, *_, (do, _) = c.inputs()
    patterns = BlockPattern.stack([c.pattern(seed) for seed in range(3 if c is LARGE else 2)])

    @jax.jit
    def run(q, k, v, do):
        o, pull = jax.vjp(lambda *x: function(*x, patterns), q, k, v)
        return o, *pull(do)

    interpreted = pallas.interpreted() if c is SMALL else contextlib.nullcontext()
    with interpreted:
        return [np.asarray(x, np.float32) for x in run(q, k, v, do)]


def check(function, plain, c: Case):
    # The sums between the kernels are XLA's, which may keep more digits in one program than in
    # the other: as far apart as an implementation may be, where a wrong pattern is 1 apart.
    tolerance = TOLERANCES[c.dtype]
    one, other = value_and_gradients(function, c), value_and_gradients(plain, c)
    assert_near(one[0], other[0], tolerance.output, "o")
    for name, x, y in zip(("dq", "dk", "dv"), one[1:], other[1:], strict=True):
        assert_near(x, y, tolerance.gradient, name)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("function", "plain"), [(scanned, looped), (checkpointed, looped), (vmapped, apart)]
)
def test_a_transformation_changes_nothing_but_rounding(function, plain):
    check(function, plain, LARGE)


# Not `checkpointed`: jax.checkpoint takes no function with the side effects of interpret mode.
@pytest.mark.slow
@pytest.mark.parametrize(("function", "plain"), [(scanned, looped), (vmapped, apart)])
def test_a_transformation_changes_nothing_but_rounding_interpreted(function, plain):
    check(function, plain, SMALL)
