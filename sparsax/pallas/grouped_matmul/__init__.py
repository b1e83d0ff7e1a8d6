"""Products of rows sorted by group, each group with a matrix of its own."""

import jax

from sparsax.pallas.grouped_matmul.gmm import gmm as gmm
from sparsax.pallas.grouped_matmul.gmm import gmm_sum as gmm_sum
from sparsax.pallas.grouped_matmul.tgmm import tgmm as tgmm
from sparsax.pallas.support import DTYPES, on_hopper

FEATURES = 64  # whole lines of shared memory


def grouped_refusal(
    dtype, features_in: int, features_out: int, names: tuple[str, str] = ("D", "F")
) -> str | None:  # fmt: skip
    """Why the kernels cannot multiply rows with so many features; None if they can."""
    if str(dtype) not in DTYPES:
        return f"takes rows and matrices in one of {DTYPES}; got {dtype}"
    if features_in % FEATURES or features_out % FEATURES or not features_in * features_out:
        one, other = names
        return (
            f"takes features {one} and {other} in multiples of {FEATURES}; "
            f"got {one}={features_in} and {other}={features_out}"
        )
    if not on_hopper():
        return f"needs an NVIDIA Hopper GPU; the default device is {jax.devices()[0].device_kind}"
    return None
