"""Hugging Face's Longformer against ours, on a machine with PyTorch and transformers.

    PYTHONPATH=. python benchmarks/longformer_parity.py vectors      # half a minute, any device
    PYTHONPATH=. python benchmarks/longformer_parity.py real         # a GPU; --quick: a small model

`vectors` writes tests/data/longformer_parity.safetensors, which the tests read: weights, inputs and
every hidden state of a small model. `real` runs models of the size of longformer-base and -large,
their weights drawn so that no bias is zero and no softmax flat, at 4096 tokens with 64 scattered
global ones, the second document padded. Errors are relative L2 of every layer's hidden states
against Hugging Face's in float32, padding included; beside our bfloat16 stands Hugging Face's own.
Both modes read what `save_pretrained` wrote, and stop with an error where we are not the same.
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch is in this process, too

import argparse
import gc
import json
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx
from harness import save
from safetensors.numpy import save_file

from sparsax.nn import Longformer
from tests.longformer_reference import random_weights

VECTORS = Path(__file__).parents[1] / "tests" / "data" / "longformer_parity.safetensors"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__}
SMALL = {
    "vocab_size": 60, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 66, "attention_window": [16, 8],
    "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1,
}  # fmt: skip
BASE = SMALL | {
    "vocab_size": 50265, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
    "num_attention_heads": 12, "max_position_embeddings": 4098, "attention_window": 512,
}  # fmt: skip
LARGE = BASE | {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16,
}  # fmt: skip
SIZES = {"base": BASE, "large": LARGE}
# float32, relative L2: rounding of 1e-7 that 24 layers carry on, products summed in other orders.
EXACT = 1e-4


def documents(config, length: int, scattered: int, kept: list[int], seed: int = 0):
    """`(tokens, key_mask, global_mask)`: documents padded from `kept` tokens on.

    `scattered` tokens of each are global; a negative number: so many in front.
    """
    rng = np.random.default_rng(seed)
    real = np.arange(length) < np.array(kept)[:, None]
    tokens = np.where(real, rng.integers(2, config["vocab_size"], real.shape), 1)
    chosen = np.zeros(real.shape, bool)
    for document in chosen:
        drawn = rng.choice(length, max(0, scattered), replace=False)
        document[drawn if scattered >= 0 else slice(-scattered)] = True
    return tokens, real, chosen


def write(config, folder: str):
    """Hugging Face's model with drawn weights, also as `save_pretrained` writes it."""
    model = transformers.LongformerModel(transformers.LongformerConfig(**config)).eval()
    weights = {name: torch.tensor(w) for name, w in random_weights(config).items()}
    found = model.load_state_dict(weights, strict=False)
    missing = [name for name in found.missing_keys if "position_ids" not in name]
    if missing or found.unexpected_keys:
        raise SystemExit(f"names differ: missing {missing}, unexpected {found.unexpected_keys}")
    model.save_pretrained(folder)
    return model


def theirs(model, tokens, real, chosen):
    """All hidden states, and the pooled one, as float32."""
    put = lambda x: torch.tensor(x.astype(np.int64), device=DEVICE)
    with torch.no_grad():
        found = model(
            put(tokens), attention_mask=put(real), global_attention_mask=put(chosen),
            output_hidden_states=True,
        )  # fmt: skip
    arrays = *found.hidden_states, found.pooler_output
    return [x.float().cpu().numpy() for x in arrays]


def ours(folder, inputs, dtype, implementation=None):
    """The same of our model."""
    model = Longformer.from_folder(
        folder, max_global=int(inputs[-1].sum(1).max()), pooler=True, dtype=dtype,
        implementation=implementation,
    )  # fmt: skip

    @nnx.jit
    def run(model, *inputs):
        states = model.hidden_states(*inputs)
        return [*states, model.pool(states[-1])]

    precise = "highest" if dtype == jnp.float32 else None  # float32 products would be TF32
    with jax.default_matmul_precision(precise):
        found = run(model, *map(jnp.asarray, inputs))
    return [np.asarray(x, np.float32) for x in found]


