"""Fine-tunes one small language model in many ways on E2E, from a meaning to a sentence.

    python benchmarks/finetune_e2e_gpu.py --text TEXT --model RUN       # of pretrain_lm_gpu.py
    python benchmarks/finetune_e2e_gpu.py ... --ways lora spt-2-8 --seeds 1 --resume   # add rows
    python benchmarks/finetune_e2e_gpu.py ... --ways full --beside &   # of others on the same GPU,
    python benchmarks/finetune_e2e_gpu.py ... --ways lora --beside     # which it is a pity to keep
                                                                       # idle while one compiles

    full          all parameters                     common-C      TSVD-common, compressed C times
    lora          rank 16 beside every dense layer   common-C-res  the same and what it misses
    lora-qv       rank 4 beside query and value      tsvd-C        TSVD, all factors trained
    spt-G-L       routed FFN of G of 4 blocks, and the L-th part of the keys, with LoRA
    routed-G      the routed FFN alone, with LoRA    top-L         the keys alone, with LoRA

AdamW, decay .01, warm-up over 4,000 pairs, then linear to 0, label smoothing .1, loss on the
sentence alone; pairs of more than 96 tokens (0.1 %) are left out. bfloat16, trained parameters in
float32, frozen ones in bfloat16; products are cuBLAS's. Attention is cuDNN's flash attention where
it is dense, so --flash changes memory and time of every way but the top-L ones. Every row has the
loss on validation pairs (nats a token, without smoothing) before and after each epoch, milliseconds
of a step (median, without compilation), MiB that a dispatch of many steps holds at its peak (XLA's
buffer assignment), bits per byte of the model that it began with, and seconds to write a sentence
for all 630 meanings of the test set, greedy and by a beam. The sentences go to a folder, a file for
each row, for `e2e_metrics.py`.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import time
import typing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from finetune_ways import WAYS, Parts, convert, rules_of
from flax import nnx
from generation import Search, search
from gpu import leave_products_to_cublas
from language import END, Pairs, Words, halve, read_pairs
from resumed import Rows, turns_on_gpu
from tqdm import tqdm

from sparsax.nn import TopLAttention

HERE = Path(__file__).parent
PIECES = 20  # dispatches of an epoch
KEYS = ("way", "seed", "batch", "rate", "epochs")  # what makes a row another one


def token_losses(model, tokens, to, count, smoothing: float):
    """Nats of the sentences' tokens, and their number."""
    tokens = tokens.astype(jnp.int32)
    # Padding stands at the end, where causal attention sees none; codebooks follow all keys.
    codebooks = any(isinstance(module, TopLAttention) for _, module in nnx.iter_modules(model))
    key_mask = jnp.arange(tokens.shape[1]) < count[:, None] if codebooks else None
    logits = model(tokens, key_mask=key_mask)[:, :-1]
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), -1)
    true = jnp.take_along_axis(log_p, tokens[:, 1:, None], -1)[..., 0]
    index = jnp.arange(1, tokens.shape[1])
    counts = (index > to[:, None]) & (index < count[:, None])
    nats = -(1 - smoothing) * true - smoothing * log_p.mean(-1)
    return jnp.where(counts, nats, 0.0).sum(), counts.sum()


