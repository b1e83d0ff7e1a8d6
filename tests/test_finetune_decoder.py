"""Every rule on decoders of both styles: what it changes, trains, saves and merges."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from finetune_ways import LINEARS, RANK, WAYS, convert, factors, rules_of
from flax import nnx
from language import load_model, save_model

from sparsax import sparsify
from sparsax.nn import (
    ChoiceBias,
    Codebooks,
    CodebookWeights,
    DecoderConfig,
    LanguageModel,
    SparseAttention,
    TunedParam,
    named_modules,
)
from sparsax.peft import adapters, count_parameters, load_adapters, merge, save_adapters
from sparsax.peft import trainable_mask as mask_of
from sparsax.rules import TSVD, LoRA, Routed, TopL, TSVDCommon
from tests.helpers import assert_near

SIZES = {"vocab_size": 50, "length": 16, "features": 16, "hidden": 32, "num_heads": 2, "layers": 1}
STYLES = pytest.mark.parametrize("style", ["opt", "llama"])
TOKENS = jax.random.randint(jax.random.key(0), (2, 16), 0, 50)
ARGS = SimpleNamespace(tokens=0, tile=8, common_tile=8, tsvd="xla", routed="xla", flash="xla")
run = nnx.jit(lambda model, tokens: model(tokens))


def model(style):
    return LanguageModel(getattr(DecoderConfig, style)(**SIZES), rngs=nnx.Rngs(0))


def rules(way, seed=0):
    """What the benchmark of fine-tuning does to a model, and trains."""
    return rules_of(way, SIZES["length"], seed, ARGS)


def tune(model, rules):
    return sparsify(model, rules, calibrate=lambda model: run(model, TOKENS))


SPT = nnx.Any(rules("spt-2-4")[1], Codebooks, CodebookWeights, ChoiceBias)
CHANGES_NOTHING = {  # at the start
    "lora": rules("lora"),
    "spt": rules("spt-4-1"),
    "common": rules("common-2-res"),
    "tsvd": ([TSVD(path=LINEARS, tile=8, rank=8)], factors),
}
EACH = pytest.mark.parametrize("way", CHANGES_NOTHING)


def moved(tuned, wrt):
    """The model with something added to what is trained."""
    change = lambda leaf: leaf + jax.random.normal(jax.random.key(leaf.size), leaf.shape) / 8
    nnx.update(tuned, jax.tree.map(change, nnx.state(tuned, wrt)))
    return tuned


@STYLES
@EACH
def test_conversion_keeps_the_outputs_and_counts_what_is_trained(style, way):
    own, wrt = CHANGES_NOTHING[way]
    dense = model(style)
    tuned, report = tune(dense, own)
    assert_near(run(tuned, TOKENS), run(dense, TOKENS), 1e-4, "logits")
    matrices = 4 + (3 if style == "llama" else 2)
    routed = 5 + 1  # projections and the layer, and attention
    assert len(report.rows) == (routed if way == "spt" else matrices)
    count = count_parameters(tuned, wrt)
    assert count.trainable == sum(x.size for x in adapters(tuned, wrt).values())
    assert count.total == report.parameters[1]
    if way == "lora":
        assert count.trainable == RANK * (4 * (16 + 16) + (matrices - 4) * (16 + 32))
    mask = [path for path, leaf in nnx.to_flat_state(mask_of(tuned, wrt)) if leaf.get_value()]
    assert {".".join(map(str, path)) for path in mask} == set(adapters(tuned, wrt))


@STYLES
@EACH
def test_adapters_alone_carry_a_tuning_over_and_merge(tmp_path, style, way):
    own, wrt = other, kept = CHANGES_NOTHING[way]
    if way == "spt":  # blocks and keys of which some are left out; a file needs the codebooks too
        own, other, kept = rules("spt-2-4")[0], rules("spt-2-4", seed=1)[0], SPT
    tuned = moved(tune(model(style), own)[0], wrt)
    want, before = run(tuned, TOKENS), run(model(style), TOKENS)
    assert float(jnp.abs(want - before).max()) > 1e-2
    save_adapters(tmp_path / "a.safetensors", tuned, wrt=kept)
    fresh, _ = tune(model(style), other)
    load_adapters(tmp_path / "a.safetensors", fresh, wrt=kept)
    np.testing.assert_array_equal(run(fresh, TOKENS), want)
    merged = merge(tuned)
    assert_near(run(merged, TOKENS), want, 1e-4, "merged")
    assert_near(run(tuned, TOKENS), want, 0, "the model that was merged")
    left = {type(m).__name__ for m in named_modules(merged).values()}
    assert not left & {"LoRALinear", "TSVDLinear", "TSVDCommonLinear"}
    assert not jax.tree.leaves(nnx.state(merged, nnx.LoRAParam))
    if way != "spt":
        assert nnx.graphdef(merged) == nnx.graphdef(model(style))


@STYLES
def test_a_saved_model_is_read_as_it_was(tmp_path, style):
    before = model(style)
    save_model(before, tmp_path)
    after = load_model(tmp_path, None)
    assert after.config == before.config
    np.testing.assert_array_equal(run(after, TOKENS), run(before, TOKENS))
    assert run(load_model(tmp_path, jnp.bfloat16), TOKENS).dtype == jnp.bfloat16


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_the_benchmark_trains_in_float32_and_freezes_the_rest(tmp_path, way):
    save_model(model("opt"), tmp_path)
    args = SimpleNamespace(**vars(ARGS), model=tmp_path, length=SIZES["length"])
    parts, size = convert(way, 0, args, TOKENS)
    types = lambda state: {leaf.dtype.name for leaf in jax.tree.leaves(state)}
    assert types(parts.tuned) == {"float32"}
    assert types(parts.frozen) == (set() if way == "full" else {"bfloat16"})
    whole = nnx.merge(parts.graph, parts.tuned, parts.frozen, parts.other)
    assert size == sum(x.size for x in jax.tree.leaves(nnx.state(whole, nnx.Param)))
    dense = [m.dense for m in named_modules(whole).values() if isinstance(m, SparseAttention)]
    assert dense == ([] if way.startswith(("spt", "top")) else ["xla"])
    assert jnp.isfinite(run(whole, TOKENS)).all()


@STYLES
@pytest.mark.parametrize("rule", [
    LoRA(path="mlp"), Routed(path="mlp"), TopL(path="mlp", keep=4), TSVD(path="mlp", ratio=2),
    TSVDCommon(path="mlp", ratio=2),
], ids=lambda rule: type(rule).__name__)  # fmt: skip
def test_rules_that_match_nothing_are_refused(style, rule):
    with pytest.raises(ValueError, match=r"path='mlp' must match a module of type .*blocks\.0"):
        sparsify(model(style), [rule])


def test_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match="variables of type TunedParam; LanguageModel has none"):
        adapters(model("opt"), TunedParam)
    with pytest.raises(ValueError, match=r"variables of type Any\(.*LoRAParam.*has none"):
        adapters(model("opt"), rules("spt-2-4")[1])
