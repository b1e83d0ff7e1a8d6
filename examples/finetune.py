"""Fine-tuning three ways: a whole model, LoRA, and SPT (LoRA, routed FFN, top-L attention).

    uv run python examples/finetune.py                 # made-up restaurants, some minutes on a CPU
    uv run python examples/finetune.py --data FOLDER   # the E2E data: see sparsax.data.read_e2e
    uv run python examples/finetune.py --quick         # shows that it runs, too short to learn

A small byte-level decoder first learns what sentences about restaurants look like. From that very
model each way goes on to learn a task, the sentence for a given meaning. SPT is converted from the
dense model in one call of `sparsify`. Its loss starts higher, as every token meets half of the
feed-forward units and an eighth of the keys. Times of so small a model say nothing of a large one.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import sparsax
from sparsax import data
from sparsax.nn import DecoderConfig, LanguageModel, RouterParam
from sparsax.rules import LoRA, Routed, TopL

LENGTH, BATCH, RANK = 128, 16, 8
ATTENTION = r".*attention\.(query|key|value|out)"
NAMES = ["Aromi", "Blue Spice", "Clowns", "Cotto", "Fitzbillies", "Giraffe", "The Mill", "Zizzi"]
FOODS = ["Chinese", "English", "French", "Indian", "Italian", "Japanese"]
AREAS = ["city centre", "riverside"]
PRICES = ["cheap", "high", "moderate"]
SENTENCES = (
    "{name} serves {food} food in the {area}. Prices are {price}.",
    "In the {area} you find {name}, a {food} place whose prices are {price}.",
    "For {food} food go to {name} in the {area}; its prices are {price}.",
)


def made_up(count: int, seed: int) -> list[tuple[str, str]]:
    """Meanings and sentences in the style of the E2E data."""
    rng, pairs = np.random.default_rng(seed), []
    for _ in range(count):
        slots = {"name": NAMES, "food": FOODS, "area": AREAS, "price": PRICES}
        slots = {slot: str(rng.choice(values)) for slot, values in slots.items()}
        meaning = ", ".join(f"{slot}[{value}]" for slot, value in slots.items())
        pairs.append((meaning, str(rng.choice(SENTENCES)).format(**slots)))
    return pairs


def read(folder: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The same of the E2E data, to train and to validate."""
    found = data.read_e2e(folder)
    pairs = lambda split: [(m.representation, text) for m in split for text in m.references]
    return pairs(found.train), pairs(found.valid)


def stream(lines: list[str]) -> np.ndarray:
    """The bytes of all lines, one after the other; what is not ASCII is a question mark."""
    return np.frombuffer("\n".join(lines).encode("ascii", "replace"), np.uint8).astype(np.int32)


def windows(text: np.ndarray, count: int, seed: int) -> jax.Array:
    """So many pieces of the text, from anywhere, with the byte that follows."""
    begin = np.random.default_rng(seed).integers(0, len(text) - LENGTH, count)
    return jnp.asarray(text[begin[:, None] + np.arange(LENGTH + 1)])


def loss_of(model, tokens):
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


evaluate = nnx.jit(loss_of)


def train(model, text, *, wrt, steps: int, rate: float, seed: int) -> float:
    """Trains what `wrt` selects, in place; milliseconds of a step, the median."""
    schedule = optax.cosine_decay_schedule(rate, steps)
    optimizer = nnx.Optimizer(model, optax.adam(schedule), wrt=wrt)

    @nnx.jit
    def step(model, optimizer, tokens):
        loss, gradients = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, wrt))(model, tokens)
        optimizer.update(model, gradients)
        return loss

    seconds = []
    for i in range(steps):
        tokens = windows(text, BATCH, seed=1000 * seed + i)
        begin = time.perf_counter()
        jax.block_until_ready(step(model, optimizer, tokens))
        seconds.append(time.perf_counter() - begin)
    return 1e3 * float(np.median(seconds[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of the E2E data; made up without")
    parser.add_argument("--quick", action="store_true", help="a minute: shows that it runs")
    parser.add_argument("--steps", type=int, default=300, help="of training, and of each tuning")
    parser.add_argument("--features", type=int, default=64)
    args = parser.parse_args()
    steps = 4 if args.quick else args.steps

    known, held_out = read(args.data) if args.data else (made_up(4000, 0), made_up(400, 1))
    task = lambda pairs: stream([f"{meaning} -> {sentence}" for meaning, sentence in pairs])
    sentences, text = stream([sentence for _, sentence in known]), task(known)
    valid = windows(task(held_out), 64, seed=0)

    config = DecoderConfig.llama(
        vocab_size=128, length=LENGTH, features=args.features, hidden=4 * args.features,
        num_heads=args.features // 16, layers=2,
    )  # fmt: skip
    start = LanguageModel(config, rngs=nnx.Rngs(0))
    train(start, sentences, wrt=nnx.Param, steps=steps, rate=3e-3, seed=1)
    print(f"before fine-tuning: loss {float(evaluate(start, valid)):.3f}")

    spt = [
        LoRA(path=ATTENTION, rank=RANK),
        Routed(path=r".*\.ffn", num_blocks=4, active=2, lora_rank=RANK, frozen=True),
        TopL(path=r".*\.attention", keep=LENGTH // 8),
    ]
    ways = {  # rules, what is trained, rate
        "full": ([], nnx.Param, 1e-3),
        "LoRA": ([LoRA(path=rf"{ATTENTION}|.*(up|gate|down)", rank=RANK)], nnx.LoRAParam, 1e-2),
        "SPT": (spt, nnx.Any(nnx.LoRAParam, RouterParam), 1e-2),
    }
    calibration = windows(text, 32, seed=2)[:, :-1]
    rows = []
    for name, (rules, wrt, rate) in ways.items():
        model = nnx.clone(start)
        if rules:
            model, report = sparsax.sparsify(start, rules, calibrate=lambda m: m(calibration))
        if name == "SPT":
            print(report)
        first = float(evaluate(model, valid))
        trained = sum(x.size for x in jax.tree.leaves(nnx.state(model, wrt)))
        ms = train(model, text, wrt=wrt, steps=steps, rate=rate, seed=3)
        rows.append((name, first, float(evaluate(model, valid)), trained, ms))

    print(f"\n{'':6}{'loss before':>12}{'after':>8}{'trained':>10}{'ms a step':>11}")
    for name, first, last, trained, ms in rows:
        print(f"{name:6}{first:12.3f}{last:8.3f}{trained:10,}{ms:11.1f}")


if __name__ == "__main__":
    main()
