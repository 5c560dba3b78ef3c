"""``training.torch_compile``: the same training, through compiled graphs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

Distil = Callable[..., Path]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture
def student(tiny_tokenizer: Any, tmp_path: Path) -> Path:
    """One layer without dropout, whose random numbers would be others in a compiled graph."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "student")
    tiny_tokenizer.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_compiled_student_takes_the_same_steps(
    distil: Distil, student: Path, tmp_path: Path
) -> None:
    from torch._dynamo.utils import counters

    given = {"model__student": str(student)}
    plain = distil(tmp_path / "plain", **given)
    counters.clear()
    compiled = distil(tmp_path / "compiled", training__torch_compile=True, **given)
    assert counters["stats"]["unique_graphs"] > 0
    first, second = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
        for run in (plain, compiled)
    )
    first, second = ([x for x in lines if "loss" in x] for lines in (first, second))
    for ours, theirs in zip(second, first, strict=True):
        assert ours["step"] == theirs["step"]
        for key in ("loss", "class_loss", "kd_loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), key
    one, other = (load_file(run / "student" / "model.safetensors") for run in (plain, compiled))
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert (other[name] - weight).abs().max() < 1e-3, name
