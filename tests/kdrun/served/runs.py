"""Runs of the command in this process, and what they leave."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdrun.cli import main
from kdrun.errors import STOPPING

QUICK = [
    *("--loss", "forward_kl_chunked", "--max-length", "128", "--batch-size", "4"),
    *("--set", "loss.compiled=false", "--set", "training.logging_steps=1"),
    *("--set", "served.timeout=10", "--set", "served.patience=0.6"),
]
TOP_K = ["--set", "served.form=top_k", "--set", "served.top_k=8"]


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str]]:
    """The exit code of a command, and the lines that it printed."""
    handlers = {one: signal.getsignal(one) for one in STOPPING}
    argv, sys.argv = sys.argv, ["kdrun", *map(str, arguments)]
    capsys.readouterr()
    try:
        main()
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    return code, (out + err).splitlines()


def start(pair: Any, address: str, folder: Path, *more: object) -> list[object]:
    """The arguments of a run."""
    models = ("--teacher", address, "--student", pair.student, "--data", pair.rows)
    return [*models, *QUICK, "--output", folder, *more]


def student(folder: Path) -> dict[str, torch.Tensor]:
    """The trained weights of a finished run."""
    return load_file(folder / "student" / "model.safetensors")


def same_student(one: Path, other: Path) -> bool:
    ours, theirs = student(one), student(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def steps(folder: Path) -> list[dict[str, Any]]:
    """The lines of the training log, without measured times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("per_second", "runtime")
    return [{k: v for k, v in line.items() if not any(t in k for t in timed)} for line in lines]


def checkpoints(folder: Path) -> list[int]:
    found = (folder / "checkpoints").glob("checkpoint-*/complete")
    return sorted(int(one.parent.name[11:]) for one in found)
