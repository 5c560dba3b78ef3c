"""Token weights, losses on hidden states, the teacher's own prompt and procedures in one run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cut_runs import cut_back

pytestmark = pytest.mark.slow
ROWS = [
    {"prompt": "question " * n, "response": f"the answer {n} " * 2, "hint": "ask the user " * m}
    for n, m in ((1, 4), (3, 1), (2, 6), (5, 2))
]
WEIGHT = {
    "token_weight__spec": "top_entropy:rate=2",
    "token_weight__on": "both",
    "token_weight__normalize": "running",
}
GKD = {"procedure__spec": "gkd:lambda=0.5", "procedure__max_new_tokens": 6}
VIEW = {
    "data__teacher_context_field": "hint",
    "data__teacher_template": "{context} {prompt}",
    "data__teacher_max_length": 256,
}
FEATURES = {"features__spec": "hidden_cosine:layers=last,weight=0.5"}
AXES: dict[str, dict[str, Any]] = {
    "weight, features": {**WEIGHT, **FEATURES},
    "weight, features, gkd": {**WEIGHT, **FEATURES, **GKD},
    "weight, prompt, gkd": {**WEIGHT, **VIEW, **GKD},
    "weight, prompt, self, mean, gkd": {
        **WEIGHT,
        **VIEW,
        **GKD,
        "model__teacher": "self",
        "model__teacher_ema": 0.9,
    },
}


def lines(folder: Path) -> list[dict[str, float]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    found = [row for row in map(json.loads, text.splitlines()) if "loss" in row]
    return [{k: x for k, x in row.items() if "second" not in k} for row in found]


@pytest.mark.parametrize("axes", AXES)
def test_a_resumed_run_ends_with_the_same_bits(
    distil: Callable[..., Path], tmp_path: Path, still_student: Path, axes: str
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    settings = {
        "data__train": str(rows),
        "data__eval": str(rows),
        "training__max_steps": 4,
        "training__save_steps": 2,
        "training__logging_steps": 1,
        **({"model__student": str(still_student)} if "self" in axes else {}),
        **AXES[axes],
    }
    whole = distil(tmp_path / "whole", **settings)
    again = distil(cut_back(whole, tmp_path / "cut"), resume=True, **settings)
    assert lines(whole) == lines(again)
    assert len(lines(whole)) == 4
    for line in lines(whole):
        assert 0 <= line["token_weight_share"] <= 1
        assert ("feature_loss" in line) == ("features" in axes)
    assert lines(whole)[3]["weight.threshold"] > 0
    students = [(folder / "student").glob("*.safetensors") for folder in (whole, again)]
    for one, two in zip(*map(sorted, students), strict=True):
        assert one.read_bytes() == two.read_bytes()
