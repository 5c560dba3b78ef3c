"""What a resumed run takes from its folder, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from kdrun.cli import cli
from kdrun.errors import InputError


def test_flags_change_the_runs_own_configuration(
    distil: Callable[..., Path], tiny_pair: Any, tmp_path: Path
) -> None:
    folder = distil(tmp_path / "run")
    arguments = ["--resume", "--output", str(folder), "--max-steps", "3"]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    assert config["model"]["student"] == str(tiny_pair.student)
    assert json.loads((folder / "summary.json").read_text(encoding="utf-8"))["steps"] == 3


def test_another_student_is_refused(
    distil: Callable[..., Path], tiny_pair: Any, tmp_path: Path
) -> None:
    folder = distil(tmp_path / "run")
    other = {"model__student": str(tiny_pair.teacher), "training__max_steps": 3}
    with pytest.raises(InputError, match="checkpoint-2: has weights of other sizes"):
        distil(folder, resume=True, **other)
