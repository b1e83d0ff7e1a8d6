"""SPION on retrieval: a table of keys and values in the text, which questions ask for later.

    python benchmarks/spion_recall_gpu.py --data FOLDER --out FOLDER
    python benchmarks/spion_recall_gpu.py --data FOLDER --out FOLDER --table anywhere
    python benchmarks/spion_recall_gpu.py --data FOLDER --out FOLDER --quick

Multi-query associative recall (Arora et al., "Zoology", arXiv 2312.04927) within film reviews: the
first half of a sample holds a table of keys, each followed by a value drawn anew, in an order drawn
anew, and text; in the second half stand, every so many bytes of text, a key and then its value,
which a causal model writes. Every key is asked for once, so the table alone has its value; who
knows which values stand there, without their keys, needs 3.78 bits for 16 pairs, and 2.65 who
strikes out those already given. The table stands in front, so that all samples look at the same
blocks; or anywhere in the first half, so that what a query needs is nowhere twice. FOLDER holds
imdb_{train,test}.jsonl.xz; scores are bits per answer (one of 64 values: 6 by guessing), with a
minus. Other flags, another --out.
"""

import argparse
import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from spion_compare import compare
from spion_lm_gpu import FULL, QUICK, Windows, language
from spion_task import data_folder, parse

METHODS = [
    "dense", "weighted", "window", "CF", "budget", "square", "C", "F", "random", "bigbird", "heads",
    "weighted-heads", "longformer", "CF-paper", "CF-paper:zero", "C-paper", "diagonal", "oracle",
]  # fmt: skip
KEYS, VALUES, KINDS = 128, 192, 64  # bytes that the reviews hardly use; so many of each
LOOKUP = dataclasses.replace(FULL, dense_steps=9_000)  # looking up is learned late, and then fast


@dataclasses.dataclass(frozen=True)
class Asked(Windows):
    """A text with a table, then a text with questions."""

    pairs: int  # keys of the table, and questions
    anywhere: bool

    @property
    def half(self) -> int:
        """Tokens before the questions."""
        return self.length // 2

    @property
    def span(self) -> int:
        """Bytes of the text: what is neither table nor question."""
        return self.length - 4 * self.pairs

    def tokens(self, spans, seed) -> jax.Array:
        """Each span with a table and questions of its own."""
        keys = jax.random.split(jax.random.key(seed), len(spans))
        return jax.vmap(self._sample)(super().tokens(spans, seed), keys)

    def _sample(self, text, key):
        which, what, order, where = jax.random.split(key, 4)
        keys = KEYS + jax.random.permutation(which, KINDS)[: self.pairs]
        values = VALUES + jax.random.randint(what, (self.pairs,), 0, KINDS)
        table = jnp.stack([keys, values], 1)
        last = self.half - table.size
        begin = jax.random.randint(where, (), 0, last + 1) if self.anywhere else 0
        before = jnp.concatenate([text[:last], jnp.zeros(table.size, text.dtype)])
        # What follows the table makes room for it.
        before = jnp.where(jnp.arange(self.half) < begin, before, jnp.roll(before, table.size))
        before = jax.lax.dynamic_update_slice(before, table.reshape(-1), (begin,))
        asked = jax.random.permutation(order, table)
        after = jnp.concatenate([text[last:].reshape(self.pairs, -1), asked], 1)
        return jnp.concatenate([before, after.reshape(-1)])


def loss(pairs: int, text: float, model, batch, rngs):
    """Of the answers, and with a weight of all tokens, which teach to read."""
    tokens = batch[0]
    every = tokens.shape[1] // 2 // pairs
    logits = model(tokens)[:, :-1].astype(jnp.float32)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    answers = each[:, tokens.shape[1] // 2 + every - 2 :: every]
    return answers.mean() + text * each.mean(), {}


def measure(pairs: int, model, batch):
    return -loss(pairs, 0.0, model, batch, None)[0] / jnp.log(2.0)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--table", choices=["front", "anywhere"], default="front")
    parser.add_argument("--pairs", type=int, help="of the table; 16 at full length")
    parser.add_argument("--text", type=float, default=1.0, help="weight of all tokens in the loss")


def main() -> None:
    args = parse(__doc__, add_flags)
    size = (QUICK if args.quick else LOOKUP).changed_by(args)
    anywhere, pairs = args.table == "anywhere", args.pairs or size.length // 128
    if not 0 < pairs <= KINDS or size.length // 2 % pairs:
        raise SystemExit(f"--pairs is at most {KINDS} and divides {size.length // 2}; got {pairs}")
    task = language(
        data_folder(args), size, Asked(size.length, pairs, anywhere),
        name="recall_anywhere" if anywhere else "recall", metric="bits per answer",
        loss=functools.partial(loss, pairs, args.text), measure=functools.partial(measure, pairs),
    )  # fmt: skip
    compare(task, args, METHODS)


if __name__ == "__main__":
    main()
