"""Checkpoints that are quantised already: their exact values, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pair_configs import tiny_llama
from safetensors.torch import load_file
from stored import say_quantised, to_bitsandbytes, to_compressed_tensors, to_fp8, to_mxfp4

from kdrun.cache.fingerprint import print_teacher
from kdrun.config.load import load_config
from kdrun.config.sections import ModelConfig
from kdrun.dry_run.report import dry_run
from kdrun.errors import InputError
from kdrun.models.heads import find_split
from kdrun.models.load import load_model
from kdrun.models.locate import ModelSource, locate_model
from kdrun.models.pairs import find_pair, load_student, load_teacher
from kdrun.models.stored import check_plain, check_stored, stored_method

Distil = Callable[..., Path]
# What the packages ask of torch 2.13 while they are imported.
pytestmark = pytest.mark.filterwarnings("default")
IDS = torch.arange(3, 60).unsqueeze(0)


def needs(package: str) -> Any:
    return pytest.mark.skipif(
        find_spec(package) is None, reason=f"the package {package} is not installed"
    )


def make(folder: Path, tokenizer: Any, kind: str = "llama") -> Path:
    if kind == "llama":
        model = tiny_llama(len(tokenizer), 128, 0)
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.all_tied_weights_keys = {}
    else:
        torch.manual_seed(0)
        config = transformers.GptOssConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            num_local_experts=4,
            num_experts_per_tok=2,
            layer_types=["sliding_attention", "full_attention"],
            initializer_range=0.1,
        )
        model = transformers.GptOssForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


METHODS = [
    pytest.param("fp8", "llama", to_fp8, id="fp8"),
    pytest.param("mxfp4", "gpt_oss", to_mxfp4, id="mxfp4"),
    pytest.param(
        "compressed-tensors",
        "llama",
        to_compressed_tensors,
        id="compressed-tensors",
        marks=needs("compressed_tensors"),
    ),
    pytest.param(
        "bitsandbytes",
        "llama",
        to_bitsandbytes,
        id="bitsandbytes",
        marks=needs("bitsandbytes"),
    ),
]
UNDONE = METHODS[:3]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


@pytest.mark.parametrize(("method", "kind", "store"), METHODS)
def test_a_teacher_has_the_stored_values(
    method: str, kind: str, store: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    folder = make(tmp_path / "model", tiny_tokenizer, kind)
    full = load_model(locate_model(folder))
    original = logits(full)
    values = store(folder)
    full.load_state_dict(values)
    assert stored_method(locate_model(folder)) == method
    note = check_stored(locate_model(folder))
    assert note is not None
    assert method in note
    config = ModelConfig(teacher=str(folder))
    model = load_teacher(find_pair(ModelConfig(teacher=str(folder), student=str(folder))), config)
    assert model is not None
    first = print_teacher(model)
    assert find_split(model).reason is None
    torch.testing.assert_close(logits(model), logits(full), rtol=1e-4, atol=1e-4)
    assert (logits(model) - original).abs().max() > 1e-3
    assert print_teacher(model) == first, "no forward pass changes the weights"


@pytest.mark.parametrize(("method", "kind", "store"), UNDONE)
def test_a_student_is_dequantised_and_saved_as_a_plain_model(
    method: str, kind: str, store: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    folder = make(tmp_path / "model", tiny_tokenizer, kind)
    values = store(folder)
    config = ModelConfig(student=str(folder), teacher=str(folder))
    student = load_student(find_pair(config), config, seed=0)
    for name, weight in student.named_parameters():
        assert weight.requires_grad
        torch.testing.assert_close(weight.detach(), values[name], rtol=0, atol=1e-6)
    student.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    again = load_model(locate_model(tmp_path / "saved"))
    assert torch.equal(logits(again), logits(student))


@pytest.mark.parametrize(("method", "kind", "store"), METHODS)
def test_a_run_distils_it(
    distil: Distil, method: str, kind: str, store: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    folder = make(tmp_path / "model", tiny_tokenizer, kind)
    store(folder)
    said: list[str] = []
    run = distil(tmp_path / "run", said, model__teacher=str(folder))
    found = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert found["after"]["eval_forward_kl"] < found["before"]["eval_forward_kl"]
    assert any(f"quantised by {method}" in line for line in said)
    # The record of the run knows the teacher's weights.
    distil(run, resume=True, model__teacher=str(folder), training__max_steps=3)


def test_a_run_trains_a_student_that_was_quantised(
    distil: Distil, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    folder = make(tmp_path / "model", tiny_tokenizer)
    values = to_fp8(folder)
    run = distil(tmp_path / "run", model__student=str(folder))
    after = load_file(run / "student" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert after[name].dtype == torch.float32
    assert not torch.equal(after[name], values[name])
    torch.testing.assert_close(after[name], values[name], rtol=0, atol=0.1)


@needs("peft")
@needs("bitsandbytes")
def test_adapters_above_an_undone_base_are_merged(
    distil: Distil, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    folder = make(tmp_path / "model", tiny_tokenizer)
    to_fp8(folder)
    given = {"model__student": str(folder), "lora__rank": 2}
    for quantization in (None, "nf4"):
        run = distil(tmp_path / str(quantization), lora__quantization=quantization, **given)
        assert torch.isfinite(logits(load_model(locate_model(run / "student")))).all()


@pytest.mark.parametrize(
    ("method", "package"),
    [
        ("gptq", "optimum"),
        ("awq", "gptqmodel"),
        ("compressed-tensors", "compressed-tensors"),
        ("bitsandbytes", "bitsandbytes"),
    ],
)
def test_a_missing_package_is_named_before_weights_are_read(
    tiny_pair: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    package: str,
) -> None:
    monkeypatch.setattr("kdrun.models.stored.find_spec", lambda name: None)
    folder = tmp_path / "model"
    shutil.copytree(tiny_pair.teacher, folder)
    say_quantised(folder, quant_method=method)
    (folder / "model.safetensors").write_bytes(b"not read")
    for named in ({"teacher": str(folder), "student": str(tiny_pair.student)},):
        with pytest.raises(InputError, match=f"quantised by {method}.*pip install {package}"):
            find_pair(ModelConfig(**named))


def test_transformers_names_the_packages_of_other_methods(tiny_pair: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_pair.teacher, folder)
    say_quantised(folder, quant_method="vptq")
    with pytest.raises(InputError, match=r"cannot be loaded \(.*vptq"):
        load_model(locate_model(folder))


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_a_student_that_cannot_be_dequantised_is_refused(
    distil: Distil,
    tiny_pair: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    monkeypatch.setattr("kdrun.models.stored.find_spec", lambda name: object())
    folder = tmp_path / "model"
    shutil.copytree(tiny_pair.student, folder)
    say_quantised(folder, quant_method=method)
    said = rf"quantised by {method}, and transformers cannot dequantise.*pass the checkpoint"
    for given in ({}, {"lora__rank": 2}):
        with pytest.raises(InputError, match=said):
            distil(tmp_path / "run", model__student=str(folder), **given)
    with pytest.raises(InputError, match=said):
        check_plain(locate_model(folder))
    # A teacher of this kind is loaded as it is, but not quantised a second time.
    shutil.copytree(tiny_pair.teacher, tmp_path / "teacher")
    say_quantised(tmp_path / "teacher", quant_method=method)
    named = {"teacher": str(tmp_path / "teacher"), "student": str(tiny_pair.student)}
    find_pair(ModelConfig(**named))
    with pytest.raises(InputError, match=said):
        find_pair(ModelConfig(**named, teacher_quantization="nf4"))


def test_the_dry_run_says_that_it_counts_full_weights(
    tiny_pair: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    folder = make(tmp_path / "model", tiny_tokenizer)
    to_fp8(folder)
    values = {
        "model.teacher": str(folder),
        "model.student": str(tiny_pair.student),
        "data.train": str(tiny_pair.rows),
        "data.max_length": 64,
    }
    found = dry_run(load_config(None, list(values.items())))
    assert any("quantised by fp8; a dry run counts them in full" in note for note in found.notes)
    model = load_model(locate_model(folder))
    size = sum(p.nbytes for p in model.parameters())
    assert found.memory["weights of the teacher"] == size


def test_a_gguf_file_is_not_a_quantised_checkpoint() -> None:
    assert stored_method(ModelSource("somewhere", "model.gguf")) is None
