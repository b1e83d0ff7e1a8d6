"""One dense start, several ways to go on from it: what both classification examples share."""

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sparsax import data, default_implementation, patterns
from sparsax.nn import Classifier
from sparsax.plots import spion_figure
from sparsax.training import FitConfig, Schedule, accuracy, cross_entropy, fit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """Everything that makes a run small or large."""

    block: int
    quantile: float
    density: float = 0.04
    layers: int
    features: int
    heads: int
    batch_size: int
    learning_rate: float
    probe_every: int
    dense_steps: int  # turn sparse at this step at the latest
    sparse_steps: int  # after the transition, for every method
    dropout: float = 0.0
    dtype: str = "float32"  # of attention and feed-forward layers
    scored: int = 10_000  # samples of a split that an evaluation looks at, the first ones

    @classmethod
    def add_flags(cls, parser: argparse.ArgumentParser) -> None:
        """The flags of a comparison, a flag for every size among them: `--batch-size 64`."""
        parser.add_argument("--folder", type=Path, default=Path("runs"), help="cache and results")
        parser.add_argument("--variant", choices=["CF", "F", "C"], default="CF")
        parser.add_argument("--pruned", choices=["drop", "zero"], default="drop")
        parser.add_argument("--seed", type=int, default=0)
        for field in dataclasses.fields(cls):
            parser.add_argument("--" + field.name.replace("_", "-"), type=field.type)

    def for_kernels(self) -> "Size":
        """On a GPU: bfloat16 and blocks of at least 32, as the Hopper kernels take them."""
        if jax.default_backend() != "gpu":
            return self
        return dataclasses.replace(self, dtype="bfloat16", block=max(self.block, 32))

    def changed_by(self, args: argparse.Namespace) -> "Size":
        """These sizes, but for those that flags gave."""
        given = {n: x for n, x in vars(args).items() if hasattr(self, n) and x is not None}
        return dataclasses.replace(self, **given)


