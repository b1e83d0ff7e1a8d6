import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

from sparsax import nn, patterns
from sparsax.data import Batches
from sparsax.training import on_device
from tests.training import killed_run
from tests.training.killed_run import CONFIG, STEPS, TRANSITION, run

CALLS = dataclasses.replace(CONFIG, eval_every=4, save_every=4, log_every=4, schedule=(
    dataclasses.replace(CONFIG.schedule, probe_every=4)
))  # fmt: skip
OPTIMIZER = optax.scale_by_adam()  # runs that share it share their programs


def batches(samples: int = 24) -> Batches:
    tokens = np.random.default_rng(0).integers(1, 10, (samples, 32)).astype(np.uint8)
    return Batches(tokens, (tokens.sum(1) % 3).astype(np.int32), 4, 0)


def rate(peak, step):
    return peak / (1 + step)


def train(count: int, **changes):
    defaults = {
        "batch": on_device(batches(), STEPS), "learning_rate": Partial(rate, jnp.float32(1e-2)),
        "optimizer": OPTIMIZER, "config": dataclasses.replace(CALLS, steps_per_call=count),
    }  # fmt: skip
    return run(**(defaults | changes))


def assert_close(got, want) -> None:
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_batches_on_the_device_are_those_of_the_host_and_begin_anew():
    host = batches()
    device = jax.jit(on_device(host, steps=13))
    for step in (0, 5, 6, 13):  # 6 batches an epoch
        for got, want in zip(device(step), host.batch(step), strict=True):
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(device(14)[0], host.batch(0)[0])


def test_many_steps_a_call_are_the_same_training():
    one, four = train(1), train(4)
    assert one.transition["step"] == four.transition["step"] == TRANSITION
    assert_close(four.last, one.last)
    np.testing.assert_array_equal(four.patterns.to_block_mask(), one.patterns.to_block_mask())
    losses = [[row["loss"] for row in result.log if "loss" in row] for result in (one, four)]
    assert [len(x) for x in losses] == [4, 4]
    each = train(1, config=dataclasses.replace(CALLS, log_every=1))
    every = np.array([row["loss"] for row in each.log if "loss" in row])
    np.testing.assert_allclose(losses[1], every.reshape(4, 4).mean(1), rtol=1e-4)


def test_runs_of_one_kind_share_a_program():
    traced = []

    def loss(model, batch, rngs):
        traced.append(nn.get_patterns(model)[0] is None)
        return killed_run.loss(model, batch, rngs)

    config = dataclasses.replace(CALLS, steps_per_call=4)
    start = train(4, loss=loss, config=dataclasses.replace(config, stop_at_transition=True))
    before = len(traced)
    assert set(traced) == {True}
    for pattern in (patterns.diagonal, patterns.full, patterns.causal):
        stack = start.patterns.stack([pattern(32, block=8)] * 2)
        train(4, loss=loss, config=dataclasses.replace(config, seed=7), start=start.transition,
              find_patterns=lambda _, stack=stack: stack)  # fmt: skip
    assert not any(traced[before:])
    assert len(traced) == 2 * before  # sparse steps are traced once, as the dense ones were
    train(4, loss=loss, start=start.transition, find_patterns=None,
          learning_rate=Partial(rate, jnp.float32(5e-3)))  # fmt: skip
    assert len(traced) == 2 * before


def test_a_second_search_gives_the_patterns_of_the_maps_of_then(tmp_path):
    config = dataclasses.replace(CALLS, steps_per_call=4, search_again=(12,))
    asked = []
    # The second search finds more than the first.
    find = lambda maps: (
        asked.append(1)
        or patterns.spion.search(
            maps, block=8, variant="C", density=0.5 if len(asked) <= 2 else 0.8
        )
    )
    result = train(4, config=config, find_patterns=find, folder=tmp_path)
    densities = {row["step"]: row["density"] for row in result.log if "loss" in row}
    assert densities[8] == 1.0
    assert densities[12] < densities[16]
    assert len(asked) == 4  # twice each time, the second time for the clock
    again = train(4, config=config, find_patterns=find, folder=tmp_path)
    np.testing.assert_array_equal(again.patterns.kv_num_blocks, result.patterns.kv_num_blocks)
    assert again.log == result.log


