"""What the assembler makes of the kernels of tiled factors, as in `test_machine_code`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pallas.test_machine_code import SERIALISED, pytestmark  # noqa: F401

KERNELS = {
    "fused": ["fused"],
    "products": ["dhidden", "du", "dv", "dx", "hidden", "out"],
    "resident": ["resident"],
    "shared": ["shared"],
    "split": ["split"],
}


@pytest.mark.parametrize(
    ("rows", "size", "rank", "schedule", "height"),
    [(8192, 256, 64, "fused", ()), (1000, 128, 128, "fused", ()), (1000, 64, 96, "fused", ()),
     (8192, 256, 32, "products", ()), (1000, 128, 48, "products", ()),
     (16, 256, 16, "products", ()), (8192, 1024, 64, "resident", ()),
     (1000, 512, 64, "resident", ()), (8192, 256, 64, "resident", (4096,)),
     (8192, 256, 128, "resident", (4096,)), (1, 256, 128, "split", ()),
     (16, 256, 16, "split", ()), (64, 512, 64, "split", ()),
     (8192, 128, 64, "shared", (4096,)), (8192, 128, 16, "shared", (4096,)),
     (8192, 256, 64, "shared", (4096,)), (1000, 128, 128, "shared", (768,)),
     (1000, 128, 16, "shared", (768,))],
)  # fmt: skip
def test_products_overlap_and_registers_do_not_spill(rows, size, rank, schedule, height):
    module, root = "tests.pallas.compile_tsvd", Path(__file__).parents[2]
    command = [sys.executable, "-m", module, *map(str, (rows, size, rank, schedule, *height))]
    run = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=300, check=False
    )
    said = run.stdout + run.stderr
    assert run.returncode == 0, said[-2000:]
    kernels = set(re.findall(r"Function properties for tsvd_(\w+?)_mosaic", said))
    assert sorted(kernels) == KERNELS[schedule]
    assert not SERIALISED.search(said)
    assert set(re.findall(r"(\d+) bytes spill stores", said)) == {"0"}