def compare(name: str, dataset: data.Dataset, size: Size, folder: Path, *, variant: str,
            pruned: str, seed: int) -> None:  # fmt: skip
    """Trains dense until the score maps settle, then goes on in four ways; table and picture."""
    # Three of the runs are one program with other patterns; a resumed run compiles nothing.
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    length = dataset.train.tokens.shape[1]
    batches = data.Batches(dataset.train.tokens, dataset.train.labels, size.batch_size, seed)
    model = Classifier(
        dataset.vocab_size, length, dataset.num_classes, padding_id=dataset.padding_id,
        features=size.features, hidden=2 * size.features, num_heads=size.heads,
        layers=size.layers, dropout=size.dropout, dtype=size.dtype, pruned=pruned,
        rngs=nnx.Rngs(seed),
    )  # fmt: skip
    q = jnp.zeros((1, length, size.heads, size.features // size.heads), size.dtype)
    chosen = default_implementation(q, patterns.diagonal(length, block=size.block))
    print(f"sparse attention will run as {chosen!r}: {size.dtype}, heads of {q.shape[-1]}, blocks "
          f"of {size.block}, on {jax.devices()[0].device_kind}")  # fmt: skip

    def loss(model, batch, rngs):
        logits = model(batch[0], rngs=rngs)
        return cross_entropy(logits, batch[1]), {"accuracy": accuracy(logits, batch[1])}

    common = {
        "loss": loss,
        "batch": batches.batch,
        "optimizer": optax.chain(optax.clip(1.0), optax.scale_by_adam(eps=1e-6)),
        "evaluate": partial(score, split=dataset.valid, size=size),
    }
    every = {"eval_every": size.probe_every, "save_every": size.probe_every, "seed": seed}
    search = partial(
        patterns.spion.search, block=size.block, variant=variant, quantile=size.quantile,
        density=size.density,
    )  # fmt: skip

    # The rate climbs and falls within the steps to come, and so starts anew at the transition.
    cycle = lambda steps: optax.linear_onecycle_schedule(steps, size.learning_rate)
    schedule = Schedule(probe_every=size.probe_every, max_dense_steps=size.dense_steps)
    config = FitConfig(name="dense phase", steps=size.dense_steps, schedule=schedule,
                       stop_at_transition=True, **every)  # fmt: skip
    start = fit(
        model, config=config, find_patterns=search, folder=folder / "start",
        learning_rate=cycle(size.dense_steps + size.sparse_steps), **common,
    )  # fmt: skip
    transition, found = start.transition, start.patterns
    steps = transition["step"] + size.sparse_steps
    forced = transition["step"] >= size.dense_steps
    print(f"score maps {'had not settled' if forced else 'settled'} after {transition['step']} "
          f"dense steps; pattern found in {1e3 * start.search_seconds:.0f} ms")  # fmt: skip

    methods = {"dense": None, f"SPION-{variant}": found} | controls(found, length, size, seed)
    results = {}
    for method, pattern in methods.items():
        config = FitConfig(name=method, steps=steps, **every)
        results[method] = fit(
            model, config=config, start=transition, folder=folder / method,
            find_patterns=None if pattern is None else lambda _, pattern=pattern: pattern,
            learning_rate=cycle(size.sparse_steps), **common,
        )  # fmt: skip

    rows = []
    for method, result in results.items():
        density = np.ones(size.layers)
        if result.patterns is not None:
            density = np.asarray(result.patterns.density())
        flops = float(4 * length**2 * size.features * density.sum() / 1e6)
        seconds = start.step_seconds | result.step_seconds
        rows.append({
            "method": method,
            "test accuracy": score(result.model, dataset.test, size),
            "density per layer": " ".join(f"{d:.3f}" for d in density),
            "attention MFLOP": flops,  # of one sample, forward
            "dense ms / step": 1e3 * seconds["dense"],
            "sparse ms / step": 1e3 * seconds["sparse"] if "sparse" in seconds else None,
            "search ms": 1e3 * start.search_seconds if result.patterns is found else None,
        })  # fmt: skip
    labels = dataset.test.labels[: size.scored]
    majority = np.bincount(labels).max() / len(labels)
    print(f"\n{name}: always the majority class {majority:.3f}")
    show(rows)
    figure = spion_figure(
        transition["maps"], {m: r.patterns for m, r in results.items() if r.patterns is not None},
        block=size.block,
    )  # fmt: skip
    figure.savefig(folder / "patterns.png", dpi=110)
    report = {"task": name, "majority": majority, "transition": transition["step"],
              "implementation": chosen,
              "search_seconds": start.search_seconds, "rows": rows,
              "size": dataclasses.asdict(size), "device": jax.devices()[0].device_kind,
              "jax": jax.__version__}  # fmt: skip
    (folder / "results.json").write_text(json.dumps(report, indent=1))
    print(f"picture: {folder / 'patterns.png'}   figures: {folder / 'results.json'}")


def controls(found, length, size, seed):
    """Patterns that looked at no map: what a search has to beat."""
    num_layers, n = found.kv_num_blocks.shape[0], found.num_q_blocks
    diagonal = patterns.diagonal(length, block=size.block)
    blocks = found.kv_num_blocks.sum((1, 2))  # of every layer
    drawn = []
    for layer in range(num_layers):
        rng = np.random.default_rng([seed, layer])
        mask = np.eye(n, dtype=bool)
        others = np.flatnonzero(~mask)
        mask.reshape(-1)[rng.choice(others, int(blocks[layer]) - n, replace=False)] = True
        drawn.append(found.from_block_mask(mask, **found.geometry))
    stack = lambda several: found.stack(several)
    return {"diagonal": stack([diagonal] * num_layers), "random": stack(drawn)}


@nnx.jit
def predict(model, tokens):
    return model(tokens).argmax(-1)


def score(model, split, size):
    """Accuracy on a split."""
    tokens, labels = split.tokens[: size.scored], split.labels[: size.scored]
    right = [
        (np.asarray(predict(model, tokens)) == labels)[valid]
        for tokens, labels, valid in data.evaluation_batches(tokens, labels, size.batch_size)
    ]
    return float(np.concatenate(right).mean())


def show(rows):
    """The table, on the terminal."""
    cell = lambda x: "-" if x is None else f"{x:.3f}" if isinstance(x, float) else str(x)
    lines = [list(rows[0]), *([cell(x) for x in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)))
