"""What routed feed-forward layers refuse, and how they lower."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsax import FFNLoRA, route_top_k, routed_ffn, split_ffn
from tests.ffn_cases import Case, case, run

X, WEIGHTS, LORA, P, _ = case("lora").inputs()
PLAN = route_top_k(P, 2)


def apply(x=X, weights=WEIGHTS, plan=PLAN, lora=None, activation="gelu", **options):
    return routed_ffn(x, weights, plan, lora=lora, activation=activation, **options)


def replaced(what, **fields):
    return dataclasses.replace(what, **fields)


REFUSED = {
    "weights": (lambda: apply(weights=X), "weights must come from sparsax.split_ffn; got Array"),
    "plan": (lambda: apply(plan=P), "plan must come from sparsax.route_top_k; got Array"),
    "lora": (lambda: apply(lora=X), "lora must come from sparsax.FFNLoRA.init; got Array"),
    "stacked": (
        lambda: apply(weights=jax.tree.map(lambda leaf: leaf[None], WEIGHTS)),
        "must be those of one layer; got stacked ones",
    ),
    "features": (lambda: apply(X[:, :-1]), r"weights' D=24 features; got \(40, 23\)"),
    "tokens": (lambda: apply(X[:-1]), r"for x's tokens \(39,\) .* got one for \(40,\) and G=4"),
    "blocks": (
        lambda: apply(plan=route_top_k(P[:, :3], 2)),
        "the weights' G=4 blocks; got one for .* and G=3",
    ),
    "dtype": (
        lambda: apply(X.astype(jnp.bfloat16)),
        r"must share one dtype .* got bfloat16 and \['float32'\]. Cast with weights.astype",
    ),
    "lora_dtype": (
        lambda: apply(lora=LORA.astype(jnp.bfloat16)),
        r"must share one dtype .* got float32 and \['bfloat16'\]",
    ),
    "lora_shapes": (
        lambda: apply(lora=replaced(LORA, down_a=LORA.down_a[:-1])),
        r"lora must fit the weights: .*'down_a': \(4, 16, 3\).*; got .*'down_a': \(3, 16, 3\)",
    ),
    "lora_gate": (
        lambda: apply(lora=replaced(LORA, gate_a=LORA.up_a)),
        r"lora must fit the weights: .*'gate_a': None.*; got .*'gate_a': \(24, 3\)",
    ),
    "activation": (lambda: apply(activation="tanh"), "activation must be one of .* got 'tanh'"),
    "recompute": (
        lambda: apply(recompute="never"),
        r"recompute must be one of \(True, False\); got 'never'",
    ),
    "implementation": (
        lambda: apply(implementation="cuda"),
        "implementation must be one of .* got 'cuda'",
    ),
    "rank": (
        lambda: FFNLoRA.init(jax.random.key(0), WEIGHTS, 0),
        "rank must be at least 1; got 0",
    ),
    "divides": (
        lambda: split_ffn(X.T, X, 3),
        "must divide the F=40 hidden units; got 3",
    ),
    "split_shapes": (
        lambda: split_ffn(X.T, X[1:], 4),
        r"w_up \[D, F\], w_down \[F, D\].*; got .*'w_down': \(39, 24\)",
    ),
    "uneven": (
        lambda: split_ffn(X.T, X, 2, assignment=jnp.arange(40) // 21),
        r"each of G=2 blocks 20 of F=40 units; got {0: 21, 1: 19}",
    ),
    "outside": (
        lambda: split_ffn(X.T, X, 2, assignment=jnp.arange(40) // 20 * 2),
        r"each of G=2 blocks 20 of F=40 units; got {0: 20, 2: 20}",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.usefixtures("unchecked")
def test_refusals(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_machine_without_hopper_is_refused_by_name_and_runs_xla_by_default():
    c = Case(name="sixteen_bits", D=64, E=64, dtype="bfloat16")
    *arguments, _ = c.inputs()
    with pytest.raises(NotImplementedError, match=r"needs an NVIDIA Hopper GPU.*'xla' runs this"):
        run(c, *arguments, implementation="pallas")
    got, want = (run(c, *arguments, implementation=name) for name in (None, "xla"))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("platform", ["cuda", "rocm", "tpu"])
def test_layer_and_gradients_lower_in_sixteen_bits(platform):
    c = Case(name="lower", dtype="bfloat16", R=4, gated=True)
    *arguments, _ = c.inputs()
    loss = lambda *a: run(c, *a).astype(jnp.float32).sum()
    step = jax.jit(jax.grad(loss, (0, 1, 2, 3)))
    text = step.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert len(dots) >= 10
    assert all(line.count("bf16>") == 2 for line in dots)  # two inputs; the sum is float32
