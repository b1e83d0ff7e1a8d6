"""Does training on the Hopper kernels give the curves of portable XLA? On real data, in one run.

    python benchmarks/training_curves_gpu.py --data FOLDER                 # bytes of IMDB reviews
    python benchmarks/training_curves_gpu.py --data FOLDER --task image    # CIFAR-10 in gray
    python benchmarks/training_curves_gpu.py --data FOLDER --quick         # shows that it runs

FOLDER holds imdb_{train,test}.jsonl.xz or cifar10_gray_{train,test}.npy.xz. "text" is a causal
language model (three layers with a sliding window and a sink, then a full causal one), "image" an
encoder (a window and full columns of blocks, pruned keys counting as zeros). The runs share
parameters, batches and optimizer, and differ in what computes the sparse attention:

    pallas               the kernels, bfloat16
    pallas, rows turned  the same with every batch in reverse: the same sums in another order
    xla                  portable XLA, bfloat16
    xla, float32         the same model in float32, products in full precision
    dense                no pattern, bfloat16: for scale, no part of the verdict

bfloat16 noise is how far two runs end up apart that differ in rounding alone: xla in bfloat16
against float32, and pallas against itself with turned rows. The curves agree when pallas and xla
are no further apart than twice the larger of the two: two runs of noise differ by more than one
from the truth, and the curves are a single draw. Losses are those of every tenth step.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from harness import save

import sparsax
from sparsax import data, pallas, patterns
from sparsax.nn import Classifier, DecoderConfig, LanguageModel, SparseAttention, set_patterns
from sparsax.training import FitConfig, cross_entropy, fit

LOG_EVERY = 10
NOISE = 2.0  # times the noise, which still counts as noise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """Everything that makes a task large or small."""

    length: int = 1024
    features: int = 256
    heads: int = 4
    layers: int = 4
    batch_size: int = 16
    block: int = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A model without patterns, the patterns of its layers, its batches and its loss."""

    make: Callable[[Any], nnx.Module]  # of the computation's dtype
    layers: list[sparsax.BlockPattern]
    train: data.Batches
    test: data.Batches
    loss: Callable[[nnx.Module, Any], Any]


def text(folder: Path, size: Size) -> Task:
    """Next bytes of reviews that fill the length, so that no token is padding."""
    dataset = data.read_imdb(folder, max_length=size.length)
    config = DecoderConfig.llama(
        vocab_size=dataset.vocab_size, length=size.length, features=size.features,
        hidden=2 * size.features, num_heads=size.heads, layers=size.layers,
    )  # fmt: skip
    window = patterns.sliding_window(size.length, left=127, right=0, block=size.block)
    sink = patterns.global_tokens(size.length, positions=[0], rows=False, block=size.block)
    every = patterns.causal(size.length, block=size.block)

    def batches(split):
        full = split.tokens[split.tokens[:, -1] > 0]
        return data.Batches(full, np.zeros(len(full), np.int32), size.batch_size, 0)

    def loss(model, batch):
        tokens = batch[0]
        logits = model(tokens)[:, :-1].astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return Task(
        make=lambda dtype: LanguageModel(
            dataclasses.replace(config, dtype=dtype), rngs=nnx.Rngs(0)
        ),
        layers=[window | sink] * (size.layers - 1) + [every],
        train=batches(dataset.train), test=batches(dataset.test), loss=loss,
    )  # fmt: skip


def image(folder: Path, size: Size) -> Task:
    """Classes of 32 x 32 gray pixels, the encoder of `examples/image.py`."""
    dataset = data.read_cifar10_gray(folder)
    make = lambda dtype: Classifier(
        dataset.vocab_size, 1024, dataset.num_classes, padding_id=None, dropout=0.0,
        features=size.features, hidden=2 * size.features, num_heads=size.heads,
        layers=size.layers, pruned="zero", dtype=dtype, rngs=nnx.Rngs(0),
    )  # fmt: skip
    band = patterns.sliding_window(1024, left=32, right=32, block=size.block)
    columns = patterns.global_tokens(1024, positions=[0, 512], rows=False, block=size.block)
    batches = lambda split: data.Batches(split.tokens, split.labels, size.batch_size, 0)
    loss = lambda model, batch: cross_entropy(model(batch[0]), batch[1])
    return Task(
        make=make, layers=[band | columns] * size.layers, train=batches(dataset.train),
        test=batches(dataset.test), loss=loss,
    )  # fmt: skip


