"""XLA's options for the tests, set before JAX starts, in the workers of pytest-xdist, too."""

import importlib.util
import os

# The tests compile thousands of programs and run each but once on small arrays, so that time goes
# to compiling: no optimisation by LLVM, the older and simpler code of fusions, one module a
# program, and no threads that the other worker's would wait for. What is computed is the same but
# for the order of sums; `.ci/run` runs the examples of the README under XLA's defaults.
QUICK = (
    "--xla_backend_optimization_level=0",
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_multi_thread_eigen=false",
)


def with_quick(flags: str) -> str:
    """The flags of the user, who has the last word, behind those that are not among them."""
    return " ".join([flag for flag in QUICK if flag not in flags.split()] + flags.split())


# BLAS is called for small matrices from two workers at once, and its threads then mostly wait for
# each other: on two busy cores an SVD took 17 times as long with two of them. Workers and scripts
# that tests start inherit this; in this very process pytest's plugins have loaded NumPy already.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# The kernels of a GPU are tested, and timed, as users compile them.
if not any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))):
    os.environ["XLA_FLAGS"] = with_quick(os.environ.get("XLA_FLAGS", ""))
