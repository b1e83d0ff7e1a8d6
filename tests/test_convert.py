import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsax import sparsify
from sparsax.convert import Report, Row, Rule
from sparsax.nn import Classifier, TSVDCommonLinear, TSVDLinear, named_modules
from sparsax.rules import TSVD, TSVDCommon
from tests.helpers import assert_near

TOKENS = jax.random.randint(jax.random.key(0), (4, 16), 1, 50)
FFN = r".*\.(up|down)"


def model():
    return Classifier(50, 16, 3, features=32, hidden=64, num_heads=2, rngs=nnx.Rngs(0))


def types(model):
    return {path: type(module).__name__ for path, module in named_modules(model).items()}


def test_matched_layers_are_replaced_in_a_copy_and_the_others_are_not():
    before = model()
    state = nnx.to_pure_dict(nnx.state(before))
    after, report = sparsify(before, [TSVD(path=FFN, tile=16, rank=4)])
    changed = {path for path, kind in types(after).items() if kind == "TSVDLinear"}
    assert changed == {row.path for row in report.rows}
    assert len(changed) == 4
    assert types(before).keys() == types(after).keys()
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(before)), state)
    for row in report.rows:
        layer = named_modules(after)[row.path]
        assert (row.before, row.after, row.detail) == (
            "Linear", "TSVDLinear", "tile 16 x 16, rank 4",
        )  # fmt: skip
        assert row.parameters == (2048, layer.u.size + layer.v.size)
        assert row.bytes == (8192, 4 * row.parameters[1])
        assert row.flops == (4096, 2 * row.parameters[1])
        dense = named_modules(before)[row.path].kernel[...]
        assert abs(row.error - float(layer.factors.error(dense))) < 1e-6
    saved = report.total("parameters")
    assert report.parameters[0] - report.parameters[1] == saved[0] - saved[1]
    logits = nnx.jit(lambda m, t: m(t))(after, TOKENS)
    assert bool(jnp.isfinite(logits).all())


def test_full_rank_changes_nothing():
    after, report = sparsify(model(), [TSVD(path="encoder.*", tile=16, rank=16)])
    assert len(report.rows) == 12  # with LinearGeneral: four of each attention
    assert_near(after(TOKENS), model()(TOKENS), 1e-5, "logits")
    assert max(row.error for row in report.rows) < 1e-6


@pytest.mark.parametrize("weighted", [False, True])
def test_one_budget_is_spread_over_all_layers(weighted):
    rule = TSVD(path=FFN, ratio=2, tiles=(16, None), weighted=weighted)
    after, report = sparsify(model(), [rule], calibrate=lambda m: m(TOKENS))
    before, kept = report.total("parameters")
    assert 0.8 * before / 2 < kept <= before / 2
    assert len({type(m) for m in named_modules(after).values()} & {TSVDLinear}) == 1
    text = str(report)
    assert all(row.path in text for row in report.rows)
    assert f"{before:,} -> {kept:,} of these" in text
    assert "4,096 rows, at least, at 700 TFLOP/s and 4 TB/s: " in text


def test_the_least_time_is_that_of_the_weights_or_of_the_arithmetic():
    row = Row(
        path="", before="", after="", detail="", error=0.0, parameters=(100, 25),
        bytes=(200, 50), flops=(200, 50),
    )  # fmt: skip
    assert row.seconds(1, flops=100.0, bandwidth=10.0) == (20.0, 5.0)
    assert row.seconds(100, flops=100.0, bandwidth=10.0) == (200.0, 50.0)
    report = Report((row, row), (200, 50))
    assert report.seconds(1, flops=100.0, bandwidth=10.0) == (40.0, 10.0)


def test_a_layer_that_is_worth_it_stays_dense():
    net = model()
    for block in net.encoder.blocks:
        block.up.kernel[...] = block.up.kernel[...][:, :2] @ jnp.ones((2, 64))
    after, report = sparsify(net, [TSVD(path=FFN, ratio=1.9)])
    kept = {row.path for row in report.rows if row.detail == "kept dense"}
    assert kept == {"encoder.blocks.0.down", "encoder.blocks.1.down"}
    assert all(row.before == row.after for row in report.rows if row.path in kept)
    assert {types(after)[path] for path in kept} == {"Linear"}


def test_calibration_lowers_the_error_of_the_outputs():
    rng = np.random.default_rng(0)
    net = model()
    net.encoder.tokens.embedding[...] = jnp.asarray(
        rng.standard_normal((50, 4)) @ rng.standard_normal((4, 32)), jnp.float32
    )
    error = {}
    for weighted in (False, True):
        rule = TSVD(path=r".*\.up", tile=16, rank=4, weighted=weighted)
        after, _ = sparsify(net, [rule], calibrate=nnx.jit(lambda m: m(TOKENS)))
        error[weighted] = float(jnp.linalg.norm(after(TOKENS) - net(TOKENS)))
        assert not any("Observer" in kind for kind in types(after).values())
    assert error[True] < 0.8 * error[False]


