"""How many launches XLA makes of attention, without a GPU: as many as the committed results say.

An optional group: `uv run --group machine-code pytest -m machine_code`.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.machine_code,
    pytest.mark.skipif(
        importlib.util.find_spec("jax_cuda13_plugin") is None,
        reason="needs the dependency group machine-code (jax's CUDA plugin)",
    ),
]


def test_attention_launches_as_often_as_the_results_say(tmp_path):
    cases = ["blocks", "shared blocks", "causal", "segments", "blocks of 64"]
    command = [sys.executable, "benchmarks/launches.py", "--lengths", "1024", "4096"]
    command += ["--folder", str(tmp_path), "--cases", *cases]
    run = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    read = lambda path: {
        (row.pop("case"), row.pop("length")): row for row in json.loads(path.read_text())["rows"]
    }
    found = read(tmp_path / "launches.json")
    said = read(ROOT / "benchmarks" / "results" / "launches.json")
    assert len(found) == 2 * len(cases)
    assert found == {key: said[key] for key in found}
