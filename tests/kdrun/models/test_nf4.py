"""Weights in 4 bits: a teacher's, and those below a student's adapters (QLoRA)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from cut_runs import cut_back
from pair_configs import config_of, tiny_llama
from safetensors.torch import load_file

from kdrun.cache.fingerprint import print_teacher
from kdrun.config.training_sections import LoraConfig
from kdrun.dry_run.report import dry_run
from kdrun.errors import InputError
from kdrun.models.adapters import add_adapters
from kdrun.models.heads import FrozenTeacher, find_split
from kdrun.models.load import load_model
from kdrun.models.locate import locate_model
from kdrun.models.nf4 import dequantize, is_nf4, nf4_bytes, to_nf4, weights_in
from kdrun.models.pairs import describe_model, find_pair, load_teacher
from kdrun.models.quantize import check_student_quantization

Distil = Callable[..., Path]
needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None or find_spec("peft") is None,
    reason="the package bitsandbytes or peft is not installed",
)
# What bitsandbytes asks of torch 2.13 while it is imported.
pytestmark = pytest.mark.filterwarnings("default")
NF4 = {"model__teacher_quantization": "nf4"}
QLORA: dict[str, Any] = {"lora__rank": 4, "lora__quantization": "nf4", "optimizer__lr": 1e-2}


@pytest.fixture(scope="module")
def wide_pair(tiny_pair: Any, tiny_tokenizer: Any, tmp_path_factory: Any) -> Any:
    """A pair whose widths are multiples of a block of 64 weights."""
    folder = tmp_path_factory.mktemp("wide-pair")
    for name, width, seed in (("teacher", 128, 0), ("student", 64, 1)):
        tiny_llama(len(tiny_tokenizer), width, seed).save_pretrained(folder / name)
        tiny_tokenizer.save_pretrained(folder / name)
    return replace(tiny_pair, teacher=folder / "teacher", student=folder / "student")


@pytest.fixture
def distil(distil: Distil, wide_pair: Any) -> Distil:
    def run(
        folder: Path, said: list[str] | None = None, resume: bool = False, **given: Any
    ) -> Path:
        named = {"model__teacher": str(wide_pair.teacher), "model__student": str(wide_pair.student)}
        return distil(folder, said, resume, **{**named, **given})

    return run


def bytes_of(model: Any) -> int:
    """What the tensors of a model take, with the scales of its layers."""
    total = 0
    for parameter in model.parameters():
        total += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            total += state.absmax.nbytes + state.code.nbytes
    return total


def summary_of(folder: Path) -> Any:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def digest(folder: Path) -> str:
    file = folder / "adapter_model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest()


def linear_layers(model: Any) -> dict[str, Any]:
    head = model.get_output_embeddings()
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and layer is not head
    }


@needs_bitsandbytes
def test_every_weight_is_one_of_sixteen_steps_of_its_block(wide_pair: Any) -> None:
    plain, model = (load_model(locate_model(wide_pair.teacher)) for _ in range(2))
    to_nf4(model)
    assert is_nf4(model)
    assert not is_nf4(plain)
    assert {type(layer).__name__ for layer in linear_layers(model).values()} == {"Linear4bit"}
    ids = torch.arange(3, 60).unsqueeze(0)
    with torch.no_grad():
        quantised = model(ids).logits
    dequantize(model)
    assert {type(layer) for layer in linear_layers(model).values()} == {torch.nn.Linear}
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, quantised, rtol=1e-4, atol=1e-3)
    for name, layer in linear_layers(model).items():
        before = linear_layers(plain)[name].weight.detach().reshape(-1, 64)
        after = layer.weight.detach().reshape(-1, 64)
        largest = before.abs().amax(1, keepdim=True)
        assert torch.equal(after.abs().amax(1, keepdim=True), largest)
        assert len(torch.unique((after / largest).round(decimals=5))) <= 16
        # Half of the widest gap between two steps.
        assert ((after - before).abs() <= 0.153 * largest).all()
        assert not torch.equal(before, after)
    for name, weight in plain.named_parameters():
        if name.removesuffix(".weight") not in linear_layers(plain):
            assert torch.equal(weight, model.get_parameter(name))


@needs_bitsandbytes
def test_the_values_are_those_of_transformers_with_bitsandbytes(wide_pair: Any) -> None:
    import transformers

    ours = load_model(locate_model(wide_pair.teacher))
    to_nf4(ours)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        wide_pair.teacher,
        dtype=torch.float32,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        ),
    )
    there = linear_layers(theirs)
    for name, layer in linear_layers(ours).items():
        assert torch.equal(layer.weight, there[name].weight)
        assert torch.equal(layer.weight.quant_state.absmax, there[name].weight.quant_state.absmax)


@needs_bitsandbytes
def test_a_teacher_in_4_bits_takes_the_bytes_that_the_dry_run_says(wide_pair: Any) -> None:
    config = config_of(wide_pair, **NF4)
    pair = find_pair(config.model)
    model = load_teacher(pair, config.model)
    assert model is not None
    plain = load_teacher(pair, config_of(wide_pair).model)
    assert plain is not None
    assert describe_model(model) == describe_model(plain)
    assert weights_in(model) == sum(p.numel() for p in plain.parameters())
    found = dry_run(config)
    assert found.memory["weights of the teacher"] == bytes_of(model) < bytes_of(plain)
    assert found.teacher is not None
    assert found.teacher.parameters == weights_in(model)
    # Losses project with the head's own weight: it is a plain tensor, tied as it was.
    split = find_split(model)
    assert split.reason is None
    ids = torch.arange(3, 60).unsqueeze(0)
    source = FrozenTeacher(model, split).source(ids, torch.ones_like(ids))
    assert torch.equal(source.weight, plain.get_output_embeddings().weight)


@needs_bitsandbytes
def test_a_model_without_wide_enough_layers_is_refused(tiny_pair: Any) -> None:
    """On a CPU, bitsandbytes 0.50 would scale such weights by the wrong blocks."""
    model = load_model(locate_model(tiny_pair.student))
    with pytest.raises(InputError, match="a multiple of 64 wide"):
        to_nf4(model)


def test_the_bytes_of_a_weight() -> None:
    assert nf4_bytes(torch.empty(64, 64)) == 2048 + 64 * 4 + 64
    assert nf4_bytes(torch.empty(5, 13)) == 33 + 2 * 4 + 64


@needs_bitsandbytes
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_evaluation_does_not_change_the_weights(wide_pair: Any, precision: str) -> None:
    """bitsandbytes would repack them on CPUs with bfloat16, and gradients would end there."""
    model = load_model(locate_model(wide_pair.student), dtype=precision)
    to_nf4(model)
    first = print_teacher(model)
    ids = torch.arange(3, 60).unsqueeze(0)
    with torch.no_grad():
        model.eval()(ids)
    assert print_teacher(model) == first
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model.train()(inputs_embeds=embedded).logits.float().sum().backward()
    assert embedded.grad is not None
    assert embedded.grad.norm() > 0


@needs_bitsandbytes
def test_a_run_distils_it_and_remembers_its_weights(
    distil: Distil, wide_pair: Any, tmp_path: Path
) -> None:
    plain, small = (
        summary_of(distil(tmp_path / name, **given))
        for name, given in (("plain", {}), ("small", NF4))
    )
    assert small["before"]["eval_ce"] == plain["before"]["eval_ce"]
    assert small["before"]["eval_forward_kl"] != plain["before"]["eval_forward_kl"]
    assert small["after"]["eval_forward_kl"] < small["before"]["eval_forward_kl"]
    with pytest.raises(InputError, match="the teacher's weights have changed"):
        distil(tmp_path / "small", resume=True, training__max_steps=4)


@needs_bitsandbytes
def test_gradients_of_adapters_are_those_above_the_dequantised_weights(wide_pair: Any) -> None:
    found = []
    for plain in (False, True):
        model = load_model(locate_model(wide_pair.student))
        to_nf4(model)
        if plain:
            dequantize(model)
        settings = LoraConfig(rank=2, quantization=None if plain else "nf4")
        adapted = add_adapters(model, settings, "x", 3).eval()
        trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
        assert {p.dtype for p in trained.values()} == {torch.float32}
        assert len(trained) == 2 * 2 * 7
        ids = torch.arange(3, 60).unsqueeze(0)
        adapted(input_ids=ids, labels=ids).loss.backward()
        found.append({n: p.grad for n, p in trained.items()})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-3, atol=1e-6)
    assert any(gradient.norm() > 0 for gradient in found[0].values())


@needs_bitsandbytes
def test_a_half_precision_base_has_adapters_in_float32(distil: Distil, tmp_path: Path) -> None:
    folder = distil(tmp_path / "run", model__dtype="bfloat16", **QLORA)
    weights = load_file(folder / "student" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    found = summary_of(folder)
    assert found["after"]["eval_ce"] < found["before"]["eval_ce"]


@needs_bitsandbytes
@pytest.mark.parametrize(
    "given", [{}, {"lora__dora": True}, {"training__gradient_checkpointing": True}]
)
def test_ten_steps_equal_four_steps_and_six_after_a_kill(
    distil: Distil, tmp_path: Path, given: dict[str, Any]
) -> None:
    steps = {**QLORA, **given, "training__max_steps": 10, "training__save_steps": 4}
    whole = distil(tmp_path / "whole", training__save_total_limit=9, **steps)
    cut = tmp_path / "cut"
    cut_back(whole, cut, 2)
    said: list[str] = []
    distil(cut, said, resume=True, **{**steps, "training__save_total_limit": 9})
    assert digest(cut / "student") == digest(whole / "student")
    assert summary_of(cut)["after"] == summary_of(whole)["after"]
    assert any("above weights in nf4" in line for line in said)
    assert not list((whole / "checkpoints" / "checkpoint-4").glob("model*"))
    with pytest.raises(InputError, match=r"lora\.quantization was 'nf4' when the run began"):
        distil(cut, resume=True, **{**steps, "lora__quantization": None})


@needs_bitsandbytes
@pytest.mark.parametrize("dora", [False, True])
def test_the_merged_student_is_the_one_that_was_trained(
    distil: Distil, wide_pair: Any, tmp_path: Path, dora: bool
) -> None:
    folder = distil(
        tmp_path / "run", lora__merge=True, lora__dora=dora, training__max_steps=6,
        evaluation__answers=2, evaluation__max_new_tokens=4, **QLORA,
    )  # fmt: skip
    after = summary_of(folder)["after"]
    model = load_model(locate_model(folder / "student"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not hasattr(model.config, "quantization_config")
    # The same rows as in the run: those that it held out.
    measured = distil(
        tmp_path / "again", model__student=str(folder / "student"), training__max_steps=1
    )
    before = summary_of(measured)["before"]
    for key in ("eval_ce", "eval_forward_kl"):
        assert before[key] == pytest.approx(after[key], rel=1e-4)
    # Above the full weights the same adapters are another model.
    adapter = load_model(locate_model(folder / "adapter"))
    ids = torch.arange(3, 60).unsqueeze(0)
    with torch.no_grad():
        assert not torch.allclose(adapter(ids).logits, model(ids).logits, atol=1e-2)


@needs_bitsandbytes
@pytest.mark.parametrize("given", [{}, {"lora__dora": True}])
def test_the_dry_run_knows_the_bytes_of_a_student_in_4_bits(
    wide_pair: Any, given: dict[str, Any]
) -> None:
    config = config_of(wide_pair, lora__rank=4, lora__quantization="nf4", **given)
    model = load_model(locate_model(wide_pair.student))
    to_nf4(model)
    student = add_adapters(model, config.lora, "x", 0)
    found = dry_run(config)
    assert found.memory["weights of the student"] == bytes_of(student)
    trained = [p for p in student.parameters() if p.requires_grad]
    assert found.memory["gradients"] == sum(p.nbytes for p in trained)
    assert found.memory["optimiser"] == 2 * sum(p.nbytes for p in trained)
    assert found.lora is not None
    assert found.lora.endswith("of rank 4 above nf4")


@needs_bitsandbytes
def test_the_built_in_student_is_saved_in_full_below_its_adapters(
    distil: Distil, tmp_path: Path
) -> None:
    folder = distil(
        tmp_path / "run", model__teacher="builtin", model__student="builtin",
        data__train="builtin", data__max_length=32, **QLORA,
    )  # fmt: skip
    base = load_model(locate_model(folder / "base"))
    assert {p.dtype for p in base.parameters()} == {torch.float32}
    assert load_model(locate_model(folder / "student")) is not None


@needs_bitsandbytes
@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_train_as_one_does(torchrun: Any, wide_pair: Any, tmp_path: Path) -> None:
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        arguments = ["-m", "kdrun", "--teacher", wide_pair.teacher, "--student", wide_pair.student]
        arguments += ["--data", wide_pair.rows, "--max-length", 64, "--max-steps", 3]
        arguments += ["--batch-size", 4 // processes, "--lora-rank", 2, "--lr", "1e-2"]
        arguments += ["--set", "lora.quantization=nf4", "--set", "loss.compiled=false"]
        done = torchrun(processes, *arguments, "--output", folder)
        assert done.returncode == 0, done.stderr
        found.append(summary_of(folder)["after"]["eval_ce"])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_student_in_4_bits_needs_adapters_and_is_not_sharded(wide_pair: Any) -> None:
    with pytest.raises(InputError, match=r"lora\.quantization=nf4 needs lora\.rank"):
        config_of(wide_pair, lora__quantization="nf4")
    config = config_of(wide_pair, lora__rank=2, lora__quantization="nf4")
    with pytest.raises(InputError, match=r"lora\.quantization=nf4: .* cannot be sharded"):
        check_student_quantization(config.lora, fsdp=True)
