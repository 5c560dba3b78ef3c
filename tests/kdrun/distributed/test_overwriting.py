"""Several processes that write into one folder: one of them does, and the others wait."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import overwriter
import pytest
import transformers
from commands import script_in_processes

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_r1_r4_four_processes_replace_a_run_twenty_times(tiny_pair: Any, tmp_path: Path) -> None:
    """The teacher's weights lie on the device of the process's rows in all of them."""
    folder = tmp_path / "run"
    config = {
        "model": {"teacher": str(tiny_pair.teacher), "student": str(tiny_pair.student)},
        "data": {"train": str(tiny_pair.rows), "max_length": 64, "cache_dir": "none"},
        "loss": {"spec": "forward_kl_chunked", "compiled": False},
        "training": {"max_steps": 2, "batch_size": 1, "save_steps": 1, "save_total_limit": 1},
        "output": {"dir": str(folder)},
    }
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(config), encoding="utf-8")
    for done in script_in_processes(4, overwriter.__file__, settings, 20):
        assert done.returncode == 0, done.stderr[-4000:]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == 2
    (kept,) = (folder / "checkpoints").glob("checkpoint-*")
    assert kept.name == "checkpoint-2"
    names = {path.name for path in kept.iterdir()}
    assert {"complete", *(f"rng_state_{rank}.pth" for rank in range(4))} <= names
    assert not any(path.name.endswith(".partial") for path in folder.rglob("*"))
    transformers.AutoModelForCausalLM.from_pretrained(folder / "student")
