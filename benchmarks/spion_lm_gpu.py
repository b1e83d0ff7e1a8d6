"""SPION on a causal language model of bytes: film reviews, one after the other.

    python benchmarks/spion_lm_gpu.py --data FOLDER --out FOLDER                  # 2,048 bytes
    python benchmarks/spion_lm_gpu.py --data FOLDER --out FOLDER --length 8192    # up to 32,768
    python benchmarks/spion_lm_gpu.py --data FOLDER --out FOLDER --quick

`spion_compare.py` says how to go on with `--out` on another machine.

FOLDER holds imdb_{train,test}.jsonl.xz. A step reads 32,768 bytes whatever the length is. Scores
are bits per byte with a minus, so that higher is better, as everywhere.
"""

import dataclasses
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.tree_util import Partial
from spion_compare import compare
from spion_runs import WHOLE_UP_TO
from spion_task import Size, Task, data_folder, dtype, parse

from sparsax.nn import DecoderConfig, LanguageModel

METHODS = [
    "dense", "weighted", "window", "budget", "square", "square-layer", "CF", "layer", "oracle",
    "heads", "random", "bigbird", "C", "F", "budget:zero", "cover", "again", "longformer",
    "weighted-heads", "diagonal", "CF-paper", "CF-paper:zero",
]  # fmt: skip
LONG_METHODS = [
    "dense", "weighted", "window", "budget", "square", "square-layer", "heads", "weighted-heads",
    "F", "random", "bigbird",
]  # fmt: skip
BYTES = 32_768  # of a step
HELD = 10**6  # seeds of held-out samples, beyond any step
DENSITY = {2048: 0.2, 4096: 0.15, 8192: 0.1, 16384: 0.06, 32768: 0.03}
FULL = Size(
    length=2048, block=64, layers=4, features=256, heads=4, batch_size=16, learning_rate=1e-3,
    dropout=0.0, probe_every=300, tolerance=1e-9, dense_steps=3_000, steps=600, density=0.2,
    quantile=0.98, paper_density=0.1, held_batches=16,
)  # fmt: skip
QUICK = FULL.quick(length=256, block=32, layers=2, features=64, heads=2, batch_size=4)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())


def full(length: int) -> Size:
    """The sizes of a length, at so many bytes a step."""
    return dataclasses.replace(
        FULL, length=length, batch_size=max(1, BYTES // length),
        density=DENSITY.get(length, FULL.density),
    )  # fmt: skip


def read(path: Path) -> np.ndarray:
    """All reviews of a file as bytes, two newlines between them."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"].encode() for line in file]
    return np.frombuffer(b"\n\n".join(texts), np.uint8)


def loss(model, batch, rngs):
    tokens = batch[0]
    logits = model(tokens)[:, :-1].astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(), {}


def measure(model, batch):
    return -loss(model, batch, None)[0] / jnp.log(2.0)


@dataclasses.dataclass(frozen=True)
class Windows:
    """Cuts the batch of a step out of the text; hashable, as shared programs want it."""

    length: int

    @property
    def span(self) -> int:
        """Bytes of the text that a sample is made of."""
        return self.length

    def tokens(self, spans, seed) -> jax.Array:
        """Samples `[B, T]` of spans of the text."""
        return spans.astype(jnp.int32)

    def __call__(self, text, starts, step) -> tuple[Any]:
        """Tokens `[B, T]` of a step, traced or not."""
        cut = lambda start: jax.lax.dynamic_slice_in_dim(text, start, self.span)
        return (self.tokens(jax.vmap(cut)(starts[step % len(starts)]), step),)


def language(
    folder: Path,
    size: Size,
    windows: Windows | None = None,
    *,
    name: str = "lm",
    metric: str = "bits per byte",
    loss: Callable[..., Any] = loss,
    measure: Callable[..., Any] = measure,
) -> Task:
    """Windows of the concatenated reviews; validation and test are two parts of the test file."""
    windows = windows or Windows(size.length)
    text, other = (read(folder / f"imdb_{part}.jsonl.xz") for part in ("train", "test"))
    config = DecoderConfig.llama(
        vocab_size=256, length=size.length, features=size.features, hidden=2 * size.features,
        num_heads=size.heads, layers=size.layers, dtype=dtype(),
    )  # fmt: skip
    each = size.held_batches * size.batch_size
    device = jnp.asarray(text)

    def held(part: int) -> tuple[Any]:
        spans = other[part * each * windows.span :][: each * windows.span].reshape(each, -1)
        made = windows.tokens(jnp.asarray(spans), HELD + part)
        return (made.reshape(size.held_batches, size.batch_size, size.length),)

    def batches(seed: int, steps: int) -> Partial:
        starts = np.random.default_rng(seed).integers(
            0, len(text) - windows.span, (steps + 1, size.batch_size)
        )
        return Partial(windows, device, jnp.asarray(starts, jnp.int32))

    return Task(
        name=f"{name}{size.length}", metric=metric, size=size,
        make=lambda seed: LanguageModel(config, rngs=nnx.Rngs(seed)), loss=loss,
        optimizer=OPTIMIZER, batches=batches, measure=measure, valid=held(0),
        test=[held(1), held(2)], causal=True,
    )  # fmt: skip


def main() -> None:
    args = parse(__doc__)
    size = (QUICK if args.quick else full(args.length or FULL.length)).changed_by(args)
    methods = METHODS if size.length <= WHOLE_UP_TO else LONG_METHODS
    compare(language(data_folder(args), size), args, methods)


if __name__ == "__main__":
    main()