def trainer(parts: Parts, wrt, steps: int, args):
    """`(optimizer, run)`; run takes many steps in one dispatch."""
    graph = parts.graph
    warm_up = max(1, min(4000 // args.batch, steps // 2))
    rate = optax.join_schedules(
        [optax.linear_schedule(0.0, args.rate, warm_up),
         optax.linear_schedule(args.rate, 0.0, steps - warm_up)], [warm_up],
    )  # fmt: skip
    tx = optax.adamw(rate, weight_decay=0.01)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state, frozen, data, order):
        def one(state, rows):
            tuned, other, opt = state

            def loss(tuned):
                model = nnx.merge(graph, tuned, frozen, other, copy=True)
                # Codebooks of top-L attention follow the keys by a moving average.
                model.set_attributes(use_running_average=False, raise_if_not_found=False)
                nats, count = token_losses(model, *(x[rows] for x in data), args.smoothing)
                return nats / count, nnx.split(model, wrt, nnx.Param, ...)[3]

            (value, other), grads = jax.value_and_grad(loss, has_aux=True)(tuned)
            updates, opt = tx.update(grads, opt, tuned)
            return (optax.apply_updates(tuned, updates), other, opt), value

        return jax.lax.scan(one, state, order)

    return tx, run


def evaluator(graph, valid: Pairs, batch: int):
    """`f(tuned, frozen, other)`: nats a token of all validation pairs."""
    pad = -len(valid.tokens) % batch
    cut = lambda x: jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)).reshape(
        -1, batch, *x.shape[1:]
    )
    batches = tuple(cut(jnp.asarray(x)) for x in (valid.tokens, valid.to, valid.count))

    @jax.jit
    def evaluate(tuned, frozen, other):
        model = nnx.merge(graph, tuned, frozen, other, copy=True)
        nats, count = jax.lax.map(lambda x: token_losses(model, *x, 0.0), batches)
        return nats.sum() / count.sum()

    return evaluate


class Writer:
    """Sentences for all prompts; compiled once for a graph and a search."""

    def __init__(self, graph, how: Search, batch: int):
        def write(tuned, frozen, other, prompts, counts):
            model = nnx.merge(graph, tuned, frozen, other, copy=True)
            halve(model)
            return search(model, prompts, counts, how)

        self.write, self.batch = jax.jit(write), batch

    def lower(self, state, prompts: Pairs):
        """What is left to compile."""
        return self.write.lower(*state, *self.parts(prompts)[0])

    def parts(self, prompts: Pairs) -> list[tuple[np.ndarray, np.ndarray]]:
        """The prompts `batch` at a time, the last ones filled up."""
        pad = -len(prompts.tokens) % self.batch
        tokens = np.pad(prompts.tokens.astype(np.int32), ((0, pad), (0, 0)))
        counts = np.pad(prompts.to.astype(np.int32) + 1, (0, pad), constant_values=1)
        cuts = range(0, len(tokens), self.batch)
        return [(tokens[i : i + self.batch], counts[i : i + self.batch]) for i in cuts]

    def __call__(self, compiled, state, prompts: Pairs) -> tuple[np.ndarray, float]:
        """Ids `[n, steps]`, and seconds."""
        parts, begin = self.parts(prompts), time.perf_counter()
        found = [np.asarray(compiled(*state, *part)) for part in parts]
        return np.concatenate(found)[: len(prompts.tokens)], time.perf_counter() - begin


