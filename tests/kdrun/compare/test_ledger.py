"""The folder of a comparison: atomic records, locks, and what is done with edited files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kdrun.compare.ledger import Ledger
from kdrun.compare.record import Arm, Record, Trial
from kdrun.errors import InputError

ARM = Arm(loss="forward_kl", kd_ratio=0.5, lr=1e-3, teacher="builtin", student="builtin")


def record(seed: int) -> Record:
    trial = Trial(arm=ARM, seed=seed)
    return Record(id=trial.identity("s"), trial=trial, status="done", measures={"ce": 1.5})


def test_records_come_back_and_a_half_written_one_does_not_count(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "c")
    ledger.add(record(0))
    ledger.add(record(1))
    (tmp_path / "c/records/.half.json.partial").write_text("{", encoding="utf-8")
    ledger.declare({"shared": {}})
    again = Ledger(tmp_path / "c")
    assert sorted(r.trial.seed for r in again.records()) == [0, 1]
    assert again.has(record(0).id)
    assert not again.has(record(2).id)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"id": "x"}'])
def test_an_edited_record_is_named(tmp_path: Path, text: str) -> None:
    ledger = Ledger(tmp_path)
    path = tmp_path / "records" / f"{record(0).id}.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=rf"{record(0).id}.json: not the record of a trial"):
        ledger.records()


def test_a_record_with_nan_in_its_curves_comes_back(tmp_path: Path) -> None:
    diverged = record(0).model_copy(
        update={"status": "diverged", "curves": [{"step": 1, "loss": float("nan")}]}
    )
    ledger = Ledger(tmp_path)
    ledger.add(diverged)
    (found,) = ledger.records()
    assert found.checksum == found.digest()
    assert found.curves == [{"step": 1, "loss": None}]


def test_a_record_under_another_name_is_refused(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.add(record(0))
    (tmp_path / "records" / f"{record(0).id}.json").rename(tmp_path / "records" / "other.json")
    with pytest.raises(InputError, match="contains the record of"):
        ledger.records()


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match="is not empty and contains no comparison"):
        Ledger(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        Ledger(tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_settings_that_are_no_settings(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.settings() is None
    (tmp_path / "comparison.yaml").write_text("- a", encoding="utf-8")
    with pytest.raises(InputError, match="was the file edited"):
        ledger.settings()
    (tmp_path / "comparison.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(InputError, match="not valid YAML"):
        ledger.settings()


HOLD = """
import sys
from pathlib import Path
from kdrun.compare.ledger import Ledger
with Ledger(Path(sys.argv[1])).claim("trial") as mine:
    print(mine, flush=True)
    sys.stdin.read()
"""


def test_a_trial_is_held_by_one_process_and_free_when_that_is_killed(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.declare({"shared": {}})
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        with ledger.claim("trial") as mine:
            assert not mine
        with ledger.claim("another") as mine:
            assert mine
        other.kill()
    with ledger.claim("trial") as mine:
        assert mine
    ledger.add(record(0))
    with ledger.claim(record(0).id) as mine:
        assert not mine  # it has ended
