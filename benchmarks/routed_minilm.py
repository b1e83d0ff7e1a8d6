"""Which blocks a real feed-forward layer falls into, and how well a router predicts their use.

    uv run python benchmarks/routed_minilm.py --imdb FOLDER

The 6 feed-forward layers of all-MiniLM-L6-v2 (384 to 1536 and back) on sentences of IMDB, half of
the blocks active. Blocks and routers come from the tokens of training reviews, the figures from
those of test reviews: the share of the squared activation norm within the chosen blocks, and the
relative error of the layer's output, averaged over the layers.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from harness import save

import sparsax
from sparsax.nn import Bert
from sparsax.routing import captured, co_activation, fit_router

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from compress import MODEL, batches, read_sentences

METHODS = ("oracle", "logistic", "least_squares", "random")


class Watch(nnx.Module):
    """A dense layer that keeps its inputs."""

    def __init__(self, linear):
        self.linear = linear
        self.inputs = nnx.Variable(None)

    def __call__(self, x):
        """The layer's own output."""
        self.inputs.set_value(x)
        return self.linear(x)


def layer_inputs(model: Bert, data: list) -> list[jax.Array]:
    """What every feed-forward layer sees of the real tokens."""
    watched = nnx.clone(model)
    for layer in watched.layers:
        layer.up = Watch(layer.up)

    @nnx.jit
    def run(watched, tokens, mask):
        watched(tokens, mask)
        return [layer.up.inputs.get_value() for layer in watched.layers]

    found = [[x[mask] for x in run(watched, tokens, mask)] for tokens, mask in data]
    return [jnp.concatenate(parts) for parts in zip(*found, strict=True)]


@jax.jit
def output(x, weights, scores, k):
    """The layer's output when every token takes its k blocks of highest score, densely."""
    rank = jnp.argsort(jnp.argsort(-scores, axis=1, stable=True), axis=1)
    units = weights.units(x, lambda z: jax.nn.gelu(z, approximate=False))
    units = jnp.where((rank < k)[..., None], units, 0.0)
    return jnp.einsum("nge,ged->nd", units, weights.w_down)


def measure(layer, train, test, num_blocks, clustered) -> dict[str, tuple[float, float]]:
    """(captured, error) by each way of choosing half the blocks."""
    activation = lambda z: jax.nn.gelu(z, approximate=False)
    kernels = {"w_up": layer.up.kernel[...], "w_down": layer.down.kernel[...]}
    kernels |= {"b_up": layer.up.bias[...]}
    assignment, k = None, num_blocks // 2
    if clustered:
        units = sparsax.split_ffn(num_blocks=1, **kernels).units(train, activation)[:, 0]
        assignment = co_activation(units, num_blocks, key=jax.random.key(0))
    weights = sparsax.split_ffn(num_blocks=num_blocks, assignment=assignment, **kernels)
    train_norms, norms = (weights.norms(x, activation) for x in (train, test))
    scores = {"oracle": norms, "random": jax.random.normal(jax.random.key(1), norms.shape)}
    for method in ("logistic", "least_squares"):
        fit = fit_router(train, train_norms, k, method=method)
        scores[method] = test @ fit.kernel + fit.bias
    whole = output(test, weights, norms, num_blocks)
    found = {}
    for method in METHODS:
        blocks = jax.lax.top_k(scores[method], k)[1]
        error = output(test, weights, scores[method], k) - whole
        error = jnp.linalg.norm(error) / jnp.linalg.norm(whole)
        found[method] = float(captured(norms, blocks)), float(error)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--imdb", type=Path, required=True)
    parser.add_argument("--sentences", type=int, default=512)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 16])
    args = parser.parse_args()
    model = Bert.from_folder(MODEL)
    train, test = (
        layer_inputs(model, batches(read_sentences(args.imdb / f"imdb_{name}.jsonl.xz", count)))
        for name, count in (("train", args.sentences), ("test", args.sentences // 2))
    )
    print(f"{len(train[0])} tokens to fit, {len(test[0])} to measure; captured / error")
    print("blocks  of          " + "".join(f"{method:>16}" for method in METHODS))
    rows = []
    for num_blocks in args.blocks:
        for clustered in (False, True):
            found = [
                measure(layer, *data, num_blocks, clustered)
                for layer, *data in zip(model.layers, train, test, strict=True)
            ]
            mean = {method: np.mean([f[method] for f in found], axis=0) for method in METHODS}
            name = "co-activation" if clustered else "consecutive"
            rows += [
                {
                    "blocks": num_blocks, "cut": name, "method": method,
                    "captured": float(mean[method][0]), "error": float(mean[method][1]),
                    "captured_by_layer": [f[method][0] for f in found],
                }
                for method in METHODS
            ]  # fmt: skip
            cells = (f"{mean[m][0]:9.3f} /{mean[m][1]:5.2f}" for m in METHODS)
            print(f"{num_blocks:6d}  {name:13}" + "".join(cells), flush=True)
    print(save("routed_minilm", rows))


if __name__ == "__main__":
    main()
