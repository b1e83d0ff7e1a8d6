"""Every report is written from the results that are committed."""

import importlib
import sys
from pathlib import Path

import pytest

REPORTS = sorted((Path(__file__).parents[1] / "benchmarks").glob("report_*.py"))


@pytest.mark.parametrize("name", [path.stem for path in REPORTS])
def test_report_is_written_from_what_is_committed(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, "--docs", str(tmp_path)])
    importlib.import_module(name).main()
    written = list(tmp_path.glob("*.md"))
    assert written
    for path in written:
        committed = REPORTS[0].parents[1] / "docs" / path.name
        assert path.read_text() == committed.read_text(), f"run benchmarks/{name}.py again"
