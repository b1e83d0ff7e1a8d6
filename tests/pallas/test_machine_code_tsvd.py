"""What the assembler makes of the kernels of tiled factors, as in `test_machine_code`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sparsax.pallas.tsvd.shares import large, slabs
from tests.pallas.test_machine_code import SERIALISED, pytestmark  # noqa: F401

KERNELS = {
    "fused": ["fused"],
    "products": ["dhidden", "du", "dv", "dx", "hidden", "out"],
    "resident": ["resident"],
    "split": ["split"],
}


def compiled(rows, size, rank, schedule, *height):
    """What the assembler said."""
    module, root = "tests.pallas.compile_tsvd", Path(__file__).parents[2]
    command = [sys.executable, "-m", module, *map(str, (rows, size, rank, schedule, *height))]
    run = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=300, check=False
    )
    said = run.stdout + run.stderr
    assert run.returncode == 0, said[-2000:]
    return said


@pytest.mark.parametrize(
    ("rows", "size", "rank", "schedule"),
    [(8192, 256, 64, "fused"), (1000, 128, 128, "fused"), (1000, 64, 96, "fused"),
     (8192, 256, 32, "products"), (1000, 128, 48, "products"), (16, 256, 16, "products"),
     (8192, 1024, 64, "resident"), (1000, 512, 64, "resident"),
     (1, 256, 128, "split"), (16, 256, 16, "split"), (64, 512, 64, "split"),
     (1, 256, 64, "split"), (12, 256, 32, "split"), (16, 512, 128, "split")],
)  # fmt: skip
def test_products_overlap_and_registers_do_not_spill(rows, size, rank, schedule):
    said = compiled(rows, size, rank, schedule)
    kernels = set(re.findall(r"Function properties for tsvd_(\w+?)_mosaic", said))
    assert sorted(kernels) == KERNELS[schedule]
    assert not SERIALISED.search(said)
    assert set(re.findall(r"(\d+) bytes spill stores", said)) == {"0"}


@pytest.mark.parametrize("rank", [64, 128])
def test_of_one_row_of_tiles_nothing_spills(rank):
    said = compiled(8192, 256, rank, "resident", 4096)
    assert not SERIALISED.search(said)
    assert set(re.findall(r"(\d+) bytes spill stores", said)) == {"0"}


@pytest.mark.parametrize(("rows", "size", "rank"), [(1, 256, 64), (16, 256, 64), (64, 128, 64)])
def test_two_blocks_for_few_rows_share_the_registers(rows, size, rank):
    """Of 65,536, which warps get in units of 8 a thread; three warpgroups each."""
    (used,) = re.findall(r"Used (\d+) registers", compiled(rows, size, rank, "split"))
    assert not large(rank, size, slabs(rows)[0] * 8)
    assert int(used) <= 80
