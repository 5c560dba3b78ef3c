"""TruthfulQA's multiple-choice questions from a file, for the tasks beside this module."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import datasets
import yaml
from lm_eval.utils import apply_template


def load(data_file: str | None = None, **rest: Any) -> dict[str, datasets.Dataset]:
    """The questions as lm-eval's own tasks have them, with choices and labels as lists.

    Args:
        data_file: a JSON list of objects with ``question``, ``mc1_targets`` and ``mc2_targets``,
            the targets from answers to 1 (true) or 0.
        **rest: of the task's metadata; not needed.

    Raises:
        ValueError: no file was named.
    """
    if data_file is None:
        raise ValueError("name the file of questions with --task-data")
    rows = json.loads(Path(data_file).read_text(encoding="utf-8-sig"))
    return {"validation": datasets.Dataset.from_list([_question(row) for row in rows])}


def _question(row: dict[str, Any]) -> dict[str, Any]:
    targets = {
        name: {"choices": list(row[name]), "labels": list(row[name].values())}
        for name in ("mc1_targets", "mc2_targets")
    }
    return {"question": row["question"], **targets}


def prompt(doc: dict[str, Any]) -> str:
    """The question behind lm-eval's own examples, so that scores can be compared with its."""
    task = files("lm_eval.tasks.truthfulqa") / "truthfulqa_mc1.yaml"
    template: str = yaml.safe_load(task.read_text(encoding="utf-8"))["doc_to_text"]
    text: str = apply_template(template, doc)
    return text


def first_true(doc: dict[str, Any]) -> int:
    """The right answer of mc1, which has exactly one."""
    place: int = doc["mc1_targets"]["labels"].index(1)
    return place


def share_of_true(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """mc2: the probability of the true answers among all of a question."""
    import torch

    logs = torch.tensor([log for log, _ in results], dtype=torch.float64)
    labels = torch.tensor(doc["mc2_targets"]["labels"], dtype=torch.float64)
    return {"acc": float(logs.softmax(0) @ labels)}
