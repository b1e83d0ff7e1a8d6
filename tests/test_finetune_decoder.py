"""Every rule on decoders of both styles: what it changes, trains, saves and merges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsax import sparsify
from sparsax.nn import (
    ChoiceBias,
    Codebooks,
    CodebookWeights,
    CommonParam,
    DecoderConfig,
    LanguageModel,
    RouterParam,
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
ATTENTION = r".*attention\.(query|key|value|out)"
LINEARS = rf"{ATTENTION}|.*ffn\.(up|gate|down)"
TUNED = nnx.Any(nnx.LoRAParam, RouterParam)
SPT = nnx.Any(TUNED, Codebooks, CodebookWeights, ChoiceBias)
run = nnx.jit(lambda model, tokens: model(tokens))


def model(style):
    return LanguageModel(getattr(DecoderConfig, style)(**SIZES), rngs=nnx.Rngs(0))


def spt(active=2, keep=4, seed=0):
    return [
        LoRA(path=ATTENTION, rank=2, seed=seed),
        Routed(path=r".*\.ffn", num_blocks=4, active=active, tokens=0, lora_rank=2, seed=seed),
        TopL(path=r".*\.attention", keep=keep, sequences=0, seed=seed),
    ]


WAYS = {  # rules that change nothing at the start, what is trained, what a file needs
    "lora": ([LoRA(path=LINEARS, rank=2)], nnx.LoRAParam, nnx.LoRAParam),
    "spt": (spt(active=4, keep=16), TUNED, SPT),
    "common": ([TSVDCommon(path=LINEARS, tile=8, rank=2, mode="residual")],) + (CommonParam,) * 2,
    "tsvd": ([TSVD(path=LINEARS, tile=8, rank=8)],) + (lambda path, _: path[-1] in ("u", "v"),) * 2,
}
EACH = pytest.mark.parametrize("way", WAYS)


def moved(tuned, wrt):
    """The model with something added to what is trained."""
    change = lambda leaf: leaf + jax.random.normal(jax.random.key(leaf.size), leaf.shape) / 8
    nnx.update(tuned, jax.tree.map(change, nnx.state(tuned, wrt)))
    return tuned


@STYLES
@EACH
def test_conversion_keeps_the_outputs_and_counts_what_is_trained(style, way):
    rules, wrt, _ = WAYS[way]
    dense = model(style)
    tuned, report = sparsify(dense, rules)
    assert_near(run(tuned, TOKENS), run(dense, TOKENS), 1e-4, "logits")
    matrices = 4 + (3 if style == "llama" else 2)
    routed = 5 + 1  # projections and the layer, and attention
    assert len(report.rows) == (routed if way == "spt" else matrices)
    count = count_parameters(tuned, wrt)
    assert count.trainable == sum(x.size for x in adapters(tuned, wrt).values())
    assert count.total == report.parameters[1]
    if way == "lora":
        assert count.trainable == 2 * (4 * (16 + 16) + (matrices - 4) * (16 + 32))
    mask = [path for path, leaf in nnx.to_flat_state(mask_of(tuned, wrt)) if leaf.get_value()]
    assert {".".join(map(str, path)) for path in mask} == set(adapters(tuned, wrt))


@STYLES
@EACH
def test_adapters_alone_carry_a_tuning_over_and_merge(tmp_path, style, way):
    rules, wrt, kept = WAYS[way]
    if way == "spt":  # blocks and keys of which some are left out
        rules = spt()
    tuned = moved(sparsify(model(style), rules)[0], wrt)
    want, before = run(tuned, TOKENS), run(model(style), TOKENS)
    assert float(jnp.abs(want - before).max()) > 1e-2
    save_adapters(tmp_path / "a.safetensors", tuned, wrt=kept)
    other = spt(seed=1) if way == "spt" else rules
    fresh, _ = sparsify(model(style), other)
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
        adapters(model("opt"), TUNED)
