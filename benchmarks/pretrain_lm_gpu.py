"""Pre-trains a small language model on IMDB reviews: where `finetune_e2e_gpu.py` starts from.

    python benchmarks/pretrain_lm_gpu.py --data FOLDER --text TEXT --prepare   # once, anywhere
    python benchmarks/pretrain_lm_gpu.py --text TEXT --out RUN                 # on a GPU

FOLDER holds imdb_{train,test}.jsonl.xz and the E2E files; TEXT gets the same as token ids (27 MB),
all that the GPU machine needs. RUN gets model.safetensors and facts as JSON in the end, and before
that checkpoints from which a killed run goes on when it is started again.

OPT's style (--style llama: that one), bfloat16, float32 parameters, AdamW, cuDNN flash attention,
windows from anywhere in the stream, many steps in one dispatch. The size by arithmetic: 8 layers of
1024 features, 109 million parameters, take 0.68 GFLOP a token; four epochs of the reviews'
13 million tokens are 3.6e16, two and a half minutes at 250 TFLOP/s. More epochs would learn the
reviews by heart rather than English. --minutes ends earlier, with the learning rate run out.
"""

import argparse
import functools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from harness import save
from language import STYLES, Text, Words, prepare, read_text, save_model, use_flash
from tqdm import tqdm

from sparsax.nn import LanguageModel
from sparsax.training.checkpoint import RunFolder

WARM_UP = 100  # steps


def losses(model, tokens):
    """Nats of every token that follows, `[B, T]`."""
    logits = model(tokens[:, :-1]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])


def learning_rate(step, total, highest: float):
    """Up in a line, then down in half a cosine to a tenth."""
    share = jnp.clip((step - WARM_UP) / jnp.maximum(total - WARM_UP, 1), 0, 1)
    cosine = 0.55 + 0.45 * jnp.cos(jnp.pi * share)
    return highest * jnp.minimum((step + 1) / WARM_UP, cosine)


