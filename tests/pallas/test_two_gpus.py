"""Attention spread over two GPUs by `jax.shard_map` beside one GPU: the kernels move no data."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as Spec

from sparsax import block_sparse_attention, pallas
from tests.helpers import Case, assert_near, launched

# A list of fewer than 32 blocks is never cut: every sum has the order that it has on one GPU.
WHOLE = (
    Case(name="per_head_causal", B=4, T=1000, S=1000, N=4, K=2, P=4, H=64, block_q=64, block_kv=64,
         dtype="bfloat16", causal=True, padding="some", pruned="zero"),
    Case(name="per_kv_head", B=2, T=512, S=1024, N=8, K=4, P=4, H=128, block_q=128, block_kv=64,
         dtype="float16"),
    Case(name="shared", B=2, T=768, S=768, N=4, K=4, P=1, H=32, block_q=32, block_kv=32,
         dtype="bfloat16", segments=True),
)  # fmt: skip
CUT = Case(name="long_lists", B=2, T=8192, S=8192, N=4, K=4, P=4, H=64, block_q=64, block_kv=64,
           dtype="bfloat16", blocks="cross")  # fmt: skip
SMALL = Case(name="small", B=2, T=128, S=128, N=2, K=2, P=2, H=32, block_q=64, block_kv=64,
             dtype="bfloat16", causal=True, padding="some")  # fmt: skip
NAMES = ("o", "lse", "dq", "dk", "dv")
two_gpus = pytest.mark.skipif(
    len(jax.devices()) < 2, reason=f"needs two GPUs; there is {len(jax.devices())}"
)


def program(c: Case, implementation: str, split: str | None):
    """`(o, lse), (dq, dk, dv)` of a case as a jitted function, and its arguments.

    It runs on one device, or on two by "batch" or by "heads".
    """
    inputs = c.inputs()
    arrays = {n: x for n, x in inputs.options.items() if n in ("key_mask", "segment_ids")}
    statics = {n: x for n, x in inputs.options.items() if n not in arrays}

    def run(q, k, v, pattern, arrays, cotangents):
        call = functools.partial(
            block_sparse_attention, pattern=pattern, **arrays, **statics, return_lse=True,
            implementation=implementation,
        )  # fmt: skip
        values, pull = jax.vjp(lambda q, k, v: call(q, k, v), q, k, v)
        return values, pull(cotangents)

    if split is not None:
        # Per-head patterns go where their heads go; a shared one goes everywhere.
        x, pattern, ids = {
            "batch": (Spec("two"), Spec(), Spec("two")),
            "heads": (Spec(None, None, "two"), Spec("two") if c.P > 1 else Spec(), Spec()),
        }[split]
        run = jax.shard_map(
            run, mesh=Mesh(np.array(jax.devices()[:2]), ("two",)),
            in_specs=(x, x, x, pattern, ids, x), out_specs=x,
        )  # fmt: skip
    return jax.jit(run), (*inputs[:4], arrays, inputs.cotangents)


def attend(c: Case, implementation: str, split: str | None) -> list[np.ndarray]:
    """What the program gives: `o, lse, dq, dk, dv`."""
    run, args = program(c, implementation, split)
    found = run(*args)
    devices = {len(x.sharding.device_set) for x in jax.tree.leaves(found)}
    assert devices == {1 if split is None else 2}
    return [np.asarray(x, np.float32) for x in jax.tree.leaves(found)]


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("split", ["batch", "heads"])
@pytest.mark.parametrize("c", WHOLE, ids=lambda c: c.name)
def test_two_gpus_give_the_bits_of_one(c, split):
    one, two = attend(c, "pallas", None), attend(c, "pallas", split)
    for name, x, y in zip(NAMES, two, one, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("split", ["batch", "heads"])
def test_lists_cut_elsewhere_differ_by_rounding_alone(split):
    # Where a long row or column is cut follows from the work of a GPU, and so does the order of its
    # sums. Then o and dq are rounded to bfloat16, neighbours of which are up to 1/128 apart, and dq
    # and dk are made of o: where o differs by 3e-3, its products with do move dk by 1.4e-3.
    tolerance = {"o": 1 / 256, "lse": 1e-5, "dq": 1 / 256, "dk": 1 / 256, "dv": 1e-3}
    one, two = attend(CUT, "pallas", None), attend(CUT, "pallas", split)
    for name, x, y in zip(NAMES, two, one, strict=True):
        assert_near(x, y, tolerance[name], name)


@pytest.mark.parametrize("split", ["batch", "heads"])
@pytest.mark.parametrize("c", [*WHOLE[:1], SMALL], ids=lambda c: c.name)
def test_two_devices_give_what_one_gives(c, split):
    one, two = attend(c, "xla", None), attend(c, "xla", split)
    for name, x, y in zip(NAMES, two, one, strict=True):
        assert_near(x, y, 1e-3, name)


@pytest.mark.usefixtures("one_multiprocessor")
@pytest.mark.parametrize("split", ["batch", "heads"])
@pytest.mark.parametrize("c", WHOLE, ids=lambda c: c.name)
def test_the_kernels_lower_for_two_devices(c, split):
    # Interpret mode cannot run them: it mixes up the barriers of two devices.
    with pallas.lowering():
        run, args = program(c, "pallas", split)
        text = run.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    # Rows are dealt out for forward and dq together, and for dkv.
    assert launched(text) == 5