def test_maps_of_every_head_can_be_probed():
    probe = functools.partial(nn.score_maps, per_head=True, pool=8)
    find = functools.partial(patterns.mass.search, block=8, density=0.7, length=32)
    result = train(4, probe=probe, find_patterns=find)
    assert result.maps.shape == (2, 2, 4, 4)
    assert result.patterns.kv_num_blocks.shape == (2, 2, 4)
    assert np.isfinite(result.best)


def test_a_stopped_run_is_saved_and_goes_on(tmp_path):
    calls = []
    stopped = train(4, folder=tmp_path, stop=lambda: calls.append(1) or len(calls) == 3)
    assert (stopped.finished, stopped.last["step"]) == (False, 12)
    whole, rest = train(4), train(4, folder=tmp_path)
    assert rest.finished
    assert whole.finished
    assert_close(rest.last, whole.last)
    assert [row["step"] for row in rest.log] == [row["step"] for row in whole.log]


@pytest.mark.parametrize(("changes", "batch", "message"), [
    ({}, killed_run.batch, "must be a jax.tree_util.Partial.*steps_per_call=4.*type function"),
    ({"eval_every": 6}, None, "multiples of steps_per_call=4; got {'eval_every': 6}"),
    ({"search_again": (10,)}, None, r"steps_per_call=4; got {'search_again\[0\]': 10}"),
    ({"steps_per_call": 3}, None, "steps_per_call=3; got {'steps': 16.*'max_dense_steps': 8}"),
    ({"steps_per_call": 0}, None, "steps_per_call must be at least 1"),
])  # fmt: skip
def test_what_does_not_fit_a_call_is_refused(changes, batch, message):
    config = dataclasses.replace(CALLS, **({"steps_per_call": 4} | changes))
    with pytest.raises(ValueError, match=message):
        train(4, config=config, **({} if batch is None else {"batch": batch}))


def test_a_second_search_needs_a_search():
    model = killed_run.make_model()
    nn.set_patterns(model, patterns.diagonal(32, block=8))
    config = dataclasses.replace(CALLS, schedule=None, search_again=(12,))
    with pytest.raises(ValueError, match="search_again needs find_patterns"):
        train(1, model=model, config=config, find_patterns=None)


def test_a_model_with_patterns_of_its_own_is_searched_anew():
    model = killed_run.make_model()
    nn.set_patterns(model, patterns.diagonal(32, block=8))
    config = dataclasses.replace(CALLS, schedule=None, search_again=(12,))
    result = train(1, model=model, config=config)
    assert result.patterns.density().mean() > 0.25


@pytest.mark.parametrize(("changes", "message"), [
    ({"search_again": (0,)}, r"must name steps of this run, after 0 and up to.*got \(0,\)"),
    ({"search_again": (12, 20)}, r"after 0 and up to steps=16; got \(12, 20\)"),
    ({"schedule": None}, "this one is dense to its last step.*schedule=None"),
    ({"stop_at_transition": True}, "this one is dense to its last step.*stop_at_transition=True"),
])  # fmt: skip
def test_a_second_search_that_never_comes_is_refused(changes, message):
    config = dataclasses.replace(CALLS, **({"search_again": (12,)} | changes))
    with pytest.raises(ValueError, match=message):
        train(1, config=config)


def test_a_second_search_comes_after_the_start():
    start = train(4).transition
    config = dataclasses.replace(CALLS, search_again=(TRANSITION,))
    with pytest.raises(ValueError, match="after 8 and up to steps=16"):
        train(1, config=config, start=start)
