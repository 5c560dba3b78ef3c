"""Plain and chunked losses agree for every causal language model of transformers."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import (
    MODEL_CLASSES,
    NOT_BUILDABLE,
    OUTCOMES,
    Finding,
    build,
    describe,
    page,
    rows,
)

import kdlosses
from kdrun.models.heads import FrozenTeacher, call, find_split, install

MODEL_TYPES = tuple(MODEL_CLASSES)
# A decoder in a wrapper, a text model without a prefix, a scale before the head, and a fallback.
QUICK = {"bart", "llama4", "mllama", "minicpm3", "bert"}
FAILURES = {
    "gemma3n": "timm",
    "gemma4_assistant": "hidden_size_per_layer_input",
    "gemma4_unified_assistant": "shared_kv_states",
    "musicgen": "shape",
    "musicgen_melody": "shape",
}
PAGE = Path(__file__).parents[3] / "docs" / "architectures.md"


@pytest.fixture(autouse=True)
def _silent() -> Any:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


def own_logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's own logits; some types take no mask."""
    known = inspect.signature(model.forward).parameters
    inputs = {name: value for name, value in batch.items() if name in known}
    return model(**inputs, use_cache=False).logits


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def cases() -> list[Any]:
    """Every type that can be built; most are slow together."""
    return [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in MODEL_TYPES
        if name not in NOT_BUILDABLE
    ]


@pytest.mark.filterwarnings("ignore")  # those of transformers' own models
@pytest.mark.parametrize("model_type", cases())
def test_plain_and_chunked_agree_and_the_page_says_how(model_type: str) -> None:
    batch = rows()
    labels = torch.nn.functional.pad(batch["input_ids"][:, 1:], (0, 1), value=-100)
    labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    student, teacher = build(model_type, 0), build(model_type, 1)

    plain = kdlosses.KDObjective(kdlosses.get_loss("reverse_kl"), 0.5)
    with torch.no_grad():
        teacher_logits = own_logits(teacher, batch)
    expected = plain(own_logits(student, batch), teacher_logits, labels).loss
    expected.backward()
    wanted = gradients(student)
    student.zero_grad()

    split = find_split(student)
    install(student, split)
    source = FrozenTeacher(teacher, find_split(teacher)).source(**batch)
    loss = kdlosses.get_loss("reverse_kl_chunked", chunk_size=7, compiled=False)
    chunked = kdlosses.KDObjective(loss, 0.5)

    def consume(found: Any) -> dict[str, torch.Tensor]:
        assert isinstance(found, kdlosses.Logits if split.reason else kdlosses.Projected)
        return {"loss": chunked(found, source, labels).loss}

    got = call(student, consume, **batch)["loss"]
    got.backward()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    found = gradients(student)
    assert wanted.keys() == found.keys()
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    assert largest > 1e-3
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5 * largest, msg=name)
    assert describe(model_type, split).row in PAGE.read_text(encoding="utf-8"), (
        f"docs/architectures.md says something else about {model_type}; write it anew"
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", NOT_BUILDABLE)
def test_what_is_not_built_still_fails(model_type: str) -> None:
    with pytest.raises(Exception, match=FAILURES[model_type]):
        own_logits(build(model_type, 0), rows())


def test_the_page_is_what_the_script_writes_of_its_rows() -> None:
    text = PAGE.read_text(encoding="utf-8")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    findings = [
        Finding(model_type, class_name, outcome, detail)
        for outcome, section in zip(OUTCOMES, sections, strict=True)
        for model_type, class_name, detail in re.findall(
            r"^\| `(.+?)` \| `(.+?)` \| (.+) \|$", section, re.MULTILINE
        )
    ]
    assert sorted(f.model_type for f in findings) == sorted(MODEL_TYPES)
    assert all(f.class_name == MODEL_CLASSES[f.model_type] for f in findings)
    assert {f.model_type: f.detail for f in findings if f.outcome == "not built"} == NOT_BUILDABLE
    assert page(findings) == text
