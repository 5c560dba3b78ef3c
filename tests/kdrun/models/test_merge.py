"""Saved adapters of all kinds on their base model, against peft itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kdrun.config.sections import ModelConfig
from kdrun.errors import InputError
from kdrun.models.load import load_model
from kdrun.models.locate import locate_model
from kdrun.models.pairs import find_pair

peft = pytest.importorskip("peft")
# What peft itself asks transformers for, and its advice, which is not about these adapters.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]

IDS = torch.arange(3, 40).unsqueeze(0)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def adapt(folder: Path, base: Path, rows: int | None = None, **settings: Any) -> torch.Tensor:
    """Save an adapter with random weights beside a tokenizer; gives its logits under peft."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    if rows is not None:
        model.resize_token_embeddings(rows, mean_resizing=False)
    kept: dict[str, Any] = {"r": 2, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**(kept | settings)))
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.2)
    plain = logits(transformers.AutoModelForCausalLM.from_pretrained(base))
    assert (logits(adapted)[..., : plain.shape[-1]] - plain).abs().max() > 1e-2
    adapted.save_pretrained(folder, save_embedding_layers=rows is not None)
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return logits(adapted)


def loaded(folder: Path) -> tuple[Any, list[str]]:
    said: list[str] = []
    return load_model(locate_model(folder), say=said.append), said


@pytest.mark.parametrize("trained", [["lm_head"], ["embed_tokens", "lm_head"]])
def test_f13_a_trained_head_on_a_tied_base(
    tiny_pair: Any, tmp_path: Path, trained: list[str]
) -> None:
    theirs = adapt(tmp_path / "a", tiny_pair.teacher, modules_to_save=trained)
    model, _ = loaded(tmp_path / "a")
    torch.testing.assert_close(logits(model), theirs, rtol=0, atol=1e-4)
    assert model.config.tie_word_embeddings is False
    model.tie_weights()
    model.save_pretrained(tmp_path / "merged")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(again), theirs, rtol=0, atol=1e-4)


def test_f13_trained_tokens_of_a_tied_base_stay_tied(tiny_pair: Any, tmp_path: Path) -> None:
    theirs = adapt(tmp_path / "a", tiny_pair.teacher, trainable_token_indices=[5])
    model, _ = loaded(tmp_path / "a")
    torch.testing.assert_close(logits(model), theirs, rtol=0, atol=1e-4)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings is True


def test_f83_settings_of_a_newer_peft_are_told(tiny_pair: Any, tmp_path: Path) -> None:
    theirs = adapt(tmp_path / "a", tiny_pair.teacher)
    file = tmp_path / "a" / "adapter_config.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    newer = written | {"use_something_new": False, "peft_version": "0.99.0"}
    file.write_text(json.dumps(newer), encoding="utf-8")
    model, said = loaded(tmp_path / "a")
    torch.testing.assert_close(logits(model), theirs, rtol=0, atol=1e-4)
    assert len(said) == 1
    assert said[0].startswith(f"{tmp_path / 'a'}: written by peft 0.99.0; peft ")
    assert said[0].endswith("ignores them: use_something_new=false")


def test_f14_the_base_gets_the_rows_of_the_adapters_embeddings(
    tiny_pair: Any, tmp_path: Path
) -> None:
    before = transformers.AutoConfig.from_pretrained(tiny_pair.teacher).vocab_size
    theirs = adapt(tmp_path / "a", tiny_pair.teacher, rows=before + 4)
    model, said = loaded(tmp_path / "a")
    assert said == []
    torch.testing.assert_close(logits(model), theirs, rtol=0, atol=1e-4)
    assert model.config.vocab_size == before + 4
    # Known before any weights are read: the added tokens are not left out.
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_pair.teacher)
    tokenizer.add_tokens(["<a1>", "<a2>", "<a3>", "<a4>"])
    tokenizer.save_pretrained(tmp_path / "a")
    assert len(tokenizer) == before + 4
    pair = find_pair(ModelConfig(teacher=str(tmp_path / "a"), student=str(tmp_path / "a")))
    assert pair.vocab_size == before + 4
    assert pair.left_out == {}


def test_f14_an_adapter_that_does_not_fit_says_which_weight(tiny_pair: Any, tmp_path: Path) -> None:
    adapt(tmp_path / "a", tiny_pair.teacher)
    file = tmp_path / "a" / "adapter_config.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    other = written | {"base_model_name_or_path": str(tiny_pair.student)}
    file.write_text(json.dumps(other), encoding="utf-8")
    with pytest.raises(InputError) as info:
        loaded(tmp_path / "a")
    assert "size mismatch for base_model" in str(info.value)
    assert "\n" not in str(info.value)


def test_a_damaged_adapter_is_one_line(tiny_pair: Any, tmp_path: Path) -> None:
    adapt(tmp_path / "a", tiny_pair.teacher)
    file = tmp_path / "a" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert find_pair(ModelConfig(teacher=str(tmp_path / "a"), student=str(tiny_pair.student)))
    with pytest.raises(InputError, match="does not fit its base model or is broken") as info:
        loaded(tmp_path / "a")
    assert "\n" not in str(info.value)


def test_a_weight_that_the_adapter_lacks_is_refused(tiny_pair: Any, tmp_path: Path) -> None:
    adapt(tmp_path / "a", tiny_pair.teacher)
    file = tmp_path / "a" / "adapter_model.safetensors"
    weights = load_file(file)
    del weights[min(weights)]
    save_file(weights, file)
    with pytest.raises(InputError, match="Found missing adapter keys"):
        loaded(tmp_path / "a")


def test_f12_weights_of_an_adapter_that_are_not_used_are_named(
    tiny_pair: Any, tmp_path: Path
) -> None:
    theirs = adapt(tmp_path / "a", tiny_pair.teacher)
    file = tmp_path / "a" / "adapter_model.safetensors"
    weights = load_file(file)
    name = min(weights)
    weights[name.replace("layers.0", "layers.7")] = weights[name].clone()
    save_file(weights, file)
    (tmp_path / "a" / "adapter_model.bin").touch()
    model, said = loaded(tmp_path / "a")
    torch.testing.assert_close(logits(model), theirs, rtol=0, atol=1e-4)
    assert len(said) == 2
    assert said[0].endswith("read from adapter_model.safetensors; ignored: adapter_model.bin")
    assert "1 weight of the adapter is not part of the model's class" in said[1]
    assert "layers.7.self_attn.q_proj.lora_A" in said[1]


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}])
def test_f47_an_adapter_as_student_is_trained_in_full(
    distil: Callable[..., Path], tiny_pair: Any, tmp_path: Path, settings: dict[str, Any]
) -> None:
    adapt(tmp_path / "a", tiny_pair.student, **settings)
    before = dict(loaded(tmp_path / "a")[0].named_parameters())
    run = distil(tmp_path / "run", model__student=str(tmp_path / "a"))
    after = load_file(run / "student" / "model.safetensors")
    assert before.keys() == after.keys()
    assert not [name for name, weight in before.items() if torch.equal(weight, after[name])]
    config = json.loads((run / "student" / "config.json").read_text(encoding="utf-8"))
    assert config["tie_word_embeddings"] is not bool(settings)
    assert not (run / "student" / "adapter_config.json").exists()
