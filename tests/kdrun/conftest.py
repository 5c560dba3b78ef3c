"""A tiny pair of models with real rows, for runs inside the process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside the tests

from pair_configs import tiny_llama

WORDS = "the user asks the assistant a question and the assistant gives an answer"


@dataclass(frozen=True)
class TinyPair:
    """Folders of a teacher and a student, and a file of rows."""

    teacher: Path
    student: Path
    rows: Path


@pytest.fixture(scope="session")
def tiny_pair(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> TinyPair:
    folder = tmp_path_factory.mktemp("tiny-pair")
    for name, width, seed in (("teacher", 32, 0), ("student", 16, 1)):
        tiny_llama(len(tiny_tokenizer), width, seed, attention_dropout=0.1).save_pretrained(
            folder / name
        )
        tiny_tokenizer.save_pretrained(folder / name)
    rows = folder / "rows.jsonl"
    with open(rows, "w", encoding="utf-8") as stream:
        for i in range(40):
            prompt, response = WORDS[: 8 + i % 40], WORDS[i % 50 :]
            stream.write(json.dumps({"prompt": f"{i} {prompt}", "response": response}) + "\n")
    return TinyPair(folder / "teacher", folder / "student", rows)


@pytest.fixture
def still_student(tiny_tokenizer: Any, tmp_path: Path) -> Path:
    """A student without dropout, whose draws would be others in a compiled graph."""
    folder = tmp_path / "still"
    tiny_llama(len(tiny_tokenizer), 16, 1).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def distil(tiny_pair: TinyPair) -> Callable[..., Path]:
    """Runs kdrun's ``distill`` on the tiny pair; keys are given as ``section__key=value``."""
    import io

    from rich.console import Console

    from kdrun.run.distill import distill

    def run(
        folder: Path, said: list[str] | None = None, resume: bool = False, **given: Any
    ) -> Path:
        config: dict[str, dict[str, Any]] = {
            "model": {"teacher": str(tiny_pair.teacher), "student": str(tiny_pair.student)},
            "data": {"train": str(tiny_pair.rows), "max_length": 128},
            "loss": {"spec": "forward_kl_chunked", "compiled": False},
            "optimizer": {"lr": 1e-2},
            "training": {"max_steps": 2, "batch_size": 4, "logging_steps": 1},
            "output": {"dir": str(folder)},
        }
        for key, value in given.items():
            section, _, field = key.partition("__")
            config.setdefault(section, {})[field] = value
        output = io.StringIO()
        try:
            console = Console(file=output, width=10_000)
            return distill(config, resume=resume, console=console).folder
        finally:
            if said is not None:
                said += output.getvalue().splitlines()

    return run
