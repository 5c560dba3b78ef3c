"""Gradients of cross-entropy and of the loss apart: they make up the step, and change nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

Distil = Callable[..., Path]


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [line for line in map(json.loads, text.splitlines()) if "loss" in line]


@pytest.fixture
def student(tiny_pair: Any, tmp_path: Path) -> str:
    """With dropout, which the parts must share with the step."""
    import shutil

    folder = tmp_path / "student"
    shutil.copytree(tiny_pair.student, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.2}))
    return str(folder)


@pytest.mark.parametrize("loss", ["reverse_kl", "skew_forward_kl_chunked"])
def test_they_add_up_to_the_steps_own_gradient(
    distil: Distil, student: str, tmp_path: Path, loss: str
) -> None:
    """|(1 - r) a + r b|^2 from the two norms and the cosine is the square of grad_norm."""
    folder = distil(
        tmp_path / "run",
        model__student=student,
        loss__spec=loss,
        loss__kd_ratio=0.3,
        loss__compiled=False if loss.endswith("_chunked") else None,
        training__gradient_parts=True,
        training__gradient_accumulation_steps=2,
        training__max_steps=3,
    )
    found = lines(folder)
    assert len(found) == 3
    for line in found:
        of_class, of_kd = 0.7 * line["class_grad_norm"], 0.3 * line["kd_grad_norm"]
        squared = of_class**2 + of_kd**2 + 2 * of_class * of_kd * line["grad_cosine"]
        assert math.sqrt(squared) == pytest.approx(line["grad_norm"], rel=1e-4)
        assert -1 < line["grad_cosine"] < 1


def test_they_change_nothing(distil: Distil, student: str, tmp_path: Path) -> None:
    given = {"model__student": student, "training__max_steps": 4, "training__logging_steps": 2}
    with_them = distil(tmp_path / "with", training__gradient_parts=True, **given)
    without = distil(tmp_path / "without", **given)
    ours, theirs = (load_file(run / "student/model.safetensors") for run in (with_them, without))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [line["step"] for line in lines(with_them) if "grad_cosine" in line] == [2, 4]
    assert not any("kd_grad_norm" in line for line in lines(without))
    settings = yaml.safe_load((with_them / "config.yaml").read_text(encoding="utf-8"))
    assert settings["training"]["gradient_parts"] is True


def test_without_a_teacher_there_is_one_part(
    distil: Distil, tiny_pair: Any, tmp_path: Path
) -> None:
    folder = distil(
        tmp_path / "run", model__teacher=None, loss__kd_ratio=0.0, training__gradient_parts=True
    )
    for line in lines(folder):
        assert line["class_grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-4)
        assert "kd_grad_norm" not in line


def test_on_the_students_own_text_there_is_no_class_part(distil: Distil, tmp_path: Path) -> None:
    folder = distil(
        tmp_path / "run",
        procedure__spec="gkd:lambda=1",
        procedure__max_new_tokens=8,
        training__gradient_parts=True,
    )
    for line in lines(folder):
        assert line["class_grad_norm"] == 0
        assert 0.5 * line["kd_grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-4)
        assert "grad_cosine" not in line
