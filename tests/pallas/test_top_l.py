"""The kernels of top-L attention against the float32 reference: interpreted, and on the GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsax import pallas, top_l_attention
from sparsax.quantise import Codes
from tests.helpers import assert_near
from tests.top_l_cases import CASES, Case

# Interpreting a case takes seconds; these few meet every feature between them.
INTERPRETED = (
    Case(name="gqa_padding", B=1, T=72, N=2, K=1, padding="every", dtype="bfloat16"),
    Case(name="two_tiles", B=1, T=150, N=1, K=1, H=64, keep=20, dtype="float16"),
    Case(name="bidirectional", B=1, T=72, N=1, K=1, H=96, causal=False, dtype="bfloat16"),
    Case(name="holes", B=1, T=72, N=1, K=1, padding="holes", dtype="bfloat16"),
    Case(name="one_key", B=1, T=40, N=1, K=1, H=128, keep=1, dtype="bfloat16"),
)  # fmt: skip
SLOW = (
    Case(name="tiles_bidirectional", B=1, T=140, N=1, K=1, H=96, keep=12, causal=False,
         dtype="bfloat16"),
    Case(name="padding_all", T=150, N=4, K=2, H=32, padding="all", keep=150, dtype="bfloat16"),
    Case(name="three_tiles", B=1, T=300, N=2, K=2, H=128, keep=37, scale=0.4, dtype="float16"),
)  # fmt: skip
LARGE = (*(
    Case(name=f"h{features}{'_causal' * causal}", T=1100, N=4, K=2, H=features, keep=137,
         causal=causal, padding="some", dtype=dtype)
    for features, causal, dtype in (
        (32, True, "bfloat16"), (64, True, "bfloat16"), (64, False, "float16"),
        (96, True, "float16"), (128, True, "bfloat16"), (128, False, "bfloat16"),
    )
),
    Case(name="long_rows_are_cut", B=1, T=8192, N=2, K=1, H=64, keep=1024, dtype="bfloat16"),
    Case(name="long_padding_all", T=5000, N=2, K=2, H=64, keep=625, padding="all",
         dtype="bfloat16"),
)  # fmt: skip
SHARED = tuple(
    dataclasses.replace(c, dtype="bfloat16" if c.dtype == "float32" else c.dtype)
    for c in CASES
    if c.score == "match" and c.H != 40
)

pytestmark = pytest.mark.usefixtures("few_multiprocessors")


def value_and_gradients(c, implementation, dtype):
    """`o, (dq, dk, dv)` under jit."""
    *arrays, codes, key_mask = c.inputs()

    @jax.jit
    def run(q, k, v, do, codes, key_mask):
        attend = lambda q, k, v: top_l_attention(
            q, k, v, codes, key_mask=key_mask, **c.static, implementation=implementation
        )
        o, pull = jax.vjp(attend, q, k, v)
        return o, pull(do)

    return run(*(x.astype(dtype) for x in arrays), codes, key_mask)


def check(c):
    o, gradients = value_and_gradients(c, "pallas", c.dtype)
    with jax.default_matmul_precision("highest"):
        want_o, want = value_and_gradients(c, "reference", "float32")
    assert o.dtype == jnp.dtype(c.dtype)
    assert_near(o, want_o, c.tolerance.output, "o")
    # A softmax over one key has gradient 0, to which terms of the size of dv cancel.
    least = 1e-4 * float(jnp.linalg.norm(want[2]))
    for name, got, expected in zip(("dq", "dk", "dv"), gradients, want, strict=True):
        assert got.dtype == jnp.dtype(c.dtype)
        assert_near(got, expected, c.tolerance.gradient, name, least)
    return o, gradients


@pytest.mark.usefixtures("no_races")
@pytest.mark.parametrize(
    "c", [*INTERPRETED, *(pytest.param(c, marks=pytest.mark.slow) for c in SLOW)],
    ids=lambda c: c.name,
)  # fmt: skip
def test_interpreted_kernels_match_the_reference_without_races(c):
    with pallas.interpreted(detect_races=True):
        check(c)


@pytest.mark.gpu
@pytest.mark.parametrize("c", INTERPRETED + SLOW + SHARED + LARGE, ids=lambda c: c.name)
def test_kernels_match_the_reference_and_repeat_their_bits(c):
    first, again = check(c), value_and_gradients(c, "pallas", c.dtype)
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.usefixtures("no_races")
@pytest.mark.slow
def test_split_rows_add_up_interpreted(joined):
    # On a GPU this small the last rows of queries and the first ones of keys are long: all are cut.
    with pallas.interpreted(detect_races=True):
        check(Case(name="split", B=1, T=300, N=2, K=1, keep=37, dtype="bfloat16"))
    assert len(joined) == 3  # of o, of dq, of dk and dv


@pytest.mark.slow
def test_vmap_is_a_longer_batch():
    c = Case(name="vmap", B=2, T=40, N=1, K=1, keep=9, dtype="bfloat16")
    *arrays, codes, _ = c.inputs()

    def gradients(q, k, v, do, codes):
        attend = lambda *x: top_l_attention(*x, codes, **c.static, implementation="pallas")
        o, pull = jax.vjp(attend, q, k, v)
        return o, pull(do)

    with pallas.interpreted():
        alone = jax.tree.map(lambda x: x[:, None], (*arrays, codes))
        batched = jax.jit(jax.vmap(gradients))(*alone)
        joined = jax.jit(gradients)(*arrays, codes)
    for x, y in zip(jax.tree.leaves(batched), jax.tree.leaves(joined), strict=True):
        np.testing.assert_array_equal(np.asarray(x[:, 0]), np.asarray(y))


def attend_to(dtype="bfloat16", features=64, num_codes=8, score="match", **options):
    q = jnp.zeros((1, 128, 2, features), dtype)
    words = jnp.zeros((1, 128, 2, -(-num_codes // 8)), jnp.uint32)
    tables = jnp.zeros((1, 128, 2, num_codes, 16), jnp.uint8)
    codes = Codes(words if score == "match" else tables, words, num_codes)
    return top_l_attention(q, q, q, codes, keep=9, **options)


REFUSED = {
    "dtype": ({"dtype": "float32"}, r"takes q, k, v in one of .*got float32"),
    "features": ({"features": 48}, r"takes head features H in .*got H=48"),
    "wide": ({"features": 256}, r"takes head features H in \(32, 64, 96, 128\); got H=256"),
    "adc": ({"score": "adc"}, r'kernels of score="match" alone; got codes of score="adc"'),
    "codes": ({"num_codes": 17}, r"takes at most 16 codes of a token and head; got 17"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernels_cannot_do_names_what_can(name):
    options, message = REFUSED[name]
    with pallas.lowering(), pytest.raises(NotImplementedError, match=message + ".*'xla' runs"):
        attend_to(**options, implementation="pallas")


@pytest.mark.parametrize("name", REFUSED)
def test_none_runs_what_the_kernels_refuse(name):
    options, _ = REFUSED[name]
    with pallas.lowering():  # kernels would fail here, being lowered for no GPU
        assert np.isfinite(np.asarray(attend_to(**options), np.float32)).all()


@pytest.mark.skipif(pallas.on_hopper(), reason="the kernels do run here")
def test_without_a_gpu_the_kernels_refuse():
    with pytest.raises(NotImplementedError, match=r"needs an NVIDIA Hopper GPU.*'xla' runs"):
        attend_to(implementation="pallas")
