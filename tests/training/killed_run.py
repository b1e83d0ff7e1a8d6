"""A tiny run; `main` is the process that test_fit.py kills."""

import functools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sparsax import nn, patterns
from sparsax.layouts import BlockPattern
from sparsax.training import FitConfig, FitResult, Schedule, accuracy, cross_entropy, fit

TRANSITION, STEPS = 8, 16
CONFIG = FitConfig(
    steps=STEPS, schedule=Schedule(probe_every=3, max_dense_steps=TRANSITION, tolerance=1e-9),
    eval_every=3, save_every=5, log_every=1, progress=False,
)  # fmt: skip
SEARCH = functools.partial(patterns.spion.search, block=8, quantile=0.4, filter_length=3)


def make_model(seed: int = 0) -> nn.Classifier:
    return nn.Classifier(
        10, 32, 3, features=16, hidden=16, num_heads=2, layers=2, dropout=0.1, rngs=nnx.Rngs(seed)
    )


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(step).integers(1, 10, (4, 32)).astype(np.int32)
    return tokens, (tokens.sum(1) % 3).astype(np.int32)


def loss(model, batch, rngs):
    tokens, labels = batch
    logits = model(tokens, rngs=rngs)
    return cross_entropy(logits, labels), {"accuracy": accuracy(logits, labels)}


@nnx.jit  # op by op an evaluation takes half a second, and six processes make some
def score(model, tokens, labels):
    return cross_entropy(model(tokens), labels)


def evaluate(model) -> float:
    tokens, labels = batch(12345)
    return -float(score(model, jnp.asarray(tokens), jnp.asarray(labels)))


def run(**changes) -> FitResult:
    arguments = {
        "model": make_model(), "loss": loss, "batch": batch, "optimizer": optax.scale_by_adam(),
        "learning_rate": lambda step: 1e-2 / (1 + step), "find_patterns": SEARCH,
        "evaluate": evaluate, "config": CONFIG,
    }  # fmt: skip
    return fit(**(arguments | changes))


def arrays(result: FitResult) -> dict[str, np.ndarray]:
    """Everything a run ends with, by name."""
    tree = {
        "best": nnx.to_pure_dict(nnx.state(result.model, nnx.Param)), "last": result.last,
        "maps": result.maps, "transition": result.transition, "score": result.best,
        "patterns": result.patterns,
    }  # fmt: skip
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def main(folder: str, out: str, slow: str) -> None:
    def slow_batch(step):
        time.sleep(float(slow))
        return batch(step)

    def slow_find(maps) -> BlockPattern:
        time.sleep(float(slow))
        return SEARCH(maps)

    result = run(folder=folder, batch=slow_batch, find_patterns=slow_find)
    partial = Path(out).with_suffix(".partial.npz")
    np.savez(partial, **arrays(result))
    partial.rename(out)
