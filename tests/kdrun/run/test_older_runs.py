"""A run that an earlier version began goes on to the student that the earlier version made of it.

The fixture was written before kdrun was divided into wings: eight steps with a loss that carries
state, cut off after the fourth; and the student that those eight steps gave.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from kdrun.cli import cli

FIXTURE = Path(__file__).parents[2] / "fixtures" / "old-run"


def run(*arguments: object) -> None:
    done = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0, done.output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_checkpoint_of_an_earlier_version_is_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    run("--resume", "--output", "run")
    assert json.loads(Path("run/summary.json").read_text(encoding="utf-8"))["steps"] == 8
    expected = load_file("trained.safetensors")
    found = weights(Path("run/student"))
    assert found.keys() == expected.keys()
    # Another processor rounds otherwise; whether this one does shows in the first four steps.
    old = weights(FIXTURE / "run" / "checkpoints" / "checkpoint-4")
    run("--config", "run/config.yaml", "--max-steps", 8, "--output", "again")
    new = weights(Path("again/checkpoints/checkpoint-4"))
    alike = all(torch.equal(new[name], old[name]) for name in old)
    for name, tensor in expected.items():
        if alike:
            assert torch.equal(found[name], tensor), name
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)
