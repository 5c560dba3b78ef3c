from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdrun.errors import InputError
from kdrun.models.init_student import init_student, keep_only, spaced_layers

LAYERS = 6
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
TEXT = {**SIZES, "num_key_value_heads": 2}
MOE = {**TEXT, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", TEXT),
    "qwen2": (
        "Qwen2Config",
        {**TEXT, "use_sliding_window": True, "max_window_layers": 3, "sliding_window": 4},
    ),
    "qwen3": ("Qwen3Config", {**TEXT, "head_dim": 8}),
    "qwen3_moe": ("Qwen3MoeConfig", {**MOE, "head_dim": 8, "mlp_only_layers": [0, 3]}),
    "mistral": ("MistralConfig", TEXT),
    "gemma2": ("Gemma2Config", {**TEXT, "head_dim": 8}),
    "gemma3": ("Gemma3TextConfig", {**TEXT, "head_dim": 8}),
    "granite": ("GraniteConfig", TEXT),
    "cohere": ("CohereConfig", TEXT),
    "gpt2": ("GPT2Config", SIZES),
    "gpt_neox": ("GPTNeoXConfig", SIZES),
    "gpt_neo": (
        "GPTNeoConfig",
        {**SIZES, "attention_types": [[["global", "local"], 3]], "window_size": 4},
    ),
    "phi3": ("Phi3Config", TEXT),
    "olmo2": ("Olmo2Config", TEXT),
    "smollm3": ("SmolLM3Config", TEXT),
}


def tiny(kind: str) -> Any:
    torch.manual_seed(0)
    name, options = KINDS[kind]
    return AutoModelForCausalLM.from_config(getattr(transformers, name)(**options)).eval()


def skip_layers(model: Any, kept: Sequence[int]) -> Any:
    """The oracle: the teacher itself, in which the other layers pass their input on."""
    inner = model.base_model
    layers = inner.layers if hasattr(inner, "layers") else inner.h
    # GPT-Neo's layers return a tuple.
    pack = (lambda x: (x, None)) if model.config.model_type == "gpt_neo" else (lambda x: x)
    for index, layer in enumerate(layers):
        if index not in kept:
            layer.forward = lambda hidden_states, *_, **__: pack(hidden_states)
    return model


@pytest.mark.parametrize(
    ("layers", "keep", "expected"),
    [
        (30, 10, (0, 3, 6, 10, 13, 16, 19, 23, 26, 29)),
        (6, 3, (0, 3, 5)),
        (4, 2, (0, 3)),
        (4, 4, (0, 1, 2, 3)),
        (4, 1, (0,)),
        (1, 1, (0,)),
    ],
)
def test_spaced_layers(layers: int, keep: int, expected: tuple[int, ...]) -> None:
    assert spaced_layers(layers, keep) == expected


def test_spaced_layers_always_ascend_from_first_to_last() -> None:
    for layers in range(2, 40):
        for keep in range(2, layers + 1):
            found = spaced_layers(layers, keep)
            assert found[0] == 0
            assert found[-1] == layers - 1
            assert all(a < b for a, b in pairwise(found))
            gaps = [b - a for a, b in pairwise(found)]
            assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("keep", [-1, 0, 5])
def test_keep_out_of_range(keep: int) -> None:
    with pytest.raises(InputError, match="the teacher has 4 layers; keep between 1 and 4"):
        spaced_layers(4, keep)


@pytest.mark.parametrize("kind", KINDS)
def test_the_student_computes_what_the_kept_layers_compute(kind: str, tmp_path: Path) -> None:
    teacher = tiny(kind)
    kept = spaced_layers(LAYERS, 3)
    student = keep_only(teacher, kept)
    student.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.randint(3, 300, (2, 12))
    with torch.no_grad():
        expected = skip_layers(teacher, kept)(ids, use_cache=False).logits
        torch.testing.assert_close(student(ids, use_cache=False).logits, expected)
        torch.testing.assert_close(loaded(ids, use_cache=False).logits, expected)
        # With a cache every layer has to know its new place.
        torch.testing.assert_close(loaded(ids, use_cache=True).logits, expected)
    assert is_tied(student) == is_tied(loaded) == is_tied(teacher)


