"""What every test needs before JAX starts, and the switch for tests of bad input."""

import gc
import os

# Threads of XLA's pool. Of an interpreted kernel each thread that waits at a barrier holds one, and
# who called the kernel another: with as few as the machine has cores they can wait for ever.
os.environ.setdefault("NPROC", "8")

import jax
import jaxtyping
import pytest

# Four CPU devices, so that shard_map has something to shard over; one is the default as ever.
jax.config.update("jax_num_cpu_devices", 4)


def pytest_addoption(parser):
    parser.addoption("--cells", type=int, help="run at most this many cells of every test function")


def spread(cells: list, count: int) -> list:
    """So many of the cells, the first and the last among them, the others evenly between."""
    if len(cells) <= count:
        return cells
    return [cells[i * (len(cells) - 1) // max(count - 1, 1)] for i in range(count)]


def pytest_collection_finish():
    """What is imported lives to the end: collections need not look at it, nor come as often."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.hookimpl(trylast=True)  # after `-k` and `-m`
def pytest_collection_modifyitems(config, items):
    """Leaves out what `--cells` says, and skips tests marked `gpu` where there is no Hopper GPU."""
    if count := config.getoption("cells"):
        functions = {}
        for item in items:
            functions.setdefault(item.nodeid.split("[")[0], []).append(item)
        kept = {item for cells in functions.values() for item in spread(cells, count)}
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]
    if getattr(jax.devices()[0], "compute_capability", None) == "9.0":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA Hopper GPU"))


@pytest.fixture
def unchecked():
    """Turns jaxtyping off, as it is for users: a wrong argument then meets our own error."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