TASKS = {"text": text, "image": image}
SIZES = {
    "text": Size(),
    "image": Size(features=64, heads=2, layers=2, batch_size=32, block=32),
}
RUNS = {  # implementation (None: dense), dtype, whether batches are in reverse
    "pallas": ("pallas", jnp.bfloat16, False),
    "pallas, rows turned": ("pallas", jnp.bfloat16, True),
    "xla": ("xla", jnp.bfloat16, False),
    "xla, float32": ("xla", jnp.float32, False),
    "dense": (None, jnp.bfloat16, False),
}


def train(task: Task, name: str, steps: int, rate: float) -> dict:
    """The row of one run: its losses, its loss on the test data, milliseconds of a step."""
    implementation, dtype, turned = RUNS[name]
    model = task.make(dtype)
    if implementation is not None:
        set_patterns(model, task.layers)
        for _, layer in nnx.iter_modules(model):
            if isinstance(layer, SparseAttention):
                layer.implementation = implementation
    order = slice(None, None, -1) if turned else slice(None)
    test_loss = nnx.jit(task.loss)
    score = lambda model: -np.mean([test_loss(model, task.test.batch(i)) for i in range(8)])
    # A GPU multiplies float32 in TF32 otherwise, which is hardly finer than bfloat16.
    with jax.default_matmul_precision("highest" if dtype == jnp.float32 else None):
        result = fit(
            model,
            loss=lambda model, batch, rngs: (task.loss(model, batch), {}),
            batch=lambda step: tuple(x[order] for x in task.train.batch(step)),
            optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam()),
            learning_rate=optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps),
            evaluate=score,
            config=FitConfig(steps=steps, eval_every=steps, log_every=LOG_EVERY, progress=False),
        )
    return {
        "run": name, "loss": [row["loss"] for row in result.log if "loss" in row],
        "test_loss": -result.best, "step_ms": 1e3 * next(iter(result.step_seconds.values())),
    }  # fmt: skip


def apart(one: dict, other: dict) -> dict:
    """How far two curves are apart, at most and in the mean."""
    gap = np.abs(np.subtract(one["loss"], other["loss"]))
    return {"pair": [one["run"], other["run"]], "largest": gap.max(), "mean": gap.mean()}


def verdict(rows: dict[str, dict]) -> dict:
    """The differences, and whether pallas and xla agree within what rounding does."""
    pairs = [
        apart(rows[one], rows[other])
        for one, other in (("pallas", "xla"), ("xla", "xla, float32"),
                           ("pallas", "pallas, rows turned"), ("pallas", "xla, float32"),
                           ("pallas", "dense"))
    ]  # fmt: skip
    measured, *noise = pairs[:3]  # the others are for the reader
    agree = all(measured[x] <= NOISE * max(n[x] for n in noise) for x in ("largest", "mean"))
    return {"differences": pairs, "agree": agree}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the files")
    parser.add_argument("--task", choices=TASKS, default="text")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=1e-3, help="the highest learning rate")
    parser.add_argument("--quick", action="store_true", help="20 steps of a tiny model")
    args = parser.parse_args()
    size, steps = SIZES[args.task], args.steps
    if args.quick:
        size = dataclasses.replace(size, length=256, features=64, heads=2, layers=2, batch_size=2)
        steps = 20
    task = TASKS[args.task](args.data, size)
    names = list(RUNS)
    if not pallas.on_hopper():
        print("no NVIDIA Hopper GPU: the runs on the kernels are left out, and so is the verdict")
        names = [name for name in names if RUNS[name][0] != "pallas"]
    rows = {}
    for name in names:
        rows[name] = train(task, name, steps, args.rate)
        found = rows[name]
        losses = " ".join(f"{x:.4f}" for x in found["loss"])
        print(f"{name}: {found['step_ms']:.2f} ms / step, test loss {found['test_loss']:.4f}\n"
              f"  every {LOG_EVERY} steps: {losses}", flush=True)  # fmt: skip
    report: list[dict] = [dataclasses.asdict(size) | {"task": args.task, "steps": steps}]
    report += rows.values()
    if "pallas" in rows:
        result = verdict(rows)
        for pair in result["differences"]:
            print(f"{' - '.join(pair['pair']):36s} largest {pair['largest']:.5f}  "
                  f"mean {pair['mean']:.5f}")  # fmt: skip
        print("pallas and xla", "AGREE" if result["agree"] else "DO NOT AGREE",
              "within bfloat16 noise")  # fmt: skip
        report.append(result)
    print(save(f"training_curves_{args.task}" + "_quick" * args.quick, report))


if __name__ == "__main__":
    main()
