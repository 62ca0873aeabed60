"""The driver of ``make test``: its table, and that a failure anywhere is a failure."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import run


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(run, "OUT", tmp_path)
    return tmp_path


def _part(folder: Path, body: str) -> run.Part:
    file = folder / "test_it.py"
    file.write_text(f"import os\ndef test_it():\n    {body}\n")
    # --counts is an option of tests/conftest.py, which is loaded for the first path alone.
    return run.Part("a part", [str(file), "-p", "tests.conftest"], {"MARK": "7"})


@pytest.mark.parametrize(
    ("body", "failed"), [("assert os.environ['MARK'] == '7'", False), ("assert False", True)]
)
def test_a_part_runs(elsewhere: Path, body: str, failed: bool) -> None:
    part = _part(elsewhere, body).run()
    assert part.failed is failed
    assert part.counts == {"failed" if failed else "passed": 1}


def test_a_part_that_dies_is_failed(elsewhere: Path) -> None:
    part = _part(elsewhere, "os._exit(3)").run()
    assert part.failed
    assert not part.counts


def test_the_table_shows_every_part() -> None:
    part = run.Part("one", ["tests"], counts={"passed": 3, "skipped": 1}, failed=True)
    text = run.table([part], ["cuda"])
    assert "FAILED" in text
    assert "compiled, not run" in text
    assert text.splitlines()[1].split()[:5] == ["one", "3", "0", "0", "1"]
