"""The gradient of hidden units in one kernel, beside its composition: interpreted, on the GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsax import pallas
from sparsax.linear import ACTIVATIONS
from sparsax.pallas import hidden_gradient as module
from sparsax.pallas.hidden_gradient import hidden_gradient, split
from tests.helpers import assert_near, launched

TOLERANCES = {"bfloat16": 1e-3, "float16": 2e-4}  # few results lie at the edge of two numbers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """M rows of E hidden units."""

    M: int
    E: int
    activation: str
    gated: bool = False
    dtype: str = "bfloat16"

    def inputs(self):
        rng = np.random.default_rng([self.M, self.E])
        draw = lambda: jnp.asarray(3 * rng.standard_normal((self.M, self.E)), self.dtype)
        zs = [draw() for _ in range(1 + self.gated)]
        zs[-1] = zs[-1].at[:, ::7].set(0)  # the corner of relu
        return zs, draw(), jnp.asarray(rng.random((self.M, 1)), jnp.float32)

    def run(self, *inputs, **options):
        interpret = pallas.interpret()
        return hidden_gradient(*inputs, activation=self.activation, interpret=interpret, **options)

    def check(self):
        inputs = self.inputs()
        got = jax.jit(self.run)(*inputs)
        want = composed(*inputs, ACTIVATIONS[self.activation])
        assert [x.dtype for x in jax.tree.leaves(got)] == [x.dtype for x in jax.tree.leaves(want)]
        for one, other in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            assert_near(one, other, TOLERANCES[self.dtype], str(other.shape))
        jax.tree.map(np.testing.assert_array_equal, got, jax.jit(self.run)(*inputs))
        c_h, *rest = self.run(*inputs, needs_hidden=False)
        assert c_h is None
        jax.tree.map(np.testing.assert_array_equal, list(got[1:]), rest)


def composed(zs, dh, c, activation):
    dtype, wide = dh.dtype, [z.astype(jnp.float32) for z in zs]
    join = lambda up, gate=None: activation(up) if gate is None else activation(gate) * up
    h, pull = jax.vjp(join, *wide)
    h, dh = h.astype(dtype), dh.astype(jnp.float32)
    return (c * h).astype(dtype), [d.astype(dtype) for d in pull(c * dh)], (h * dh).sum(1)


CASES = (
    Case(M=70, E=64, activation="relu"),
    Case(M=200, E=192, activation="silu", gated=True, dtype="float16"),
    Case(M=330, E=256, activation="gelu"),
    Case(M=3, E=128, activation="gelu", gated=True),
    Case(M=136, E=64, activation="relu", gated=True, dtype="float16"),
    Case(M=128, E=192, activation="silu"),
)
LARGE = tuple(
    Case(M=20_001, E=2048, activation=activation, gated=gated, dtype=dtype)
    for activation in ("relu", "silu", "gelu") for gated in (False, True)
    for dtype in ("bfloat16", "float16")
)  # fmt: skip
by_case = functools.partial(pytest.mark.parametrize, "c", ids=str)


@pytest.mark.usefixtures("no_races")
@by_case(CASES)
def test_the_kernel_is_its_composition(c):
    with pallas.interpreted(detect_races=True):
        c.check()


@pytest.mark.usefixtures("no_races", "fresh")
@pytest.mark.parametrize("gated", [False, True])
def test_slots_are_used_again(gated, monkeypatch):
    monkeypatch.setattr(module, "multiprocessors", lambda: 1)
    with pallas.interpreted(detect_races=True):
        Case(M=72, E=832, activation="gelu", gated=gated).check()


@pytest.mark.gpu
@by_case(CASES + LARGE)
def test_the_kernel_is_its_composition_on_the_gpu(c):
    c.check()


def test_vmap_is_a_loop_of_calls():
    c = CASES[1]
    alone = c.inputs()
    batch = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), alone)
    with pallas.interpreted():
        got = jax.jit(jax.vmap(c.run))(*batch)
        want = [jax.jit(c.run)(*jax.tree.map(lambda x, n=n: x[n], batch)) for n in range(2)]
    jax.tree.map(lambda x, *y: np.testing.assert_array_equal(x, jnp.stack(y)), got, *want)


@pytest.mark.parametrize("vmapped", [False, True])
@by_case(CASES + LARGE[:1])
def test_the_kernel_lowers(c, vmapped):
    run = jax.vmap(c.run) if vmapped else c.run
    inputs = jax.tree.map(lambda x: jnp.stack([x, x]) if vmapped else x, c.inputs())
    with pallas.lowering():
        text = jax.jit(run).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert launched(text) == 1
    assert not any(name in text for name in ("stablehlo.logistic", "stablehlo.tanh"))


@pytest.mark.parametrize(
    ("tiles", "steps", "parts"),
    [(128, 32, 1), (64, 32, 2), (1, 32, 8), (1, 3, 1), (157, 32, 4), (1320, 32, 1)],
)
def test_columns_are_cut_where_row_tiles_do_not_fill_the_gpu(tiles, steps, parts):
    assert split(tiles, steps) == parts