class Study:
    """The data, and what is compiled once for all seeds of a way."""

    def __init__(self, args):
        self.args, self.words = args, Words(args.text)
        facts = args.model / "pretrained.json"
        self.base = json.loads(facts.read_text()) if facts.exists() else {}
        self.train, self.valid = (self._fitting(split) for split in ("train", "valid"))
        test = read_pairs(args.text, "test")
        if args.quick:
            test = Pairs(*(getattr(test, x.name)[:6] for x in dataclasses.fields(Pairs)))
        width = test.to.max() + 1  # without the END of an empty sentence
        self.prompts = Pairs(test.tokens[:, :width], test.to, test.count)
        self.batches = len(self.train.tokens) // args.batch // PIECES * PIECES
        self.data = tuple(map(jnp.asarray, (self.train.tokens, self.train.to, self.train.count)))
        self.way, self.tx, self.writers = None, None, {}
        self.compiled: dict[str, typing.Any] = {}
        self.turn = turns_on_gpu() if args.beside else contextlib.nullcontext()

    def _fitting(self, split: str) -> Pairs:
        pairs = read_pairs(self.args.text, split)
        fits = np.flatnonzero(pairs.count <= self.args.length)
        if self.args.quick:
            fits = fits[:: len(fits) // 80]
        width = min(self.args.length, pairs.tokens.shape[1])
        return Pairs(pairs.tokens[fits, :width], pairs.to[fits], pairs.count[fits])

    def calibration(self, rng) -> jax.Array:
        """Sequences without padding: pairs one after the other, at least `--tokens` of them."""
        rows = -(-self.args.tokens // self.args.length)
        order = rng.permutation(len(self.train.tokens))
        stream = np.concatenate([self.train.tokens[i, : self.train.count[i]] for i in order])
        return jnp.asarray(np.resize(stream, (rows, self.args.length)), jnp.int32)

    def key(self, way: str, seed: int) -> dict:
        """What tells a row from others."""
        args = self.args
        return {"way": way, "seed": seed, "batch": args.batch, "rate": args.rate,
                "epochs": args.epochs}  # fmt: skip

    def row(self, way: str, seed: int) -> dict:
        """Converts, trains, validates and writes sentences."""
        args, begin = self.args, time.perf_counter()
        rng = np.random.default_rng(seed)
        parts, size = convert(way, seed, args, self.calibration(rng))
        row = self.key(way, seed) | {
            "base": self.base.get("valid_bits_per_byte"),
            "parameters": size,
            "trained": sum(leaf.size for leaf in jax.tree.leaves(parts.tuned)),
            "convert_s": time.perf_counter() - begin,
        }
        if self.way != way:  # the seeds of a way share what is compiled
            self.way, begin = way, time.perf_counter()
            self._compile(parts, rules_of(way, args.length, seed, args)[1])
            row["compile_s"] = time.perf_counter() - begin
        with self.turn:
            state = self._train(parts, row, rng)
            found = {
                name: writer(self.compiled[name], state, self.prompts)
                for name, writer in self.writers.items()
            }
        for name, (ids, row[f"{name}_s"]) in found.items():
            lines = [self.words.text(sentence) for sentence in ids]
            args.generations.mkdir(parents=True, exist_ok=True)
            parameters = f"{way}_{seed}_{args.batch}_{args.rate:g}_{args.epochs}"
            path = args.generations / f"{parameters}_{name}.txt"
            path.write_text("\n".join(lines) + "\n")
        return row

    def _compile(self, parts: Parts, wrt) -> None:
        """All programs of a way at the same time."""
        args = self.args
        self.tx, run = trainer(parts, wrt, self.batches * args.epochs, args)
        evaluate = evaluator(parts.graph, self.valid, min(128, len(self.valid.tokens)))
        self.writers = {
            name: Writer(parts.graph, how, args.decode_batch)
            for name, how in self.searches().items()
        }
        order = jax.ShapeDtypeStruct((self.batches // PIECES, args.batch), jnp.int32)
        start = parts.tuned, parts.other, self.tx.init(parts.tuned)
        whole = parts.tuned, parts.frozen, parts.other
        with ThreadPoolExecutor() as pool:
            jobs = {
                "train": pool.submit(run.lower(start, parts.frozen, self.data, order).compile),
                "evaluate": pool.submit(evaluate.lower(*whole).compile),
            }
            for name, writer in self.writers.items():
                jobs[name] = pool.submit(writer.lower(whole, self.prompts).compile)
        self.compiled = {name: job.result() for name, job in jobs.items()}

    def searches(self) -> dict[str, Search]:
        """Greedy, and the beam of Hu et al. (2021)."""
        steps = 8 if self.args.quick else 64
        beam = Search(end=END, steps=steps, width=10, length_penalty=0.9, no_repeat=4)
        found = {"greedy": Search(end=END, steps=steps)}
        return found if self.args.no_beam else found | {"beam": beam}

    def _train(self, parts: Parts, row: dict, rng):
        """Trains; puts losses, time and memory into the row."""
        args, tools = self.args, self.compiled
        steps, size = self.batches * args.epochs, self.batches // PIECES
        orders = [rng.permutation(len(self.train.tokens))[: self.batches * args.batch]
                  for _ in range(args.epochs)]  # fmt: skip
        orders = jnp.asarray(
            np.reshape(orders, (args.epochs * PIECES, size, args.batch)), jnp.int32
        )
        state = parts.tuned, parts.other, self.tx.init(parts.tuned)
        memory = tools["train"].memory_analysis()
        row["bytes"] = (memory.argument_size_in_bytes + memory.temp_size_in_bytes
                        + memory.output_size_in_bytes - memory.alias_size_in_bytes)  # fmt: skip
        evaluate = lambda: float(tools["evaluate"](state[0], parts.frozen, state[1]))
        row |= {"valid_loss": [evaluate()], "train_loss": []}
        seconds = []
        for piece, order in enumerate(tqdm(orders, desc=row["way"], disable=args.quiet)):
            begin = time.perf_counter()
            state, losses = tools["train"](state, parts.frozen, self.data, order)
            row["train_loss"].append(float(losses.mean()))
            seconds.append((time.perf_counter() - begin) / size)
            if (piece + 1) % PIECES == 0:
                row["valid_loss"].append(evaluate())
        row |= {"steps": steps, "step_ms": 1e3 * float(np.median(seconds))}
        return state[0], parts.frozen, state[1]


def show(row: dict) -> None:
    print(f"{row['way']:14s} {row['seed']:4d} {row['valid_loss'][0]:7.3f} "
          f"{row['valid_loss'][-1]:7.4f} {row['trained']:11,} {row['step_ms']:8.2f} "
          f"{row['bytes'] / 2**20:8.0f} {row['greedy_s']:8.2f} {row.get('beam_s', 0):7.2f} "
          f"{row['took']:7.0f}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="folder of the token ids")
    parser.add_argument("--model", type=Path, default=Path("runs/lm"), help="folder of the model")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rate", type=float, default=2e-4, help="the highest learning rate")
    parser.add_argument("--smoothing", type=float, default=0.1, help="of labels")
    parser.add_argument("--length", type=int, default=96, help="longest pair, in tokens")
    parser.add_argument("--tokens", type=int, default=8192, help="that a router is fitted to")
    parser.add_argument("--tile", type=int, default=256, help="of TSVD")
    parser.add_argument("--common-tile", type=int, default=128, help="of TSVD-common")
    parser.add_argument("--flash", default="cudnn", choices=["cudnn", "xla"])
    parser.add_argument("--routed", choices=["xla", "pallas"], help="of the routed FFN")
    parser.add_argument("--tsvd", choices=["xla", "pallas"], help="of TSVD")
    parser.add_argument("--decode-batch", type=int, default=105, help="meanings at a time")
    parser.add_argument("--no-beam", action="store_true", help="greedy sentences alone")
    parser.add_argument("--minutes", type=float, help="start no row after so many")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--beside", action="store_true", help="of others like it: take turns "
                        "on the GPU, which are timed, and add to the same result")  # fmt: skip
    parser.add_argument("--name", default="finetune_e2e", help="of the result")
    parser.add_argument("--generations", type=Path, help="folder of the sentences")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--quick", action="store_true", help="an epoch of 80 pairs, anywhere")
    args = parser.parse_args()
    leave_products_to_cublas()
    if args.quick:
        quick = {"epochs": 1, "batch": 2, "tokens": 256, "tile": 32, "common_tile": 32,
                 "flash": "xla", "decode_batch": 3, "name": args.name + "_quick"}  # fmt: skip
        vars(args).update(quick)
    args.generations = args.generations or HERE / "results" / args.name
    study = Study(args)
    done = Rows(args.name, KEYS, resume=args.resume, beside=args.beside)
    start = time.perf_counter()
    print(
        "way            seed  before   after     trained  ms/step      MiB greedy s  beam s       s"
    )
    for way in args.ways:
        for seed in args.seeds:
            begin = time.perf_counter()
            late = args.minutes and begin - start > 60 * args.minutes
            if not late and not done.has(**study.key(way, seed)):
                show(done.add(begin, study.row(way, seed)))


if __name__ == "__main__":
    main()
