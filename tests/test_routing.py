import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsax import route_top_k
from sparsax.routing import (
    FFNBlocks,
    balance_loss,
    captured,
    co_activation,
    fit_router,
    split_ffn,
    update_bias,
    utilisation,
)
from sparsax.routing.plan import _by_counts, _by_sorting
from sparsax.routing.split import exchange, place
from tests.helpers import assert_near


def probabilities(*shape, seed=0):
    return jax.nn.sigmoid(jax.random.normal(jax.random.key(seed), shape))


def plain_plan(p, k, mask=None):
    """What a plan says, token by token and choice by choice."""
    count, blocks = len(p), []
    for i, row in enumerate(p):
        best = sorted(range(len(row)), key=lambda g: (-row[g], g))[:k]
        blocks.append([len(row)] * k if mask is not None and not mask[i] else sorted(best))
    flat = [(g, i * k + slot) for i in range(count) for slot, g in enumerate(blocks[i])]
    order = [place for _, place in sorted(flat)]
    sizes = [sum(g == other for other, _ in flat) for g in range(p.shape[1])]
    return blocks, order, sizes


@pytest.mark.parametrize(
    ("tokens", "num_blocks", "k"),
    [(1, 1, 1), (7, 3, 1), (50, 4, 2), (33, 9, 9), (40, 16, 5), (40, 17, 5)],
)
@pytest.mark.parametrize("masked", [False, True])
def test_a_plan_is_what_plain_python_says(tokens, num_blocks, k, masked):
    p = probabilities(tokens, num_blocks)
    p = jnp.round(p, 1)  # ties
    mask = jnp.arange(tokens) % 3 != 1 if masked else None
    plan = jax.jit(route_top_k, static_argnums=1)(p, k, mask=mask)
    blocks, order, sizes = plain_plan(np.asarray(p), k, mask)
    assert plan.blocks.tolist() == blocks
    assert plan.order.tolist() == order
    assert plan.group_sizes.tolist() == sizes
    np.testing.assert_array_equal(plan.order[plan.position], np.arange(tokens * k))
    np.testing.assert_array_equal(plan.tokens, np.asarray(order) // k)
    real = np.ones(tokens, bool) if mask is None else np.asarray(mask)
    np.testing.assert_array_equal(plan.mask(), real)
    np.testing.assert_array_equal(plan.coefficients, np.repeat(real, k).reshape(-1, k))


@pytest.mark.parametrize("size", [1, 127, 128, 129, 1000, 40_000])
@pytest.mark.parametrize("num_groups", [1, 3, 70])
def test_both_ways_to_sort_say_where_each_number_stands(size, num_groups):
    groups = np.random.default_rng(size).integers(0, num_groups, size).astype(np.int32)
    want = np.empty(size, int)
    want[np.argsort(groups, kind="stable")] = np.arange(size)
    for by in (_by_counts, _by_sorting):
        position, sizes = jax.jit(by, static_argnums=1)(groups, num_groups)
        assert (position.dtype, sizes.dtype) == (jnp.int32, jnp.int32)
        np.testing.assert_array_equal(position, want)
        np.testing.assert_array_equal(sizes, np.bincount(groups, minlength=num_groups))


@pytest.mark.parametrize("num_blocks", [8, 24])
def test_tokens_without_a_number_still_choose_different_blocks(num_blocks):
    p = probabilities(6, num_blocks).at[2].set(jnp.nan).at[4, 1].set(jnp.nan)
    plan = route_top_k(p, 3)
    assert all(len(set(row)) == 3 for row in plan.blocks.tolist())
    assert int(plan.group_sizes.sum()) == 18
    np.testing.assert_array_equal(jnp.sort(plan.position), np.arange(18))


def test_leading_axes_make_one_plan():
    p = probabilities(2, 5, 4)
    plan, flat = route_top_k(p, 2), route_top_k(p.reshape(10, 4), 2)
    np.testing.assert_array_equal(plan.blocks.reshape(10, 2), flat.blocks)
    np.testing.assert_array_equal(plan.order, flat.order)
    assert route_top_k(p[0, 0], 2).blocks.shape == (2,)


def test_coefficients_are_one_with_the_gradient_of_the_logarithm():
    p = jnp.array([[0.9, 0.3, 0.5], [0.2, 0.7, 0.0]])
    total = lambda p, weight, **options: (route_top_k(p, 2, **options).coefficients * weight).sum()
    weight = jnp.array([[1.0, 10.0], [2.0, 20.0]])
    value, gradient = jax.value_and_grad(total)(p, weight)
    assert value == weight.sum()
    want = [[1 / 0.9, 0, 10 / 0.5], [2 / 0.2, 20 / 0.7, 0]]
    np.testing.assert_allclose(gradient, want, rtol=1e-6)
    masked = jax.grad(total)(p, weight, mask=jnp.array([True, False]))
    np.testing.assert_allclose(masked, [want[0], [0, 0, 0]], rtol=1e-6)
    gone = route_top_k(jnp.zeros((1, 3)), 2)
    assert gone.coefficients.tolist() == [[1.0, 1.0]]


def test_the_released_coefficient_is_twice_the_probability_on_both_products():
    p = jnp.array([[0.75, 0.25, 0.5]])
    plan = route_top_k(p, 2, coefficient="spt")
    assert plan.scaled == "products"
    assert plan.coefficients.tolist() == [[1.5, 1.0]]
    assert route_top_k(p, 2).scaled == "output"


def test_a_gain_makes_probabilities_count_and_starts_out_without():
    p, weight = jnp.array([[0.9, 0.1, 0.5], [0.2, 0.7, 0.3]]), jnp.array([[1.0, 10], [1, 20]])

    def total(p, gain):
        return (route_top_k(p, 2, coefficient="gain", gain=gain).coefficients * weight).sum()

    value, (dp, dgain) = jax.value_and_grad(total, (0, 1))(p, jnp.zeros(3))
    assert value == weight.sum()
    assert not dp.any()
    np.testing.assert_allclose(dgain, [0.9, 0.7, 10 * 0.5 + 20 * 0.3], rtol=1e-6)
    gain = jnp.array([0.5, -1.0, 2.0])
    value, dp = jax.value_and_grad(total)(p, gain)
    assert_near(value, 1.45 + 10 * 2.0 + 0.3 + 20 * 1.6, 1e-6, "value")
    np.testing.assert_allclose(dp, [[0.5, 0, 20], [0, -1, 40]], rtol=1e-6)


def test_a_bias_moves_the_choice_and_nothing_else():
    p = jnp.array([[0.9, 0.6, 0.5]])
    plan = route_top_k(p, 2, bias=jnp.array([0.0, -0.2, 0.0]), coefficient="spt")
    assert plan.blocks.tolist() == [[0, 2]]
    np.testing.assert_allclose(plan.coefficients, [[1.8, 1.0]], rtol=1e-6)


def test_balance_loss_is_one_for_even_use_and_grows_with_preference():
    even = jnp.full((6, 4), 0.3)
    assert_near(balance_loss(even, jnp.array([3, 3, 3, 3])), 1.0, 1e-6, "even")
    assert_near(balance_loss(0.1 * even, jnp.array([3, 3, 3, 3])), 1.0, 1e-6, "size")
    one = jnp.eye(4)[jnp.zeros(6, int)]
    assert_near(balance_loss(one, jnp.array([6, 0, 0, 0])), 4.0, 1e-6, "one")
    p = probabilities(6, 4)
    sizes = route_top_k(p, 2).group_sizes
    share = p / p.sum(1, keepdims=True)
    want = 4 * (sizes / 12 * share.mean(0)).sum()
    assert_near(balance_loss(p, sizes), want, 1e-6, "formula")
    mask = jnp.arange(6) < 4
    got = balance_loss(p, sizes, mask=mask)
    assert_near(got, 4 * (sizes / 12 * share[:4].mean(0)).sum(), 1e-6, "mask")


def descend(update, steps=300):
    """Group sizes at the start and after training a router that prefers blocks 0 and 1."""
    x = jax.random.normal(jax.random.key(0), (256, 8))
    w = 0.3 * jax.random.normal(jax.random.key(1), (8, 4))
    b, bias = jnp.array([1.5, 1.0, 0.0, -0.5]), jnp.zeros(4)
    route = lambda w, b, bias: route_top_k(jax.nn.sigmoid(x @ w + b), 2, bias=bias)
    first = route(w, b, bias).group_sizes
    step = jax.jit(lambda w, b, bias: update(x, w, b, bias, route))
    for _ in range(steps):
        w, b, bias = step(w, b, bias)
    return first, route(w, b, bias).group_sizes


def by_loss(x, w, b, bias, route):
    def loss(w, b):
        return balance_loss(jax.nn.sigmoid(x @ w + b), route(w, b, bias).group_sizes)

    dw, db = jax.grad(loss, (0, 1))(w, b)
    return w - 0.3 * dw, b - 0.3 * db, bias


def by_bias(x, w, b, bias, route):
    del x
    return w, b, update_bias(bias, route(w, b, bias).group_sizes, rate=3e-3)


@pytest.mark.parametrize("update", [by_loss, by_bias])
def test_balancing_evens_the_use_of_blocks(update):
    first, last = descend(update)
    assert float(utilisation(first).imbalance) > 1.6
    assert float(utilisation(last).imbalance) < 1.25


def test_utilisation():
    found = utilisation(jnp.array([4, 4, 0, 0]))
    assert found.share.tolist() == [0.5, 0.5, 0.0, 0.0]
    assert [float(x) for x in found[1:]] == [2.0, 0.5, 0.5]
    assert [float(x) for x in utilisation(jnp.array([5]))[1:]] == [1.0, 0.0, 0.0]
    assert float(utilisation(jnp.array([3, 3, 3])).entropy) == pytest.approx(1.0)
    assert not np.isnan(np.concatenate([np.ravel(x) for x in utilisation(jnp.zeros(3, int))])).any()


def total(scores, found):
    return float(jnp.take_along_axis(scores, found[:, None], axis=1).sum())


@pytest.mark.parametrize(("units", "num_blocks"), [(6, 2), (6, 3), (8, 4), (5, 1)])
def test_assignments_are_balanced_and_near_the_best_one(units, num_blocks):
    size = units // num_blocks
    for seed in range(3):
        scores = jax.random.normal(jax.random.key(seed), (units, num_blocks))
        found = first = place(scores)
        values = [total(scores, found)]
        for _ in range(3):
            found = exchange(scores, found)
            values.append(total(scores, found))
        for assignment in (first, found):
            assert np.bincount(assignment, minlength=num_blocks).tolist() == [size] * num_blocks
        assert all(b >= a - 1e-5 for a, b in itertools.pairwise(values))
        every = set(itertools.permutations(np.arange(units) // size))
        best = max(float(np.asarray(scores)[np.arange(units), list(a)].sum()) for a in every)
        if num_blocks <= 2:
            assert values[-1] == pytest.approx(best, abs=1e-5)
        assert values[-1] > 0.85 * best


def planted(seed=0, tokens=400, num_blocks=4, size=12, features=16):
    """A layer whose units belong to hidden groups: each group answers one direction of x."""
    rng = np.random.default_rng(seed)
    owner = rng.permutation(np.arange(num_blocks * size) % num_blocks)
    directions = rng.standard_normal((num_blocks, features))
    w_up = directions[owner].T + 0.3 * rng.standard_normal((features, num_blocks * size))
    w_down = rng.standard_normal((num_blocks * size, features)) / 7
    x = rng.standard_normal((tokens, features))
    cast = lambda a: jnp.asarray(a, jnp.float32)
    return owner, cast(w_up), cast(w_down), cast(x)


def test_co_activation_finds_planted_groups_and_is_deterministic():
    owner, w_up, _, x = planted()
    hidden = jax.nn.relu(x @ w_up)
    found = co_activation(hidden, 4, key=jax.random.key(0))
    pairs = {(int(a), int(b)) for a, b in zip(owner, found, strict=True)}
    assert len(pairs) == 4
    again = co_activation(hidden, 4, key=jax.random.key(0))
    np.testing.assert_array_equal(found, again)


def test_co_activation_is_no_worse_than_consecutive_units_and_takes_silent_ones():
    hidden = jax.random.normal(jax.random.key(0), (50, 24)).at[:, 5:11].set(0.0)
    found = co_activation(hidden, 3, key=jax.random.key(1), iterations=5)
    assert np.bincount(found).tolist() == [8, 8, 8]
    units = np.abs(np.asarray(hidden)).T
    units = units / np.maximum(np.linalg.norm(units, axis=1, keepdims=True), 1e-30)
    score = lambda a: sum(np.linalg.norm(units[np.asarray(a) == g].sum(0)) for g in range(3))
    assert score(found) > score(np.arange(24) // 8)


def test_a_fitted_router_captures_more_than_chance_of_other_tokens():
    owner, w_up, w_down, x = planted(tokens=1200)
    blocks = split_ffn(w_up, w_down, 4, assignment=owner)
    norms = blocks.norms(x, jax.nn.relu)
    for method in ("logistic", "least_squares"):
        fit = fit_router(x[:800], norms[:800], 2, method=method)
        assert fit.random == 0.5
        logits = x[800:] @ fit.kernel + fit.bias
        got = captured(norms[800:], jax.lax.top_k(logits, 2)[1])
        oracle = captured(norms[800:], jax.lax.top_k(norms[800:], 2)[1])
        assert 0.93 * oracle < got <= oracle
        assert_near(fit.oracle, oracle, 0.03, "oracle")
        assert fit.captured > 0.93 * fit.oracle
    shares = jax.nn.sigmoid(x[:800] @ fit_router(x[:800], norms[:800], 2).kernel)
    assert float(shares.std()) > 0.2


def test_a_logistic_router_answers_with_probabilities():
    x = jax.random.normal(jax.random.key(0), (4000, 3))
    logit = x @ jnp.array([1.0, -2.0, 0.5]) - 1.0
    on = jax.random.uniform(jax.random.key(1), (4000,)) < jax.nn.sigmoid(logit)
    fit = fit_router(x + 3.0, jnp.stack([on, ~on], axis=1) + 0.0, 1, ridge=1e-6)
    np.testing.assert_allclose(fit.kernel[:, 0], [1.0, -2.0, 0.5], atol=0.15)
    np.testing.assert_allclose(fit.bias[0] + 3 * fit.kernel[:, 0].sum(), -1.0, atol=0.15)
    np.testing.assert_allclose(fit.kernel[:, 1], -fit.kernel[:, 0], atol=1e-3)


def test_least_squares_is_that_of_numpy():
    x = jax.random.normal(jax.random.key(0), (300, 5)) + 2.0
    norms = jnp.exp(jax.random.normal(jax.random.key(1), (300, 3)) + x[:, :3])
    fit = fit_router(x, norms, 1, method="least_squares", ridge=0.0)
    target = np.asarray(norms - norms.mean(1, keepdims=True))
    inputs = np.concatenate([np.asarray(x), np.ones((300, 1))], axis=1)
    want = np.linalg.lstsq(inputs, target / target.std(), rcond=None)[0]
    np.testing.assert_allclose(fit.kernel, want[:-1], atol=1e-3)
    np.testing.assert_allclose(fit.bias, want[-1], atol=3e-3)


def test_units_and_norms_are_those_of_the_layer():
    _, w_up, w_down, x = planted(tokens=5)
    assignment = jnp.arange(48) % 4
    blocks = split_ffn(w_up, w_down, 4, b_up=jnp.arange(48.0), assignment=assignment)
    want = jax.nn.relu(x @ w_up + jnp.arange(48.0))
    assert_near(blocks.units(x, jax.nn.relu)[:, 1], want[:, assignment == 1], 1e-6, "units")
    norms = blocks.norms(x, jax.nn.relu)
    assert_near(norms[:, 2], jnp.linalg.norm(want[:, assignment == 2], axis=1), 1e-6, "norms")
    gated = FFNBlocks(w_up=blocks.w_up, w_down=blocks.w_down, w_gate=2 * blocks.w_up)
    want = jax.nn.silu(2 * x @ w_up) * (x @ w_up)
    assert_near(gated.units(x, jax.nn.silu)[:, 3], want[:, assignment == 3], 1e-6, "gated")
    assert blocks.flops(10, 2) == 2 * 10 * 2 * 2 * 16 * 12
    assert (blocks.num_blocks, blocks.features, blocks.hidden) == (4, 16, 48)


P = jnp.full((5, 4), 0.5)
REFUSED = {
    "integers": (lambda: route_top_k(P.astype(int), 2), r"must be real, \[\*B, G\]; got int32"),
    "k": (lambda: route_top_k(P, 5), r"k must be within \[1, G=4\]; got 5"),
    "no_k": (lambda: route_top_k(P, 0), r"k must be within \[1, G=4\]; got 0"),
    "mask": (
        lambda: route_top_k(P, 2, mask=jnp.ones((4,), bool)),
        r"mask must be boolean \(5,\), .* got bool \(4,\)",
    ),
    "mask_dtype": (lambda: route_top_k(P, 2, mask=jnp.ones(5)), r"got float32 \(5,\)"),
    "bias": (lambda: route_top_k(P, 2, bias=jnp.ones(3)), r"bias must be \[G=4\]; got \(3,\)"),
    "coefficient": (
        lambda: route_top_k(P, 2, coefficient="2p"),
        "coefficient must be one of .* got '2p'",
    ),
    "gain": (
        lambda: route_top_k(P, 2, coefficient="gain"),
        "coefficient='gain' and gain= go together; got 'gain' and no gain",
    ),
    "gain_alone": (
        lambda: route_top_k(P, 2, gain=jnp.ones(4)),
        "go together; got 'straight_through' and a gain",
    ),
    "gain_shape": (
        lambda: route_top_k(P, 2, coefficient="gain", gain=jnp.ones(3)),
        r"gain must be \[G=4\]; got \(3,\)",
    ),
    "divides": (
        lambda: co_activation(P, 3, key=jax.random.key(0)),
        "must divide the F=4 hidden units; got 3",
    ),
    "fit_tokens": (lambda: fit_router(P, P[1:], 2), r"same tokens.*; got \(5, 4\), \(4, 4\)"),
    "fit_k": (lambda: fit_router(P, P, 5), r"k within \[1, G\]; got .* k=5"),
    "method": (lambda: fit_router(P, P, 2, method="mlp"), "method must be one of .* got 'mlp'"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.usefixtures("unchecked")
def test_refusals(name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_without_a_mask_nothing_is_masked():
    p, x = probabilities(5, 4), jnp.ones((5, 3))
    assert route_top_k(p, 2).zeroed(x) is x
    masked = route_top_k(p, 2, mask=jnp.arange(5) < 3)
    assert masked.zeroed(x.at[4].set(jnp.nan)).tolist() == [[1] * 3] * 3 + [[0] * 3] * 2
