"""A run that takes the place of another removes nothing that it learns from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import Completed, kdrun


@pytest.fixture
def folder(tiny_pair: Any, tmp_path: Path) -> Path:
    """A run's folder with a student."""
    folder = tmp_path / "out"
    shutil.copytree(tiny_pair.student, folder / "student")
    (folder / "config.yaml").write_text("{}\n", encoding="utf-8")
    shutil.copy(tiny_pair.rows, folder / "answers.jsonl")
    return folder


def overwrite(pair: Any, folder: Path, **given: object) -> Completed[str]:
    named = {"teacher": pair.teacher, "student": pair.student, "data": pair.rows, **given}
    options = [str(x) for name, value in named.items() for x in (f"--{name}", value)]
    steps = ["--max-length", "128", "--max-steps", "1", "--output", str(folder), "--overwrite"]
    return kdrun(*options, *steps)


def refused(result: Completed[str], folder: Path, before: dict[Path, bytes]) -> str:
    assert result.returncode == 2
    line = result.stderr.strip()
    assert "\n" not in line
    assert "replacing the run in it would remove" in line
    assert contents(folder) == before
    return line


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_f75_the_student_in_the_folder_is_not_removed(tiny_pair: Any, folder: Path) -> None:
    before = contents(folder)
    for more in ({}, {"lora-rank": 2}):
        result = overwrite(tiny_pair, folder, student=folder / "student", **more)
        line = refused(result, folder, before)
        assert f"{folder / 'student'}, which is model.student; choose another folder" in line


def test_f75_the_teacher_and_the_rows_are_not_removed(tiny_pair: Any, folder: Path) -> None:
    before = contents(folder)
    link = folder.parent / "link"
    link.symlink_to(folder)
    result = overwrite(tiny_pair, folder, teacher=link / "student")
    assert "which is model.teacher" in refused(result, folder, before)
    result = overwrite(tiny_pair, folder, data=folder / "answers.jsonl")
    assert "which is data.train" in refused(result, folder, before)


def test_f75_an_adapter_in_the_folder_and_a_base_there_are_not_removed(
    tiny_pair: Any, folder: Path
) -> None:
    adapter = folder.parent / "adapter"
    adapter.mkdir()
    shutil.copy(tiny_pair.student / "tokenizer.json", adapter)
    settings = {"base_model_name_or_path": str(folder / "student"), "peft_type": "LORA"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    before = contents(folder)
    result = overwrite(tiny_pair, folder, student=adapter)
    assert "which is the base model of model.student" in refused(result, folder, before)
    shutil.rmtree(folder / "student")
    shutil.copytree(adapter, folder / "student")
    settings["base_model_name_or_path"] = str(tiny_pair.student)
    (folder / "student" / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    before = contents(folder)
    result = overwrite(tiny_pair, folder, teacher=folder / "student")
    assert "which is model.teacher" in refused(result, folder, before)


def test_a_student_elsewhere_replaces_the_run(tiny_pair: Any, folder: Path) -> None:
    shutil.rmtree(folder / "student")
    assert overwrite(tiny_pair, folder).returncode == 0
    assert (folder / "student" / "model.safetensors").is_file()
