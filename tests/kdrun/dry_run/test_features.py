"""The memory of a term on hidden states, against what its evaluation allocates."""

from __future__ import annotations

import pytest
import torch

from kdlosses import Hidden, get_features
from kdrun.config.load import validate
from kdrun.dry_run.features import feature_bytes
from kdrun.dry_run.loss_memory import PeakMemory
from kdrun.dry_run.report import dry_run
from kdrun.losses.features import plan_features

ROWS, LENGTH = 4, 256


@pytest.mark.parametrize("pairs", [1, 6])
@pytest.mark.parametrize(
    ("name", "width"), [("hidden_cosine", 96), ("hidden_cosine", 192), ("token_relation", 192)]
)
def test_the_estimate_is_near_the_peak(name: str, width: int, pairs: int) -> None:
    layers = ",".join(f"{number}-{number}" for number in range(1, pairs + 1))
    spec = f"{name}:layers={layers}"
    teacher, student = Hidden(6, width), Hidden(6, 96)
    config = validate(
        {
            "features": {"spec": spec, "chunk_size": 128},
            "model": {"teacher_dtype": "bfloat16", "student_dtype": "bfloat16"},
        }
    )
    plan = plan_features(spec, teacher, student)
    estimate = feature_bytes(plan, config, teacher, student, ROWS, LENGTH, item_size=2)

    term = get_features(spec, teacher, student, chunk_size=128)
    tokens = ROWS * LENGTH
    sides = [
        [torch.ones(tokens, shape.width, dtype=torch.bfloat16) for _ in range(pairs)]
        for shape in (teacher, student)
    ]
    for states in sides[1]:
        states.requires_grad_()
    ids = torch.arange(ROWS).repeat_interleave(LENGTH)
    with PeakMemory() as measured:
        term(*sides, tokens, ids)[0].backward()
    given = pairs * tokens * width * 2
    # Three more values of each weight of a projector are in the optimiser or are the weight.
    weights = sum(weight.numel() for weight in term.parameters())
    peak = measured.peak + given + 3 * 4 * weights
    assert 0.6 * peak <= estimate <= 1.7 * peak


def test_a_dry_run_names_the_part(tiny_pair) -> None:
    given = {
        "model": {"teacher": str(tiny_pair.teacher), "student": str(tiny_pair.student)},
        "data": {"train": str(tiny_pair.rows), "max_length": 64},
        "training": {"max_steps": 1},
    }
    without = dry_run(validate(given), "cpu")
    found = dry_run(validate(given | {"features": {"spec": "hidden_mse"}}), "cpu")
    assert "features" not in without.memory
    part = found.memory["features"]
    assert part is not None
    assert found.total == without.total + part
    assert part > 2 * 16 * 32 * 16  # two projectors of 16 x 32 with gradient and optimiser
