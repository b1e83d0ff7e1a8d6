"""What every test needs before JAX starts, and the switch for tests of bad input."""

import jax
import jaxtyping
import pytest

# Four CPU devices, so that shard_map has something to shard over; one is the default as ever.
jax.config.update("jax_num_cpu_devices", 4)


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` run where there is a Hopper GPU, and are shown as skipped elsewhere."""
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
