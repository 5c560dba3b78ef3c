"""Adapters on a mixture of experts: what is adapted, said, saved and loaded again."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kdrun.config.training_sections import LoraConfig
from kdrun.errors import InputError
from kdrun.models.adapters import add_adapters, describe_adapters
from kdrun.models.load import load_model
from kdrun.models.locate import locate_model

pytest.importorskip("peft")

IDS = torch.arange(3, 17).view(2, 7)
ATTENTION = "k_proj, o_proj, q_proj, v_proj"


def make(family: str) -> Any:
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=4,
        num_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    return getattr(transformers, f"{family}ForCausalLM")(config)


@pytest.mark.parametrize(
    ("family", "given", "places"),
    [
        (
            "Mixtral",
            "all-linear",
            f"experts.down_proj, experts.gate_up_proj, gate.weight, {ATTENTION}",
        ),
        ("Mixtral", ("gate_up_proj", "down_proj"), "experts.down_proj, experts.gate_up_proj"),
        ("Mixtral", ("w1", "w2", "w3"), "experts.down_proj, experts.gate_up_proj"),
        ("Mixtral", ("q_proj", "gate"), "gate.weight, q_proj"),
        ("Qwen3Moe", ("gate_proj", "up_proj"), "experts.gate_up_proj"),
        ("Qwen3Moe", ("experts.down_proj", "v_proj"), "experts.down_proj, v_proj"),
        ("GptOss", ("down_proj", "router"), "experts.down_proj, router.weight"),
        ("GptOss", "all-linear", ATTENTION),
    ],
)
def test_f6_experts_and_routers_can_be_named_and_are_said(
    tmp_path: Path, family: str, given: Any, places: str
) -> None:
    make(family).save_pretrained(tmp_path / "base")
    plain = make(family).eval()(input_ids=IDS).logits
    settings = LoraConfig(rank=2, target_modules=given)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        adapted = add_adapters(make(family), settings, str(tmp_path / "base"), 0)
    assert [str(warning.message) for warning in told] == []
    assert describe_adapters(adapted, settings).startswith(f"adapters: LoRA of rank 2 on {places};")
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.add_(torch.randn_like(weight) * 0.3)
    theirs = adapted.eval()(input_ids=IDS).logits
    assert (theirs - plain).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path / "adapter")
    said: list[str] = []
    again = load_model(locate_model(tmp_path / "adapter"), say=said.append)
    torch.testing.assert_close(again(input_ids=IDS).logits, theirs, rtol=0, atol=1e-5)
    assert said == []


def test_f6_what_does_not_exist_is_told_with_the_experts() -> None:
    with pytest.raises(InputError, match="'nonesuch'; there are down_proj, gate, gate_up_proj, k_"):
        add_adapters(make("Mixtral"), LoraConfig(rank=2, target_modules=("nonesuch",)), "x", 0)
    with pytest.raises(InputError, match="did you mean gate_up_proj"):
        add_adapters(make("Mixtral"), LoraConfig(rank=2, target_modules=("gate_up_prj",)), "x", 0)


@pytest.mark.parametrize("more", [{"dropout": 0.1}, {"dora": True}])
def test_f6_what_peft_cannot_do_with_experts_is_one_line(more: dict[str, Any]) -> None:
    settings = LoraConfig(rank=2, target_modules=("down_proj",), **more)
    with pytest.raises(InputError, match=r"change lora\.dropout, lora\.dora or") as info:
        add_adapters(make("Mixtral"), settings, "x", 0)
    assert "\n" not in str(info.value)
