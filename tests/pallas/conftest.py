"""Makes interpret mode quicker, and stands in for GPUs with few multiprocessors."""

import importlib.util
import os
import pkgutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from sparsax.pallas import tsvd
from sparsax.pallas.block_sparse import attention, deal, schedule

CALL = "jax._src.callback.io_callback_impl"  # private: there is no public way
TO_INT = "jax._src.pallas.mosaic_gpu.interpret.shared_memory._to_int"


def on_copies(*args, callback, **_):
    """Stands for `io_callback_impl`, which first puts every argument on a device.

    The interpreter calls back for every access to memory and at once makes NumPy arrays and Python
    numbers of what it gets, so that half of its time went to the detour. Copies, because the
    runtime takes its buffers back after the call.
    """
    return jax.tree.map(np.asarray, callback(*map(np.array, args)))


@pytest.fixture(autouse=True)
def quick_callbacks(monkeypatch):
    """Does nothing where JAX no longer has the names: the tests are the same, only slower."""
    try:
        to_int = [pkgutil.resolve_name(name) for name in (CALL, TO_INT)][1]
    except (ImportError, AttributeError):
        return
    # It knows numbers of JAX, but not those of NumPy.
    number = lambda x: x.item() if isinstance(x, np.ndarray) else to_int(x)
    monkeypatch.setattr(CALL, on_copies)
    monkeypatch.setattr(TO_INT, number)


@pytest.fixture(autouse=True)
def assembler(request, monkeypatch):
    """Machine code is that of the group's own ptxas: XLA would take another, which spills more."""
    if request.node.get_closest_marker("machine_code") is None:
        return
    nvidia = importlib.util.find_spec("nvidia")
    for folder in nvidia.submodule_search_locations if nvidia else ():
        monkeypatch.setenv("PATH", str(Path(folder, "cu13", "bin")), prepend=os.pathsep)


@pytest.fixture(params=["fused", "products"])
def tsvd_schedule(request, monkeypatch):
    """The only schedule of products with factors that there is."""
    monkeypatch.setattr(tsvd, "best_schedule", lambda *_: request.param)
    return request.param


@pytest.fixture
def fresh():
    """No call that was traced with the constants as they are stands for one with others."""
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def few_multiprocessors():
    """So few, where there is no GPU, that thread blocks have several rows, dealt by their lists."""
    if jax.default_backend() == "gpu":
        yield
        return
    jax.clear_caches()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(schedule, "multiprocessors", lambda: 1)
        yield
    jax.clear_caches()


@pytest.fixture
def one_multiprocessor(fresh, monkeypatch):
    """So that rows of small cases are dealt out as those of large ones are, where they lower."""
    monkeypatch.setattr(schedule, "multiprocessors", lambda: 1)


@pytest.fixture
def joined(fresh, monkeypatch):
    """On a GPU so small that long rows are cut: a list of the calls that joined their pieces.

    And that a thread block joins several.
    """
    monkeypatch.setattr(schedule, "multiprocessors", lambda: 9)
    monkeypatch.setattr(sys.modules[attention.combine.__module__], "multiprocessors", lambda: 3)
    monkeypatch.setattr(deal, "LEAST", 1)
    monkeypatch.setattr(schedule, "LONG", 1)
    calls, combine = [], attention.combine
    monkeypatch.setattr(attention, "combine", lambda *x: calls.append(x) or combine(*x))
    return calls


@pytest.fixture
def races(monkeypatch):
    """What the race detector kept of each interpreted kernel: by itself it keeps the last one's."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks  # no public way

    kept, make = [], gpu_callbacks.GPURaceDetectionState
    keep = lambda **options: kept.append(make(**options)) or kept[-1]
    monkeypatch.setattr(gpu_callbacks, "GPURaceDetectionState", keep)
    return kept


@pytest.fixture
def no_races(races):
    """No kernel of the test, which interprets some with `detect_races`, may have had a race."""
    yield
    assert races
    assert not any(kernel.races_found for kernel in races)
