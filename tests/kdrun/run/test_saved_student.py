"""The folder of the trained student: its own settings, and nothing of an earlier student."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdrun.models.load import load_model
from kdrun.models.locate import locate_model

Distil = Callable[..., Path]


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize(
    "more",
    [
        {"training__gradient_checkpointing": True},
        {"lora__rank": 2, "lora__merge": True},
        {"model__dtype": "bfloat16"},
    ],
    ids=["full", "merged", "half"],
)
def test_f19_the_students_settings_are_its_own(
    distil: Distil, tiny_pair: Any, tmp_path: Path, more: dict[str, Any]
) -> None:
    if "lora__rank" in more:
        pytest.importorskip("peft")
    student = tmp_path / "student"
    shutil.copytree(tiny_pair.student, student)
    before = read(student / "config.json") | {"pad_token_id": None, "eos_token_id": 5}
    (student / "config.json").write_text(json.dumps(before), encoding="utf-8")
    assert before["use_cache"] is True
    run = distil(tmp_path / "run", model__student=str(student), training__save_steps=1, **more)
    folders = [run / "student"]
    if "lora__rank" not in more:
        folders.append(run / "checkpoints" / "checkpoint-2")
    for folder in folders:
        after = read(folder / "config.json")
        assert after.get("pad_token_id") is None
        changed = {k for k in before | after if before.get(k) != after.get(k)}
        assert changed <= {"dtype", "transformers_version"}
    settings = read(run / "student" / "generation_config.json")
    assert settings.get("use_cache", True)
    assert settings["eos_token_id"] is not None


def test_f46_a_student_holds_nothing_of_an_earlier_kind(distil: Distil, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    lora = {"lora__rank": 2, "training__save_steps": 1}
    run = distil(tmp_path / "run", lora__merge=True, **lora)
    assert (run / "student" / "model.safetensors").is_file()
    run = distil(tmp_path / "run", resume=True, training__max_steps=6, lora__merge=False, **lora)
    names = {path.name for path in (run / "student").iterdir()}
    assert "adapter_model.safetensors" in names
    assert not {"model.safetensors", "config.json"} & names
    # What is loaded is the student of the last step, adapter and all.
    assert locate_model(run / "student").adapters == (str(run / "student"),)
    weights = load_model(locate_model(run / "student")).state_dict()
    last = load_model(locate_model(run / "checkpoints" / "checkpoint-6")).state_dict()
    assert all(weights[name].equal(last[name]) for name in weights)
    assert not (run / "adapter").exists()
    again = distil(tmp_path / "run", resume=True, training__max_steps=7, lora__merge=True, **lora)
    names = {path.name for path in (again / "student").iterdir()}
    assert "model.safetensors" in names
    assert not [name for name in names if name.startswith("adapter")]
