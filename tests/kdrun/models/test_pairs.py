"""The pair that a run works with."""

from __future__ import annotations

import pytest
import torch

from kdrun.config.sections import ModelConfig
from kdrun.models.pairs import find_pair, load_student, load_teacher


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_type_of_the_weights_holds_for_the_built_in_pair_too(dtype: str) -> None:
    config = ModelConfig(teacher="builtin", student_dtype=dtype, teacher_dtype=dtype)  # type: ignore[arg-type]
    pair = find_pair(config)
    student, teacher = load_student(pair, config, seed=0), load_teacher(pair, config)
    assert teacher is not None
    for model in (student, teacher):
        assert {weight.dtype for weight in model.parameters()} == {getattr(torch, dtype)}


def test_a_student_in_16_bits_begins_as_the_one_in_32() -> None:
    models = [
        load_student(find_pair(config), config, seed=3)
        for config in (ModelConfig(), ModelConfig(student_dtype="bfloat16"))
    ]
    full, half = (dict(model.named_parameters()) for model in models)
    for name, weight in full.items():
        assert torch.equal(weight.to(torch.bfloat16), half[name])