def is_tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_configuration_by_layer() -> None:
    kept = spaced_layers(LAYERS, 3)
    teacher, student = tiny("gemma3"), keep_only(tiny("gemma3"), kept)
    kinds = teacher.config.layer_types
    assert student.config.layer_types == [kinds[i] for i in kept]
    assert student.config.num_hidden_layers == 3
    assert keep_only(tiny("qwen2"), kept).config.max_window_layers == 1
    assert keep_only(tiny("qwen3_moe"), kept).config.mlp_only_layers == [0, 1]
    ropes = tiny("smollm3").config.no_rope_layers
    assert keep_only(tiny("smollm3"), kept).config.no_rope_layers == [ropes[i] for i in kept]


def test_the_teacher_is_left_alone() -> None:
    teacher = tiny("qwen2")
    before = teacher.config.to_dict()
    keep_only(teacher, (0, 5))
    assert teacher.config.to_dict() == before


def test_layers_that_depend_on_their_place_are_refused() -> None:
    config = transformers.Qwen2MoeConfig(
        **MOE, shared_expert_intermediate_size=16, decoder_sparse_step=2
    )
    teacher = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match="Qwen2MoeForCausalLM"):
        keep_only(teacher, (0, 3, 5))


def test_a_layer_that_would_behave_otherwise_is_refused() -> None:
    teacher = tiny("llama")
    teacher.model.layers[5].self_attn.scaling = 0.5
    with pytest.raises(InputError, match=r"layer 5 .* layer 1 .*self_attn\.scaling"):
        keep_only(teacher, (0, 5))


def test_layers_under_another_name_are_refused() -> None:
    config = transformers.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=64)
    with pytest.raises(InputError, match="no list of 2 decoder layers"):
        keep_only(AutoModelForCausalLM.from_config(config), (0,))


class TestCommand:
    @pytest.fixture
    def teacher(self, tiny_tokenizer: Any, tmp_path: Path) -> Path:
        folder = tmp_path / "teacher"
        model = tiny("gemma2").to(torch.bfloat16)
        model.generation_config.max_new_tokens = 17
        model.save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    def test_a_plain_folder(self, teacher: Path, tiny_tokenizer: Any, tmp_path: Path) -> None:
        made = init_student(teacher, 2, tmp_path / "out" / "student")
        assert made.kept_layers == (0, 5)
        assert made.teacher_layers == LAYERS
        assert (made.folder / "model.safetensors").is_file()
        model = AutoModelForCausalLM.from_pretrained(made.folder)
        assert model.dtype == torch.bfloat16
        assert model.num_parameters() == made.parameters
        assert model.generation_config.max_new_tokens == 17
        tokenizer = AutoTokenizer.from_pretrained(made.folder)
        assert tokenizer.chat_template == tiny_tokenizer.chat_template

    def test_the_output_is_not_written_over(self, teacher: Path, tmp_path: Path) -> None:
        folder = tmp_path / "student"
        folder.mkdir()
        (folder / "mine").touch()
        with pytest.raises(InputError, match="is not empty"):
            init_student(teacher, 2, folder)
        assert [p.name for p in folder.iterdir()] == ["mine"]
        with pytest.raises(InputError, match="is a file"):
            init_student(teacher, 2, folder / "mine")
        with pytest.raises(InputError, match=r"mine/below: Not a directory; .* writable folder"):
            init_student(teacher, 2, folder / "mine" / "below")

    def test_nothing_is_written_when_the_number_is_wrong(
        self, teacher: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(InputError, match="keep between 1 and 6"):
            init_student(teacher, 7, tmp_path / "student")
        assert not (tmp_path / "student").exists()


@pytest.mark.real_model
@pytest.mark.slow
def test_a_gguf_teacher(smollm2_gguf: Path, tmp_path: Path) -> None:
    made = init_student(smollm2_gguf, 10, tmp_path / "student")
    assert made.kept_layers == (0, 3, 6, 10, 13, 16, 19, 23, 26, 29)
    assert made.parameters == 63_713_088
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    assert model.config.num_hidden_layers == 10
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tokenizer = AutoTokenizer.from_pretrained(made.folder)
    assert "<|im_start|>" in tokenizer.chat_template
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2


def test_f12_what_the_student_is_not_made_of_is_told(tiny_pair: Any, tmp_path: Path) -> None:
    shutil.copytree(tiny_pair.teacher, tmp_path / "teacher")
    (tmp_path / "teacher" / "pytorch_model.bin").touch()
    said: list[str] = []
    init_student(tmp_path / "teacher", 1, tmp_path / "student", say=said.append)
    assert len(said) == 1
    assert said[0].endswith("read from model.safetensors; ignored: pytorch_model.bin")