def trainer(model, args):
    """`(state, run)`: what a training starts from, and many steps of it as one jitted function."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    matrices = lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), optax.scale_by_adam(b2=0.95),
        optax.add_decayed_weights(0.1, mask=matrices),
    )  # fmt: skip

    def one(total, text, state, step):
        params, opt = state
        key = jax.random.fold_in(jax.random.key(args.seed), step)
        begin = jax.random.randint(key, (args.batch,), 0, text.size - args.length)
        tokens = text[begin[:, None] + jnp.arange(args.length + 1)].astype(jnp.int32)
        loss = lambda params: losses(nnx.merge(graph, params, rest), tokens).mean()
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt = tx.update(grads, opt, params)
        rate = -learning_rate(step, total, args.rate)
        params = optax.apply_updates(params, jax.tree.map(lambda u: rate * u, updates))
        return (params, opt), value

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state, text, first, total):
        steps = first + jnp.arange(args.chunk)
        return jax.lax.scan(functools.partial(one, total, text), state, steps)

    return (params, tx.init(params)), run


def bits_per_byte(model, text: Text, length: int, batch: int = 32) -> float:
    """Over the whole validation stream in windows; a token's bits, END's too, over the bytes."""
    count = (text.valid.size - 1) // length
    index = np.arange(count)[:, None] * length + np.arange(length + 1)
    windows = text.valid[index].astype(np.int32)
    total = nnx.jit(lambda model, tokens: losses(model, tokens).sum())
    nats = sum(float(total(model, windows[i : i + batch])) for i in range(0, count, batch))
    return nats / np.log(2) / (text.valid_bytes * count * length / text.valid.size)


def flop_of_token(model: LanguageModel, length: int) -> float:
    """Forward and backward: six for every weight of a matrix, and causal attention."""
    c = model.config
    weights = sum(x.size for x in jax.tree.leaves(nnx.state(model.blocks, nnx.Param)))
    return 6 * (weights + c.vocab_size * c.features) + 6 * c.layers * length * c.features


def train(model, text: Text, args, disk: RunFolder) -> tuple[list[dict], dict]:
    """Trains in place, from the newest checkpoint if there is one; rows of the log, and facts."""
    state, run = trainer(model, args)
    facts = {"step": 0, "total": int(args.epochs * text.train.size / args.batch / args.length)}
    facts["total"] = max(1, -(-facts["total"] // args.chunk)) * args.chunk
    if (restored := disk.restore(state)) is not None:
        state, _, facts = restored
        facts |= {"resumed_at": facts["step"]}
    stream, rows, flop = jnp.asarray(text.train), [], flop_of_token(model, args.length)
    begin = saved = time.perf_counter()
    bar = tqdm(total=facts["total"], initial=facts["step"], unit="step", disable=args.quiet)
    for chunk in range((facts["total"] - facts["step"]) // args.chunk):
        before = time.perf_counter()
        state, found = run(state, stream, facts["step"], facts["total"])
        loss = float(found[-args.chunk // 2 :].mean())
        now = time.perf_counter()
        seconds = (now - before) / args.chunk
        facts["step"] += args.chunk
        rate = args.batch * args.length / seconds
        row = {"step": facts["step"], "loss": loss, "seconds": seconds, "tokens_s": rate,
               "tflops": rate * flop / 1e12, "first": chunk == 0}  # fmt: skip
        rows.append(row)
        if chunk == 1 and args.minutes:  # the first one compiles
            left = int((begin + 60 * args.minutes - now) / seconds / args.chunk) * args.chunk
            facts["total"] = min(facts["total"], facts["step"] + max(left, 0))
            bar.total = facts["total"]
        bar.set_postfix(loss=f"{loss:.3f}", tflops=f"{row['tflops']:.0f}")
        bar.update(args.chunk)
        last = facts["step"] >= facts["total"]
        if last:
            break
        if now - saved > 60 * args.save_minutes:
            disk.save(facts["step"], state, {}, facts)
            saved = time.perf_counter()
    bar.close()
    nnx.update(model, state[0])
    return rows, facts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="folder of the token ids")
    parser.add_argument("--out", type=Path, default=Path("runs/lm"), help="folder of the run")
    parser.add_argument("--prepare", action="store_true", help="write TEXT, and end")
    parser.add_argument("--data", type=Path, help="folder of the raw files, for --prepare")
    parser.add_argument("--vocabulary", type=int, default=8192, help="for --prepare")
    parser.add_argument("--most", type=int, help="reviews a file, for --prepare; all without")
    parser.add_argument("--style", choices=STYLES, default="opt")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--minutes", type=float, help="of training at most, compilation included")
    parser.add_argument("--save-minutes", type=float, default=3, help="between checkpoints")
    parser.add_argument("--rate", type=float, default=6e-4, help="the highest learning rate")
    parser.add_argument("--chunk", type=int, default=20, help="steps in one dispatch")
    parser.add_argument("--flash", default="cudnn", choices=["cudnn", "xla"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--quick", action="store_true", help="60 steps of a tiny model, anywhere")
    args = parser.parse_args()
    if args.prepare:
        if args.data is None:
            parser.error("--prepare needs --data")
        prepare(args.data, args.text, args.vocabulary, 1000, args.most)
        print({path.name: path.stat().st_size for path in sorted(args.text.iterdir())})
        return
    if args.quick:
        quick = {"layers": 2, "features": 64, "length": 128, "batch": 4, "flash": "xla"}
        vars(args).update(quick | {"epochs": args.epochs * 6e-4})
    if (args.out / "model.safetensors").exists():
        parser.error(f"{args.out} holds a finished model; name another folder, or delete it")
    text, words = read_text(args.text), Words(args.text)
    if args.quick:
        text = Text(text.train, text.valid[:4000], text.valid_bytes * 4000 // text.valid.size)
    config = STYLES[args.style](
        vocab_size=len(words), length=args.length, features=args.features,
        hidden=4 * args.features, num_heads=args.features // 64, layers=args.layers,
        dtype=jnp.bfloat16,
    )  # fmt: skip
    model = LanguageModel(config, rngs=nnx.Rngs(args.seed))
    use_flash(model, args.flash)
    args.out.mkdir(parents=True, exist_ok=True)
    disk = RunFolder(args.out, keep=1)
    rows, facts = train(model, text, args, disk)
    disk.close()
    save_model(model, args.out)
    found = bits_per_byte(model, text, args.length)
    size = sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    print(f"{size:,} parameters, {facts['step']} steps, {found:.3f} bits per byte of the held-out "
          "reviews")  # fmt: skip
    summary = {"parameters": size, "valid_bits_per_byte": found, "style": args.style, **facts}
    (args.out / "pretrained.json").write_text(json.dumps(summary) + "\n")
    print(save("pretrain_lm" + "_quick" * args.quick, [summary, *rows]))


if __name__ == "__main__":
    main()
