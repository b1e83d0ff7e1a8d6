"""The Hopper kernels against the float32 reference: interpreted here, and on the GPU itself."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsax
from sparsax import block_sparse_attention, pallas
from sparsax.pallas.block_sparse import config as configs
from sparsax.pallas.block_sparse import schedule
from sparsax.pallas.block_sparse.deal import deal
from tests.helpers import TOLERANCES, assert_near
from tests.pallas.cases import KERNEL_CASES, LARGE, SMALL

pytestmark = pytest.mark.usefixtures("few_multiprocessors")
name = lambda c: c.name
# Interpreting a case takes seconds; these few meet every feature of the kernels between them. What
# h32 shows is checked by `test_who_waits_for_whom_changes_no_bit`.
INTERPRETED = tuple(c for c in KERNEL_CASES if c.name != "h32") + tuple(
    c
    for c in SMALL
    if c.name in ("ragged_zero", "gqa_per_head", "segments_padding_causal", "holes")
)


def value_and_gradients(c, implementation, dtype):
    """`(o, lse), (dq, dk, dv)` under jit, computed from inputs cast to `dtype`."""
    inputs = c.inputs()
    q, k, v, do = (x.astype(dtype) for x in (*inputs[:3], inputs.cotangents[0]))

    @jax.jit
    def run(q, k, v, pattern, cotangents):
        attend = lambda q, k, v: block_sparse_attention(
            q, k, v, pattern, **inputs.options, return_lse=True, implementation=implementation
        )
        values, pull = jax.vjp(attend, q, k, v)
        return values, pull(cotangents)

    return run(q, k, v, inputs.pattern, (do, inputs.cotangents[1]))


def check(c):
    (o, lse), gradients = value_and_gradients(c, "pallas", c.dtype)
    with jax.default_matmul_precision("highest"):
        (want_o, want_lse), want = value_and_gradients(c, "reference", "float32")
    assert (o.dtype, lse.dtype) == (jnp.dtype(c.dtype), jnp.float32)
    assert_near(o, want_o, c.tolerance.output, "o")
    assert_near(lse, want_lse, c.tolerance.lse, "lse")
    for which, got, expected in zip(("dq", "dk", "dv"), gradients, want, strict=True):
        assert got.dtype == jnp.dtype(c.dtype)
        assert_near(got, expected, c.tolerance.gradient, which)
    return (o, lse), gradients


@pytest.mark.usefixtures("no_races")
@pytest.mark.parametrize("c", INTERPRETED, ids=name)
def test_interpreted_kernels_match_the_reference_without_races(c):
    with pallas.interpreted(detect_races=True):
        check(c)


@pytest.mark.usefixtures("no_races")
@pytest.mark.parametrize("which", ["h128_mqa", "holes"])
def test_rows_need_no_order_where_each_has_a_multiprocessor(which, fresh, monkeypatch):
    monkeypatch.setattr(schedule, "multiprocessors", lambda: 132)
    monkeypatch.setattr(schedule.Schedule, "read", refuse_to_sort(schedule.Schedule.read))
    with pallas.interpreted(detect_races=True):
        check(next(c for c in INTERPRETED if c.name == which))


def refuse_to_sort(read):
    """Reads items of rows that were dealt beforehand; an error of those that were ranked."""

    def checked(self, *args):
        assert self.beforehand
        return read(self, *args)

    return checked


@pytest.mark.gpu
@pytest.mark.parametrize("c", KERNEL_CASES + LARGE, ids=name)
def test_kernels_match_the_reference_and_repeat_their_bits(c):
    first, again = check(c), value_and_gradients(c, "pallas", c.dtype)
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.usefixtures("no_races")
def test_split_rows_add_up_interpreted(joined):
    # On a GPU this small every column of the cross is long: it is cut, and its parts are added.
    with pallas.interpreted(detect_races=True):
        check(next(c for c in KERNEL_CASES if c.name == "h128_mqa"))
    assert len(joined) == 3  # of o, of dq, of dk and dv


@pytest.mark.usefixtures("no_races")
@pytest.mark.parametrize(
    "choice",
    [
        {"forward": {"turns": True}, "dq": {"turns": True}, "dkv": {"turns": True}},
        {"forward": {"teams": 2}},
        {"forward": {"teams": 2}, "stay": 0},
        {"dkv": {"spaces": 1}},
    ],
    ids=["turns", "teams", "passing_teams", "spaces"],
)
def test_who_waits_for_whom_changes_no_bit(choice, monkeypatch):
    if "stay" in choice:
        for most in ("STAY", "STAY_CACHED"):
            monkeypatch.setattr(schedule, most, choice["stay"])
    c, found = next(c for c in KERNEL_CASES if c.name == "h32"), []
    old = configs.TABLE[c.H]  # with tiles forward that two teams have registers for
    old = dataclasses.replace(old, forward=dataclasses.replace(old.forward, tile=64, stages=3))
    kernels = {name: x for name, x in choice.items() if name != "stay"}
    new = {name: dataclasses.replace(getattr(old, name), **x) for name, x in kernels.items()}
    for config in (old, dataclasses.replace(old, **new)):
        for table in (configs.TABLE, configs.MASKED):
            monkeypatch.setitem(table, c.H, config)
        with pallas.interpreted(detect_races=True):
            found.append(check(c))
    for x, y in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.usefixtures("no_races", "fresh")
def test_long_rows_have_a_thread_block_each(monkeypatch):
    monkeypatch.setattr(schedule, "multiprocessors", lambda: 4)
    blocks = np.eye(5, dtype=bool)
    blocks[2] = True  # five units where the mean load is 9 / 4
    pattern = sparsax.BlockPattern.from_block_mask(blocks[None], q_len=600, block_q=128)
    q, k, v, do = jax.random.normal(jax.random.key(1), (4, 1, 600, 1, 32), jnp.float16)

    def both(implementation):
        attend = lambda *x: block_sparse_attention(*x, pattern, implementation=implementation)
        o, pull = jax.vjp(attend, q, k, v)
        return o, pull(do)

    with pallas.interpreted(detect_races=True):
        plan = schedule.Schedule(1, 5, 1, 5)
        table, _ = deal(plan, jnp.array([[1, 1, 5, 1, 1]]), interpret=pallas.interpret())
        assert plan.stay
        assert table[1] == 1  # the long one
        found = jax.jit(lambda: both("pallas"))()
    for got, want in zip(*map(jax.tree.leaves, (found, both("reference"))), strict=True):
        assert_near(got, want, TOLERANCES["float16"].output, "array")


def test_vmap_is_a_longer_batch():
    q, k, v = jax.random.normal(jax.random.key(1), (3, 2, 1, 128, 2, 32), jnp.float16)
    pattern = sparsax.patterns.causal(128, block=64)
    do = q[::-1]

    def gradients(q, k, v, do):
        attend = lambda *x: block_sparse_attention(
            *x, pattern, causal=True, implementation="pallas"
        )
        o, pull = jax.vjp(attend, q, k, v)
        return o, pull(do)

    with pallas.interpreted():
        run = jax.jit(jax.vmap(gradients))
        batched, turned = (jax.tree.leaves(run(*(x[::i] for x in (q, k, v, do)))) for i in (1, -1))
        joined = jax.tree.leaves(jax.jit(gradients)(*(x[:, 0] for x in (q, k, v, do))))
    for name, x, y, z in zip("oqkv", batched, turned, joined, strict=True):
        np.testing.assert_array_equal(x, y[::-1], err_msg=name)
        # Of another program not the same bits: how XLA rounds an interpreted logarithm depends on
        # what it fuses it with.
        assert_near(x[:, 0], z, 1e-4, name)


def test_an_invalid_head_is_nan_and_only_that():
    pattern = sparsax.BlockPattern.from_block_mask(np.ones((2, 2, 2), bool), q_len=256, block_q=128)
    q = jax.random.normal(jax.random.key(0), (1, 256, 2, 64), jnp.bfloat16)
    run = lambda q, bad: jax.vjp(
        lambda q: block_sparse_attention(q, q, q, pattern.invalidate(bad), implementation="pallas"),
        q,
    )

    def value_and_gradient(q, bad):
        o, pull = run(q, bad)
        return o, pull(o)[0]

    with pallas.interpreted():
        for x in jax.jit(value_and_gradient)(q, jnp.array([False, True])):
            assert np.isfinite(np.asarray(x[:, :, 0], np.float32)).all()
            assert np.isnan(np.asarray(x[:, :, 1], np.float32)).all()


@pytest.mark.usefixtures("fresh", "no_races")
@pytest.mark.parametrize("tight", ["kv_width", "q_width"])
@pytest.mark.parametrize(
    ("block", "causal", "few"),
    [(128, False, 1), (128, False, 132), (128, True, 132), (64, True, 1)],
)
def test_a_list_that_overflows_under_jit_makes_its_head_nan(block, causal, few, tight, monkeypatch):
    """Where the kernels find it: of rows that are dealt out, and of single ones."""
    monkeypatch.setattr(schedule, "multiprocessors", lambda: few)
    rows, columns = 384 // block, 256 // block
    mask = np.zeros((2, rows, columns), bool)
    mask[:, range(columns), range(columns)] = True
    mask[0, range(rows), np.arange(rows) % columns] = True  # columns of two entries
    mask[0, 0, 1] = True  # and a row of two, of which causality leaves one
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 384, 2, 64), jnp.bfloat16)

    @functools.partial(jax.jit, static_argnums=1)
    def run(mask, widths):
        pattern = sparsax.BlockPattern.from_block_mask(
            mask, q_len=384, kv_len=256, block_q=block, **dict(widths)
        )
        attend = lambda q, k, v: block_sparse_attention(
            q, k, v, pattern, causal=causal, implementation="pallas", return_lse=True
        )
        values, pull = jax.vjp(attend, q, k[:, :256], k[:, 128:])
        return *values, *pull((q, q[..., 0].astype(jnp.float32)))

    with pallas.interpreted(detect_races=True):
        enough, bad = run(jnp.asarray(mask), ()), run(jnp.asarray(mask), ((tight, 1),))
    assert not np.isnan(np.asarray(enough[0], np.float32)).any()
    for name, good, found in zip(("o", "lse", "dq", "dk", "dv"), enough, bad, strict=True):
        good, found = (np.asarray(x, np.float32) for x in (good, found))
        assert np.isnan(found[:, :, 0]).all(), name
        assert_near(found[:, :, 1], good[:, :, 1], 1e-4, name)  # of two programs, as under vmap


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("heads", "length", "causal", "reduces"),
    [
        (16, 1024, False, False),  # single rows
        (16, 4096, False, False),  # rows that are dealt out
        (16, 1024, True, True),  # to cut the lists in any case
        (1, 8192, False, True),  # each of the single rows would read 128 lists
    ],
)
def test_xla_reduces_lists_only_where_kernels_do_not(heads, length, causal, reduces, monkeypatch):
    monkeypatch.setattr(schedule, "multiprocessors", lambda: 132)
    q = jax.ShapeDtypeStruct((1, length, heads, 64), jnp.bfloat16)
    blocks = np.arange(length // 128)
    mask = np.broadcast_to(abs(blocks - blocks[:, None]) < 3, (heads, len(blocks), len(blocks)))
    pattern = sparsax.BlockPattern.from_block_mask(mask, q_len=length, block_q=128, kv_width=8)
    attend = functools.partial(block_sparse_attention, causal=causal, implementation="pallas")
    with pallas.lowering():
        lowered = jax.jit(attend).trace(q, q, q, pattern).lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()
    assert ("stablehlo.reduce(" in lowered.as_text()) == reduces


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float32"}, r"takes q, k, v in one of .*got float32"),
        ({"H": 48}, r"takes head features H in .*got H=48"),
        ({"block_q": 16}, r"takes pattern blocks of .*got 16 x 128"),
    ],
)
def test_what_the_kernels_cannot_do_names_what_can(change, message):
    shape = {"dtype": "bfloat16", "H": 64, "block_q": 128, "block_kv": 128} | change
    q = jnp.zeros((1, 256, 2, shape["H"]), shape["dtype"])
    pattern = sparsax.BlockPattern.from_block_mask(
        np.ones((256 // shape["block_q"], 2), bool), q_len=256, block_q=shape["block_q"],
        kv_len=256, block_kv=shape["block_kv"],
    )  # fmt: skip
    with pallas.lowering(), pytest.raises(NotImplementedError, match=message + ".*'xla' runs"):
        block_sparse_attention(q, q, q, pattern, implementation="pallas")


@pytest.mark.skipif(pallas.on_hopper(), reason="the kernels do run here")
def test_without_a_gpu_the_kernels_refuse():
    q = jnp.zeros((1, 256, 2, 64), jnp.bfloat16)
    pattern = sparsax.patterns.causal(256, block=128)
    with pytest.raises(NotImplementedError, match="needs an NVIDIA Hopper GPU"):
        block_sparse_attention(q, q, q, pattern, implementation="pallas")
