"""SPION on restoring damaged text: a task whose attention has a place to be found.

    python benchmarks/spion_restore_gpu.py --data FOLDER --out FOLDER
    python benchmarks/spion_restore_gpu.py --data FOLDER --out FOLDER --quick

A sample is 1,024 bytes of film reviews, every seventh or so replaced by a letter drawn at random,
and then the same bytes as they were, which a causal model writes: what it needs is 1,024 tokens
back, the same distance in every sample. Nothing near and no block drawn blindly holds it. FOLDER
holds imdb_{train,test}.jsonl.xz; scores are bits per byte of the second half, with a minus.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from spion_compare import compare
from spion_lm_gpu import FULL, QUICK, Windows, language
from spion_task import data_folder, parse

METHODS = [
    "dense", "weighted", "window", "CF", "budget", "square", "C", "F", "random", "bigbird", "heads",
    "CF-paper", "CF-paper:zero", "C-paper", "diagonal", "longformer", "oracle",
]  # fmt: skip
DAMAGED = 0.15
LETTERS = 97, 123  # a to z


@dataclasses.dataclass(frozen=True)
class Damaged(Windows):
    """Bytes with errors, and the same ones without."""

    @property
    def span(self) -> int:
        """Half a sample."""
        return self.length // 2

    def tokens(self, spans, seed) -> jax.Array:
        """Each span twice, the first time with errors."""
        spans = super().tokens(spans, seed)
        where, what = jax.random.split(jax.random.key(seed))
        hit = jax.random.bernoulli(where, DAMAGED, spans.shape)
        drawn = jax.random.randint(what, spans.shape, *LETTERS)
        return jnp.concatenate([jnp.where(hit, drawn, spans), spans], axis=1)


def loss(model, batch, rngs):
    """Of the second half, which the first one tells."""
    tokens = batch[0]
    half = tokens.shape[1] // 2
    logits = model(tokens)[:, half - 1 : -1].astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, half:]).mean(), {}


def measure(model, batch):
    return -loss(model, batch, None)[0] / jnp.log(2.0)


def main() -> None:
    args = parse(__doc__)
    size = (QUICK if args.quick else FULL).changed_by(args)
    task = language(
        data_folder(args), size, Damaged(size.length), name="restore", loss=loss, measure=measure
    )
    compare(task, args, METHODS)


if __name__ == "__main__":
    main()
