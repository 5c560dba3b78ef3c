"""Runs with a term on hidden states: values, refusals, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdrun.errors import InputError
from kdrun.run.start import open_folder  # noqa: F401  imported before a run changes the console

COSINE = "hidden_cosine:layers=last,weight=0.5"


def lines(folder: Path) -> list[dict[str, float]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [row for row in map(json.loads, text.splitlines()) if "loss" in row]


def test_the_logged_loss_has_the_weighted_term(distil, tmp_path):
    folder = distil(tmp_path / "run", features__spec=COSINE)
    for row in lines(folder):
        mixed = 0.5 * row["class_loss"] + 0.5 * row["kd_loss"]
        assert row["feature_loss"] > 0.1
        assert row["loss"] == pytest.approx(mixed + 0.5 * row["feature_loss"], rel=1e-5)
    saved = load_file(folder / "student" / "model.safetensors")
    assert not any("project" in name for name in saved)
    assert (folder / "checkpoints" / "checkpoint-2" / "projectors.pt").is_file()


def test_the_teacher_is_asked_at_ratio_0(distil, tmp_path):
    folder = distil(tmp_path / "run", features__spec=COSINE, loss__kd_ratio=0)
    row = lines(folder)[0]
    assert "kd_loss" not in row
    assert row["loss"] == pytest.approx(row["class_loss"] + 0.5 * row["feature_loss"], rel=1e-5)