def test_calibration_leaves_no_trace_in_the_model():
    before = model()
    calls = []
    rule = TSVD(path=FFN, tile=16, rank=4, weighted=True)
    sparsify(before, [rule], calibrate=lambda m: calls.append(m(TOKENS)))
    assert_near(calls[0], before(TOKENS), 1e-6, "the scratch copy computes the same")
    assert not nnx.state(before, lambda _, v: type(v) is nnx.Variable)


@pytest.mark.parametrize("mode", ["compressed", "residual"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_layers_for_fine_tuning(mode, side):
    rule = TSVDCommon(path=FFN, tile=16, rank=4, side=side, mode=mode)
    after, report = sparsify(model(), [rule])
    layer = after.encoder.blocks[0].up
    assert isinstance(layer, TSVDCommonLinear)
    row = next(row for row in report.rows if row.path == "encoder.blocks.0.up")
    assert row.parameters[1] == sum(v.size for v in jax.tree.leaves(nnx.state(layer)) if v.ndim > 1)
    if mode == "residual":
        assert_near(after(TOKENS), model()(TOKENS), 1e-5, "logits")
        assert row.detail == f"tile 16, rank 4, common {side}, residual"


def test_two_rules_with_a_budget_each():
    rules = [TSVD(path=r".*\.up", tile=16, rank=4), TSVDCommon(path=r".*\.down", tile=16, rank=4)]
    after, report = sparsify(model(), rules)
    assert isinstance(after.encoder.blocks[1].up, TSVDLinear)
    assert isinstance(after.encoder.blocks[1].down, TSVDCommonLinear)
    assert len(report.rows) == 4


def test_a_shared_layer_stays_shared():
    class Tied(nnx.Module):
        def __init__(self):
            self.one = nnx.Linear(32, 32, rngs=nnx.Rngs(0))
            self.two = self.one

    after, report = sparsify(Tied(), [TSVD(tile=16, rank=4)])
    assert after.one is after.two
    assert isinstance(after.two, TSVDLinear)
    assert len(report.rows) == 1


@dataclasses.dataclass(frozen=True)
class NoNorm:
    """A user's rule: four members, and nothing inherited."""

    path: str = r".*\.norm1"
    modules: tuple = (nnx.LayerNorm,)

    def observer(self, module):
        return None

    def convert(self, found, observers):
        row = lambda path: Row(
            path=path, before="LayerNorm", after="Dropout", detail="", error=0.0,
            parameters=(64, 0), bytes=(256, 0), flops=(0, 0),
        )  # fmt: skip
        return {path: (nnx.Dropout(0.0), row(path)) for path in found}


def test_rules_of_users_work():
    assert isinstance(NoNorm(), Rule)
    after, report = sparsify(model(), [NoNorm(), TSVD(path=FFN, tile=16, rank=4)])
    assert isinstance(after.encoder.blocks[0].norm1, nnx.Dropout)
    assert len(report.rows) == 6


class Unused(nnx.Module):
    def __init__(self):
        self.used, self.idle = (nnx.Linear(8, 8, rngs=nnx.Rngs(0)) for _ in range(2))

    def __call__(self, x):
        return self.used(x)


REFUSED = {
    "no_rules": (lambda: sparsify(model(), []), "at least one rule; got none"),
    "no_match": (
        lambda: sparsify(model(), [TSVD(path="mlp", ratio=2)]),
        r"path='mlp' must match a module of type Linear or LinearGeneral; the model's are "
        r"\['encoder.blocks.0.attention.key'",
    ),
    "nothing_there": (
        lambda: sparsify(nnx.Dropout(0.1), [TSVD(ratio=2)]),
        "the model's are none",
    ),
    "twice": (
        lambda: sparsify(model(), [TSVD(path=FFN, ratio=2), TSVDCommon(path=r".*\.up", ratio=2)]),
        r"\['encoder.blocks.0.up', 'encoder.blocks.1.up'\] match both path=",
    ),
    "no_calibration": (
        lambda: sparsify(model(), [TSVD(ratio=2, weighted=True)]),
        "pass calibrate=",
    ),
    "never_called": (
        lambda: sparsify(
            Unused(), [TSVD(tile=4, rank=1, weighted=True)], calibrate=lambda m: m(jnp.ones((2, 8)))
        ),
        "calibrate must run every matched layer; 'idle' was never called",
    ),
    "auto": (lambda: TSVD(energy=0.5), "tile='auto' spreads one budget: give ratio="),
    "out_of_reach": (
        lambda: sparsify(model(), [TSVD(path=FFN, ratio=900)]),
        "ratio must be within reach",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.usefixtures("unchecked")
def test_refusals(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()