def differences(got, want) -> dict[str, list[float]]:
    """Of every array: relative L2 and the largest entry's."""
    pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(got, want, strict=True)]
    return {
        "relative": [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs],
        "largest": [float(abs(a - b).max()) for a, b in pairs],
    }


def vectors(args) -> None:
    """Writes what the tests read."""
    cases = {
        "scattered": documents(SMALL, 48, 5, [48, 48]),
        "contiguous": documents(SMALL, 48, -7, [48, 48], seed=1),
        "none": documents(SMALL, 32, 0, [32, 32], seed=2),
        "padded": documents(SMALL, 48, 6, [48, 29], seed=3),
        "no_multiple_of_the_window": documents(SMALL, 43, 4, [43, 31], seed=4),
    }
    arrays = {f"weights/{name}": w for name, w in random_weights(SMALL).items()}
    with tempfile.TemporaryDirectory() as folder:
        model = write(SMALL, folder).to(DEVICE)
        for name, inputs in cases.items():
            want = theirs(model, *inputs)
            found = differences(ours(folder, inputs, jnp.float32, "xla"), want)
            print(f"{name:28s} relative {max(found['relative']):.1e}", flush=True)
            if not max(found["relative"]) < EXACT:
                raise SystemExit(f"not the same: {found}")
            places = zip(("tokens", "key_mask", "global_mask"), inputs, strict=True)
            arrays |= {f"{name}/{place}": x for place, x in places}
            arrays |= {f"{name}/hidden_states/{i}": x for i, x in enumerate(want[:-1])}
            arrays[f"{name}/pooled"] = want[-1]
        config = json.loads((Path(folder) / "config.json").read_text())
    metadata = {
        "config": json.dumps(config), "cases": json.dumps(list(cases)),
        "versions": json.dumps(VERSIONS),
    }  # fmt: skip
    narrow = lambda x: x.astype(np.int32) if x.dtype == np.int64 else np.ascontiguousarray(x)
    out = args.out or VECTORS
    save_file({name: narrow(x) for name, x in arrays.items()}, out, metadata)
    print(f"{out}: {out.stat().st_size / 2**20:.2f} MiB")


def real(args) -> None:
    """Models of published sizes, in the two dtypes."""
    rows, size = [], {"quick": SMALL} if args.quick else {n: SIZES[n] for n in args.sizes}
    for name, config in size.items():
        begin, length = time.perf_counter(), config["max_position_embeddings"] - 2
        inputs = documents(config, length, max(4, length // 64), [length, 3 * length // 4])
        with tempfile.TemporaryDirectory() as folder:
            model = write(config, folder).to(DEVICE)
            want = theirs(model, *inputs)
            low = differences(theirs(model.bfloat16(), *inputs), want)
            del model
            gc.collect()
            torch.cuda.empty_cache()
            runs = {"hugging_face_bfloat16": low}
            for dtype in ("float32", "bfloat16"):
                runs[f"ours_{dtype}"] = differences(ours(folder, inputs, jnp.dtype(dtype)), want)
        took = time.perf_counter() - begin
        row = {"size": name, "length": length, "took": took, "versions": VERSIONS, **runs}
        rows.append(row)
        for run, found in runs.items():
            worst, last = max(found["relative"]), found["relative"][-2]
            print(f"{name:6s} {run:22s} relative L2: worst {worst:.2e}, last layer {last:.2e}; "
                  f"largest {max(found['largest']):.2e}", flush=True)  # fmt: skip
        row["same"] = max(runs["ours_float32"]["relative"]) < EXACT
        # Two roundings of one model; half as much again would be more than chance.
        row["bfloat16_as_near"] = bool(
            runs["ours_bfloat16"]["relative"][-2] < 1.5 * low["relative"][-2]
        )
        save("longformer_parity" + "_quick" * args.quick, rows)
    if not all(row["same"] and row["bfloat16_as_near"] for row in rows):
        raise SystemExit("not the same; see the results")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=["vectors", "real"])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--quick", action="store_true", help="real: a small model")
    parser.add_argument("--out", type=Path, help="vectors: another file")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    {"vectors": vectors, "real": real}[args.mode](args)


if __name__ == "__main__":
    main()
