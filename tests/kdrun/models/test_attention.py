"""The implementation of attention: the same outputs from each, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner

from kdrun.cli import cli
from kdrun.config.load import load_config
from kdrun.config.sections import ModelConfig
from kdrun.errors import InputError
from kdrun.models.attention import check_attention, check_trains
from kdrun.models.load import load_model
from kdrun.models.locate import locate_model
from kdrun.models.packing import check_packing, packing_problem
from kdrun.models.pairs import find_pair, load_student, load_teacher
from kdrun.run.precision import settle_precision

Distil = Callable[..., Path]


def test_both_models_use_it(tiny_pair: Any) -> None:
    logits = {}
    for attention in ("eager", "sdpa", None):
        config = ModelConfig(
            teacher=str(tiny_pair.teacher), student=str(tiny_pair.student), attention=attention
        )
        pair = find_pair(config)
        models = (load_teacher(pair, config), load_student(pair, config, 0).eval())
        for model in models:
            assert model is not None
            assert model.config._attn_implementation == (attention or "sdpa")
        with torch.no_grad():
            logits[attention] = [model(torch.arange(40).unsqueeze(0)).logits for model in models]
    torch.testing.assert_close(logits["eager"], logits["sdpa"], rtol=0, atol=1e-4)
    assert not torch.equal(logits["eager"][0], logits["sdpa"][0])
    torch.testing.assert_close(logits[None], logits["sdpa"], rtol=0, atol=0)


def test_the_built_in_student_uses_it_too() -> None:
    config = ModelConfig(attention="eager")
    student = load_student(find_pair(config), config, seed=0)
    assert student.config._attn_implementation == "eager"


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_with_it_reaches_the_same_losses(
    distil: Distil, still_student: Path, tmp_path: Path, packing: bool
) -> None:
    given = {"model__student": str(still_student), "data__packing": packing}
    eager, sdpa = (
        json.loads(
            (distil(tmp_path / name, model__attention=name, **given) / "summary.json").read_text()
        )
        for name in ("eager", "sdpa")
    )
    for key in ("eval_ce", "eval_forward_kl"):
        assert eager["after"][key] == pytest.approx(sdpa["after"][key], rel=1e-4)
        assert eager["after"][key] < eager["before"][key]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of torch, while it compiles
def test_flex_attention_evaluates_packed_rows_on_a_cpu(tiny_pair: Any) -> None:
    model = load_model(locate_model(tiny_pair.teacher), attention="flex_attention").eval()
    assert packing_problem(model) is None


def refused(tiny_pair: Any, folder: Path, *settings: str) -> str:
    arguments = ["--teacher", str(tiny_pair.teacher), "--student", str(tiny_pair.student)]
    arguments += ["--data", str(tiny_pair.rows), "--max-length", "64", "--output", str(folder)]
    for setting in settings:
        arguments += ["--set", setting]
    with pytest.raises(InputError) as caught:
        CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert not (folder / "config.yaml").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("flash_attention_2", r"needs the package flash-attn, .*pip install flash-attn"),
        ("flash_attention_3", r"needs the package flash-attn-3"),
        ("kernels-community/flash-attn2", r"pip install kernels"),
        ("flash_attn_2", r"unknown; choose sdpa, eager"),
        ("paged|eager", r"unknown; choose sdpa, eager"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_written(
    tiny_pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, said: str
) -> None:
    monkeypatch.setattr("kdrun.models.attention.find_spec", lambda name: None)
    message = refused(tiny_pair, tmp_path / "run", f"model.attention={given}")
    assert message.startswith(f"model.attention={given}")
    assert re.search(said, message)


def test_flash_attention_needs_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdrun.models.attention.find_spec", lambda name: object())
    given = [("model.attention", "flash_attention_2")]
    check_attention(load_config(None, given).model)
    settle_precision(load_config(None, [*given, ("training.precision", "bf16")]), "cpu")
    with pytest.raises(InputError, match=r"in 16 bits only: set training\.precision=bf16"):
        settle_precision(load_config(None, given), "cpu")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator can train with it")
def test_flex_attention_does_not_train_on_a_cpu(tiny_pair: Any, tmp_path: Path) -> None:
    message = refused(tiny_pair, tmp_path / "run", "model.attention=flex_attention")
    assert "no backward pass on a CPU" in message
    check_trains("sdpa")


def test_a_model_that_does_not_support_it_is_refused_before_its_weights_are_read(
    tmp_path: Path,
) -> None:
    config = transformers.BloomConfig(vocab_size=40, hidden_size=8, n_layer=1, n_head=1)
    assert not transformers.BloomForCausalLM._supports_flex_attn
    config.architectures = ["BloomForCausalLM"]
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(InputError, match=r"^model\.attention: .* choose another, such as eager$"):
        load_model(locate_model(tmp_path), attention="flex_attention")


@pytest.fixture
def one_row_only() -> Iterator[str]:
    """Attention like flash attention: it separates the examples of a batch of one row only."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    name = "separates_one_row_only"
    interface = transformers.AttentionInterface

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        positions = options.get("position_ids")
        if positions is not None and len(query) == 1:
            starts = (positions[0] == 0).cumsum(0)
            same = starts.unsqueeze(0) == starts.unsqueeze(1)
            mask = (same & torch.ones_like(same).tril()).unsqueeze(0).unsqueeze(0)
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    interface.register(name, attend)
    yield name
    del interface._global_mapping[name]


def test_packing_is_refused_where_rows_of_a_batch_are_not_separated(
    tiny_pair: Any, tmp_path: Path, one_row_only: str
) -> None:
    check_attention(ModelConfig(attention=one_row_only))
    model = load_model(locate_model(tiny_pair.teacher), attention=one_row_only).eval()
    with pytest.raises(InputError, match=f"model.attention={one_row_only}.*data.packing=false"):
        check_packing(model, "this model")
    settings = (f"model.attention={one_row_only}", "data.packing=true")
    assert "lets the examples of a row attend to each other" in refused(
        tiny_pair, tmp_path / "run", *settings
    )
    # A single row is separated, so that batches of one row can be packed.
    check_packing(model, "this model", batch_size=1)
    one, second = torch.arange(5), torch.arange(10, 17)
    row = torch.cat([one, second]).unsqueeze(0)
    positions = torch.cat([torch.arange(5), torch.arange(7)]).unsqueeze(0)
    with torch.no_grad():
        packed = model(row, position_ids=positions, use_cache=False).logits[0, 5:]
        alone = model(second.unsqueeze(0), use_cache=False).logits[0]
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-4)


def test_the_key_takes_any_name(tiny_pair: Any) -> None:
    config = load_config(None, [("model.attention", "eager")])
    assert config.model.attention == "eager"
