"""Runs with a loss from a file: what they record, and what they refuse when it has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kdrun.errors import InputError
from kdrun.run.folder import choose_folder

TEXT = '''
from kdlosses import Divergence


class Squares(Divergence):
    """Squared distance, sum (p - q)^2.

    Reference: none.
    """

    def integrand(self, teacher_log_probs, student_log_probs):
        return (teacher_log_probs.exp() - student_log_probs.exp()) ** 2
'''
GIVEN = {"loss__spec": "my_loss.py:Squares_chunked", "loss__compiled": False}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_loss.py").write_text(TEXT, encoding="utf-8")
    return tmp_path / "my_loss.py"


def test_a_run_records_the_file_and_goes_on_only_with_it(
    distil: Callable[..., Path], file: Path, tmp_path: Path
) -> None:
    folder = distil(tmp_path / "run", **GIVEN)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(TEXT.encode()).hexdigest()
    assert summary["loss_files"] == {"my_loss.py": digest}
    file.write_text(TEXT + "# edited\n", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        distil(folder, resume=True, training__max_steps=3, **GIVEN)
    assert str(caught.value) == (
        "--resume: my_loss.py was changed after the run began, so my_loss.py:Squares_chunked is "
        "another loss; restore the file, or start a new run from the student "
        f"(--student {folder})"
    )
    file.write_text(TEXT, encoding="utf-8")
    distil(folder, resume=True, training__max_steps=3, **GIVEN)
    assert json.loads((folder / "summary.json").read_text(encoding="utf-8"))["steps"] == 3


def test_a_file_that_is_missing_is_told_before_anything_is_written(
    distil: Callable[..., Path], file: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"there is no file my_los\.py, did you mean"):
        distil(tmp_path / "run", loss__spec="my_los.py:Squares")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_the_folder_is_named_by_file_and_class(tmp_path: Path) -> None:
    chosen = choose_folder(None, "some/where/my_loss.py:Squares_chunked:weight=2")
    assert chosen.parent == Path("runs")
    assert chosen.name.endswith("-my_loss-Squares_chunked")


def test_another_registered_loss_records_no_file(
    distil: Callable[..., Path], tmp_path: Path
) -> None:
    folder = distil(tmp_path / "run")
    assert "loss_files" not in json.loads((folder / "summary.json").read_text(encoding="utf-8"))
