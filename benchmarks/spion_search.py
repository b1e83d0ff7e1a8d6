"""What a trained byte language model scores under a pattern at once, before it trains on.

    python benchmarks/spion_lm_gpu.py --data FOLDER --out OUT ...   # on a GPU, 2,048 bytes
    uv run python benchmarks/spion_search.py --data FOLDER --out OUT    # anywhere, minutes

Takes the model and the score maps at the end of the dense phase of seed 0 and compares searches
with a sliding window, budget by budget: a search that is right about what attention needs loses
least here, where no training mends what it did. float32; results/mass_search.json.
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import numpy as np
from harness import save
from spion_lm_gpu import full, language
from spion_methods import FINDERS, Maps
from spion_runs import Runs
from spion_state import read_start
from spion_task import score
from tqdm import tqdm

from sparsax.patterns import layer_weights

SEARCHES = ("window", "budget", "square", "weighted", "layer", "square-layer")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the files")
    parser.add_argument("--out", type=Path, required=True, help="of spion_lm_gpu.py")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.15, 0.2, 0.25, 0.3, 0.4])
    parser.add_argument("--batches", type=int, default=6, help="of 8 sequences to score, and half "
                        "as many others to find weights")  # fmt: skip
    args = parser.parse_args()
    args.dense, args.beside, args.no_bar = "xla", False, True
    size = dataclasses.replace(full(2048), batch_size=8, held_batches=args.batches)
    task = language(args.data, size)
    runs = Runs(task, 0, args, lambda: False)
    dense = runs.run("drop", "xla", None)
    like = {"params": dense.params, "opt": task.optimizer.init(dense.params)}
    params = read_start(runs.folder / "start.npz", like).state["params"]
    kept = np.load(args.out / f"spion_{task.name}.npz")
    pooled = jax.numpy.asarray(kept["maps"], jax.numpy.float32)[:, None]

    bits = lambda pattern, held: -score(task, dense.model(params, pattern), held)
    others = jax.tree.map(lambda x: x[: max(1, args.batches // 2)], task.valid)
    weights = layer_weights(
        lambda pattern: bits(pattern, others), pooled, block=size.block, causal=True,
        length=size.length,
    )  # fmt: skip
    print("weights of the layers", weights.tolist())
    rows = [{"search": "dense", "density": 1.0, "bits": bits(None, task.test[0])}]
    rows[0]["weights"] = weights.tolist()
    for density in tqdm(args.densities):
        setting = dataclasses.replace(runs.setting, density=density)
        maps = Maps(whole=None, pooled=pooled, heads=None, final=None, weights=weights)
        for name in SEARCHES:
            pattern = FINDERS[name](setting, maps)
            listed = np.asarray(pattern.to_block_mask()).sum((1, 2, 3)) / (setting.blocks + 1)
            rows.append({
                "search": name, "density": density,
                "bits": bits(pattern, task.test[0]),
                "densities": (2 * listed / setting.blocks).tolist(),
            })  # fmt: skip
            tqdm.write(str(rows[-1]))
    print(save("mass_search", rows))


if __name__ == "__main__":
    main()
