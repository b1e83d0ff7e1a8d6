"""The kernels of compound attention against the float32 reference: interpreted, and on the GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsax import Band, CompoundPattern, compound_attention, pallas, patterns
from sparsax.pallas.block_sparse import attention, schedule
from sparsax.pallas.block_sparse.schedule import NOTHING
from sparsax.patterns import compound
from tests.helpers import assert_near
from tests.pallas.compound_cases import CASES, case

NAMES = ("q_global", "k_global", "v_global")
# Interpreting a case takes seconds; `test_compound_lists` says of all of them which pairs are kept.
INTERPRETED = (
    "window_causal", "one_token", "columns_shared_causal", "rows_own_padded", "blocks_and_rows",
    "longformer_whole_tiles",
)  # fmt: skip
SLOW = (
    "vertical_slash", "bigbird", "longformer_padded_own", "all_selected", "everything_per_kv_head",
    "rows_causal", "rows_own_causal_padded",
)  # fmt: skip
BY_NAME = pytest.mark.parametrize(
    "name", [*INTERPRETED, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)


pytestmark = pytest.mark.usefixtures("few_multiprocessors")


def value_and_gradients(c, implementation, dtype):
    """`o` and the gradients of q, k, v and of the projections of global rows, under jit."""
    *qkv, projected, do = c.inputs()
    arrays = [x.astype(dtype) for x in (*qkv, *projected)]

    @jax.jit
    def run(arrays, pattern, do):
        def attend(q, k, v, *projected):
            own = dict(zip(NAMES, projected, strict=False))
            return compound_attention(
                q, k, v, pattern, **own, scale=c.scale, implementation=implementation
            )

        o, pull = jax.vjp(attend, *arrays)
        return o, pull(do)

    return run(arrays, c.pattern(), do.astype(dtype))


def check(c):
    o, gradients = value_and_gradients(c, "pallas", c.dtype)
    want_o, want = value_and_gradients(c, "reference", "float32")
    assert o.dtype == jnp.dtype(c.dtype)
    assert_near(o, want_o, c.tolerance.output, "o")
    # A softmax over one key has gradient 0, to which its terms of the size of dv cancel in float32.
    least = max(1e-4 * float(jnp.linalg.norm(want[2])), 1e-30)
    for name, got, expected in zip(("dq", "dk", "dv", *NAMES), gradients, want, strict=False):
        assert got.dtype == jnp.dtype(c.dtype)
        assert_near(got, expected, c.tolerance.gradient, name, least)
    return o, gradients


@pytest.mark.usefixtures("no_races")
@BY_NAME
def test_interpreted_kernels_match_the_reference_without_races(name):
    with pallas.interpreted(detect_races=True):
        check(case(name))


@pytest.mark.usefixtures("no_races", "fresh")
def test_two_teams_share_what_is_dealt_beforehand(monkeypatch):
    # Global rows alone need no mask, and so two teams do them; each has several row tiles here.
    monkeypatch.setattr(schedule, "multiprocessors", lambda: 2)
    plans, make = [], attention.forward_kernel
    monkeypatch.setattr(
        attention, "forward_kernel", lambda *a, **k: plans.append(a[1]) or make(*a, **k)
    )
    with pallas.interpreted(detect_races=True):
        check(case("rows_whole_tiles"))
    (plan,) = plans
    assert (plan.beforehand, plan.teams, plan.dealt) == (True, 2, 3)


def test_without_any_part_no_kernel_runs_and_nothing_attends():
    with pallas.interpreted():
        check(case("no_part"))


@pytest.mark.gpu
@pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
def test_kernels_match_the_reference_and_repeat_their_bits(c):
    first, again = check(c), value_and_gradients(c, "pallas", c.dtype)
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.usefixtures("no_races")
@pytest.mark.slow
def test_split_rows_of_packed_keys_add_up_interpreted(joined, monkeypatch):
    # On a GPU this small the rows of packed keys are long in every sample: they are cut, if nobody
    # expects other rows to outlast them.
    monkeypatch.setattr("sparsax.pallas.compound.attention.expected_work", lambda *_, **__: NOTHING)
    with pallas.interpreted(detect_races=True):
        check(case("longformer_padded_own"))
    assert len(joined) == 3  # of o, of dq, of dk and dv


def test_what_is_invalid_under_jit_is_nan_in_that_sample_alone():
    c = case("columns")
    q, k, v, *_ = c.inputs()

    @jax.jit
    def run(q, k, v, positions):
        pattern = compound.longformer(c.T, window=20, positions=positions)
        attend = lambda *x: compound_attention(*x, pattern, implementation="pallas")
        o, pull = jax.vjp(attend, q, k, v)
        return o, *pull(o)

    with pallas.interpreted():
        for x in run(q, k, v, jnp.array([[3, 200], [7, c.T]])):
            assert np.isfinite(np.asarray(x[0], np.float32)).all()
            assert np.isnan(np.asarray(x[1], np.float32)).all()


def attend_to(pattern, dtype=jnp.bfloat16, features=64, **options):
    q = jnp.zeros((1, pattern.seq_len, 2, features), dtype)
    return compound_attention(q, q, q, pattern, **options)


PARTS = functools.partial(CompoundPattern.from_parts, 128)
REFUSED = {
    "dtype": (PARTS(), {"dtype": jnp.float32}, r"takes q, k, v in one of .*got float32"),
    "features": (PARTS(), {"features": 48}, r"takes head features H in .*got H=48"),
    "blocks": (
        PARTS(blocks=patterns.full(128, block=16)), {}, r"takes pattern blocks of .*got 16 x 16",
    ),
    "dilation": (
        PARTS(bands=[Band(2, 2), Band(2, 2, 4)]), {}, r"takes bands of dilation 1; got \[4\]",
    ),
    "elements": (
        PARTS(elements=compound.random_elements(128, keys_per_query=1)), {},
        "has no kernel of single pairs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_cannot_do_names_what_can(name):
    pattern, options, message = REFUSED[name]
    with pallas.lowering(), pytest.raises(NotImplementedError, match=message + ".*'xla' runs"):
        attend_to(pattern, **options, implementation="pallas")


@pytest.mark.parametrize("name", REFUSED)
def test_none_runs_what_covers_the_pattern(name):
    pattern, options, _ = REFUSED[name]
    with pallas.lowering():  # kernels would fail here, being lowered for no GPU
        assert np.isfinite(np.asarray(attend_to(pattern, **options), np.float32)).all()


@pytest.mark.skipif(pallas.on_hopper(), reason="the kernels do run here")
def test_without_a_gpu_the_kernels_refuse():
    with pytest.raises(NotImplementedError, match=r"needs an NVIDIA Hopper GPU.*'xla' runs"):
        attend_to(PARTS(bands=[Band(2, 2)]), implementation="pallas")
