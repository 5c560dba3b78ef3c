from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kdrun.errors import InputError
from kdrun.models.load import load_model
from kdrun.models.locate import ModelSource, locate_model
from kdrun.models.tokenizers import load_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        dtype="bfloat16",
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def error_of(given: str | Path) -> str:
    with pytest.raises(InputError) as info:
        load_model(locate_model(given))
    message = str(info.value)
    assert str(given) in message
    assert "\n" not in message
    return message


def test_a_folder(folder: Path) -> None:
    model = load_model(locate_model(folder))
    assert model.dtype == torch.float32
    assert not model.training
    assert load_model(locate_model(folder), dtype="auto").dtype == torch.bfloat16
    assert load_model(locate_model(folder), device="meta").device.type == "meta"


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "has no weights" in error_of(folder)


def test_a_missing_weight_is_not_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 of the model's weights, such as model.layers.1.mlp.up_proj" in error_of(folder)


def test_a_weight_of_another_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["intermediate_size"] = 8
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    error_of(folder)


def told(folder: Path) -> tuple[Any, list[str]]:
    said: list[str] = []
    return load_model(locate_model(folder), say=said.append), said


def test_f12_weights_that_the_class_does_not_read_are_named(folder: Path) -> None:
    assert told(folder)[1] == []
    weights = load_file(folder / "model.safetensors")
    extra = {f"model.layers.2.mtp.{name}.weight": torch.ones(2, 2) for name in "ab"}
    save_file(weights | extra, folder / "model.safetensors", metadata={"format": "pt"})
    assert told(folder)[1] == [
        f"{folder}: 2 weights of the checkpoint are not part of the model's class and are ignored, "
        "such as model.layers.2.mtp.a.weight"
    ]


def test_f12_weight_files_that_are_not_read_are_named(folder: Path) -> None:
    for name in ("pytorch_model.bin", "model-00001-of-00002.safetensors", "model.gguf"):
        (folder / name).touch()
    for name in ("optimizer.pt", "training_args.bin", "README.md"):  # no weights of the model
        (folder / name).touch()
    assert told(folder)[1] == [
        f"{folder}: weights are read from model.safetensors; ignored: "
        "model-00001-of-00002.safetensors, model.gguf, pytorch_model.bin"
    ]


def test_f12_all_shards_are_read(folder: Path) -> None:
    model = load_model(locate_model(folder))
    model.save_pretrained(folder / "shards", max_shard_size="10kB")
    assert len(list((folder / "shards").glob("*.safetensors"))) > 1
    assert told(folder / "shards")[1] == []


def test_f15_a_head_of_its_own_is_saved_as_such(folder: Path) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"tie_word_embeddings": True}), encoding="utf-8")
    weights = load_file(folder / "model.safetensors")
    head = weights["lm_head.weight"].clone()
    model, said = told(folder)
    assert said == [
        f"{folder}: its head is not tied to its embeddings, although its config.json says so; it "
        "is saved with tie_word_embeddings: false"
    ]
    model.save_pretrained(folder / "saved")
    kept = json.loads((folder / "saved" / "config.json").read_text(encoding="utf-8"))
    assert kept["tie_word_embeddings"] is False
    again, said = told(folder / "saved")
    assert said == []
    torch.testing.assert_close(again.lm_head.weight, head.float())
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model, said = told(folder)
    assert said == []
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_f89_a_method_of_quantisation_that_is_not_known(folder: Path) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": "unheard", "bits": 4}
    file.write_text(json.dumps(config), encoding="utf-8")
    assert "quantised by the method 'unheard', which this version of" in error_of(folder)


def test_cut_off_weights(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    error_of(folder)


def test_a_broken_configuration(folder: Path) -> None:
    (folder / "config.json").write_text("{", encoding="utf-8")
    error_of(folder)


def test_an_unknown_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "nonesuch"}', encoding="utf-8")
    assert "'nonesuch'" in error_of(folder)


def test_not_a_causal_language_model(tmp_path: Path) -> None:
    transformers.T5Config().save_pretrained(tmp_path / "t5")
    assert "not a causal language model (T5Config)" in error_of(tmp_path / "t5")
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    assert "(BertForMaskedLM)" in error_of(tmp_path / "bert")


def test_no_such_name() -> None:
    assert "no model of this name" in error_of("no-such-owner/no-such-name")


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"no gguf at all" * 100)
    error_of(tmp_path / "model.gguf")


class TestRemoteCode:
    CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({marker!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own-llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""

    @pytest.fixture
    def marker(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Makes the model one that brings its own code, which touches this file when it runs."""
        monkeypatch.setattr(
            transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules")
        )
        marker = tmp_path / "ran"
        (folder / "own.py").write_text(self.CODE.format(marker=str(marker)), encoding="utf-8")
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config["model_type"] = "own-llama"
        config["auto_map"] = {
            "AutoConfig": "own.OwnConfig",
            "AutoModelForCausalLM": "own.OwnForCausalLM",
        }
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return marker

    def test_it_does_not_run_unasked(self, folder: Path, marker: Path) -> None:
        assert "--set model.trust_remote_code=true" in error_of(folder)
        assert not marker.exists()

    def test_it_runs_when_asked(self, folder: Path, marker: Path) -> None:
        model = load_model(locate_model(folder), trust_remote_code=True)
        assert type(model).__name__ == "OwnForCausalLM"
        assert marker.exists()

    def test_a_tokenizers_code_does_not_run_unasked(self, folder: Path, marker: Path) -> None:
        config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(InputError, match=r"--set model\.trust_remote_code=true"):
            load_tokenizer(locate_model(folder))
        assert not marker.exists()


@pytest.mark.real_model
def test_a_gguf_file_is_a_model_like_any_other(smollm2_folder: Path) -> None:
    config = json.loads((smollm2_folder / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    model = load_model(ModelSource(str(smollm2_folder)))
    assert model.dtype == torch.float32
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.num_parameters() == 134_515_008
    tokenizer = load_tokenizer(smollm2_folder)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
