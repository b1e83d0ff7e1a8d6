"""The Long Range Arena's encoder on a data set: what three of the SPION scripts have in common."""

import argparse
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from spion_compare import compare
from spion_task import Size, Task, dtype, parse

from sparsax import data
from sparsax.nn import Classifier
from sparsax.training import accuracy, cross_entropy, on_device

METHODS = [
    "dense", "weighted", "budget", "square", "window", "CF", "CF-paper", "CF-paper:zero",
    "diagonal", "random", "bigbird", "oracle", "heads", "budget:zero", "layer", "F-paper",
    "F-paper:zero", "C-paper", "C-paper:zero", "C", "F", "cover", "again", "longformer",
]  # fmt: skip


def run(
    name: str,
    description: str | None,
    full: Size,
    quick: Size,
    read: Callable[[argparse.Namespace, Size], data.Dataset],
) -> None:
    """A script: its flags, its data, the comparison.

    Args:
        name: of the task.
        description: what `--help` says.
        full: its sizes.
        quick: those of `--quick`.
        read: gets the data by flags and sizes.
    """
    args = parse(description)
    size = (quick if args.quick else full).changed_by(args)
    compare(classification(name, read(args, size), size), args, METHODS)


def loss(model, batch, rngs):
    logits = model(batch[0].astype(jnp.int32), rngs=rngs)
    return cross_entropy(logits, batch[1]), {"accuracy": accuracy(logits, batch[1])}


def measure(model, batch):
    return accuracy(model(batch[0].astype(jnp.int32)), batch[1])


OPTIMIZER = optax.chain(optax.clip(1.0), optax.scale_by_adam(eps=1e-6))


def classification(name: str, dataset: data.Dataset, size: Size) -> Task:
    """The task of a data set whose rows are `size.length` long."""

    def make(seed: int) -> nnx.Module:
        return Classifier(
            dataset.vocab_size, size.length, dataset.num_classes, padding_id=dataset.padding_id,
            features=size.features, hidden=2 * size.features, num_heads=size.heads,
            layers=size.layers, dropout=size.dropout, dtype=dtype(), rngs=nnx.Rngs(seed),
        )  # fmt: skip

    def batches(seed: int, steps: int) -> Any:
        train = dataset.train
        return on_device(data.Batches(train.tokens, train.labels, size.batch_size, seed), steps)

    return Task(
        name=name, metric="accuracy", size=size, make=make, loss=loss, optimizer=OPTIMIZER,
        batches=batches, measure=measure, valid=held(dataset.valid, size, 0),
        test=[held(dataset.test, size, part) for part in range(parts(dataset.test, size))],
        padded=dataset.padding_id is not None,
    )  # fmt: skip


def parts(split: data.Split, size: Size) -> int:
    """How often a validation's samples fit into the split, at most twice."""
    return min(2, len(split) // (size.held_batches * size.batch_size))


def held(split: data.Split, size: Size, part: int) -> tuple[Any, Any]:
    """Tokens `[batches, B, T]` and labels of a part of a split, on the device."""
    count = size.held_batches * size.batch_size
    if count * (part + 1) > len(split):
        raise SystemExit(f"--held-batches must be at most {len(split) // size.batch_size}")
    # The files are sorted by class, or might be.
    rows = np.random.default_rng(0).permutation(len(split))[part * count : (part + 1) * count]
    shape = (size.held_batches, size.batch_size)
    tokens, labels = split.tokens[rows], split.labels[rows]
    return jnp.asarray(tokens.reshape(*shape, -1)), jnp.asarray(labels.reshape(shape))
