"""Trackers: what reaches TensorBoard's own files, and what is refused before anything loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kdrun.cli import cli
from kdrun.errors import InputError
from kdrun.run.trackers import _PACKAGES, check_tracker

Distil = Callable[..., Path]


@pytest.mark.filterwarnings("default")  # of what tensorboard imports
def test_tensorboard_reads_the_figures_of_the_run(
    distil: Distil, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.chdir(tmp_path)
    run = distil(tmp_path / "run", training__report_to="tensorboard", training__eval_steps=2)
    events = reader.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    logged = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [line for line in map(json.loads, logged) if "loss" in line]
    for key in ("loss", "kd_loss", "grad_norm", "supervised_tokens_per_second"):
        found = [(event.step, event.value) for event in events.Scalars(f"train/{key}")]
        assert [step for step, _ in found] == [line["step"] for line in lines]
        assert [value for _, value in found] == pytest.approx([line[key] for line in lines])
    assert [event.step for event in events.Scalars("eval/forward_kl")] == [0, 2]
    assert {path.name for path in tmp_path.iterdir()} == {"run"}, "nothing beside the run's folder"


def refused(*arguments: str) -> str:
    with pytest.raises(InputError) as caught:
        CliRunner().invoke(cli, list(arguments), catch_exceptions=False)
    return str(caught.value)


def test_unknown_and_missing_trackers_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "did you mean 'tensorboard'?" in refused("--report-to", "tensorbord")
    assert "known: tensorboard, wandb" in refused("--report-to", "paper")
    monkeypatch.setattr("kdrun.run.trackers.find_spec", lambda name: None)
    assert "pip install wandb, or pass --report-to none" in refused("--report-to", "wandb")
    assert not list(tmp_path.iterdir())
    check_tracker("none")


def test_every_tracker_is_one_of_transformers() -> None:
    from transformers.integrations import integration_utils

    known: dict[str, Any] = integration_utils.INTEGRATION_TO_CALLBACK
    assert set(_PACKAGES) <= set(known)


def test_deepspeed_is_refused_and_says_what_takes_its_place(tmp_path: Path) -> None:
    line = refused("--set", "training.deepspeed=zero3.json", "--output", str(tmp_path / "run"))
    assert "training.fsdp=true" in line
    assert not (tmp_path / "run").exists()
