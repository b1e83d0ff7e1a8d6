import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsax import (
    Band,
    CompoundPattern,
    TiledFactors,
    block_sparse_attention,
    compound_attention,
    default_implementation,
    pallas,
    patterns,
    top_l_attention,
    tsvd_matmul,
)
from sparsax.patterns import compound
from sparsax.quantise import Codes

T = 128
LONGFORMER = compound.longformer(T, window=8, positions=np.array([[3, 70]]))
ELEMENTS = CompoundPattern.from_parts(T, elements=compound.random_elements(T, keys_per_query=2))
WORDS, TABLES = jnp.zeros((1, T, 2, 1), jnp.uint32), jnp.zeros((1, T, 2, 8, 16), jnp.uint8)
# What each of them is on a Hopper GPU; elsewhere all are "xla".
CASES = {
    "blocks": (patterns.causal(T, block=64), {}, "pallas"),
    "blocks_of_16": (patterns.causal(T, block=16), {}, "xla"),
    "blocks_float32": (patterns.causal(T, block=64), {"dtype": "float32"}, "xla"),
    "longformer": (LONGFORMER, {}, "pallas"),
    "longformer_float32": (LONGFORMER, {"dtype": "float32"}, "xla"),
    "longformer_40_features": (LONGFORMER, {"features": 40}, "xla"),
    "bigbird": (compound.bigbird(T, block=32), {}, "pallas"),
    "bigbird_of_16": (compound.bigbird(T, block=16), {}, "xla"),
    "elements": (ELEMENTS, {}, "xla"),
    "dilated": (CompoundPattern.from_parts(T, bands=[Band(4, 4, 2)]), {}, "xla"),
    "match": (Codes(WORDS, WORDS, num_codes=8), {}, "pallas"),
    "match_float32": (Codes(WORDS, WORDS, num_codes=8), {"dtype": "float32"}, "xla"),
    "match_256_features": (Codes(WORDS, WORDS, num_codes=8), {"features": 256}, "xla"),
    "adc": (Codes(TABLES, WORDS, num_codes=8), {}, "xla"),
}
ATTENTION = {
    CompoundPattern: compound_attention,
    Codes: functools.partial(top_l_attention, keep=9, causal=True),
}


@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_it_names_what_none_runs(name, hopper):
    pattern, options, on_hopper = CASES[name]
    options = {"dtype": "bfloat16", "features": 64} | options
    q = jnp.zeros((1, T, 2, options["features"]), options["dtype"])
    attend = ATTENTION.get(type(pattern), block_sparse_attention)
    with pallas.lowering() if hopper else contextlib.nullcontext():
        assert default_implementation(q, pattern) == (on_hopper if hopper else "xla")
        run = lambda q, pattern, name: attend(q, q, q, pattern, implementation=name)
        programs = {
            name: str(jax.make_jaxpr(run, static_argnums=2)(q, pattern, name))
            for name in (None, default_implementation(q, pattern))
        }
    assert programs[None] == programs[on_hopper if hopper else "xla"]
    assert ("kernel_name" in programs[None]) == (hopper and on_hopper == "pallas")


def test_it_follows_from_shapes_under_jit():
    def run(q, pattern):
        assert default_implementation(q, pattern) == "xla"
        return q

    jax.jit(run)(jnp.zeros((1, T, 2, 64), jnp.bfloat16), LONGFORMER)


@pytest.mark.parametrize("hopper", [False, True])
@pytest.mark.parametrize(
    ("rows", "tiles", "size", "faster"),
    [(511, 4, 256, False), (4096, 4, 256, True), (64, 8, 256, True), (65, 8, 256, False)],
)
def test_it_names_what_none_runs_for_factors(rows, tiles, size, faster, hopper):
    of = lambda *shape: jnp.zeros(shape, jnp.bfloat16)
    u, v = of(tiles, size, tiles, 64), of(tiles, tiles, 64, size)
    factors = TiledFactors(u, v, pad_in=0, pad_out=0)
    x, found = of(rows, tiles * size), hopper and faster
    with pallas.lowering() if hopper else contextlib.nullcontext():
        assert default_implementation(x, factors) == ("pallas" if found else "xla")
        traced = jax.jit(lambda x, factors: tsvd_matmul(x, factors)).trace(x, factors)
        program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert ("mosaic_gpu" in program) == found


@pytest.mark.usefixtures("unchecked")
def test_it_refuses_what_is_no_pattern():
    with pytest.raises(
        ValueError,
        match=r"BlockPattern, a sparsax.CompoundPattern.*TiledFactors; got ndarray",
    ):
        default_implementation(jnp.zeros((1, T, 2, 64)), np.ones((T, T)))
