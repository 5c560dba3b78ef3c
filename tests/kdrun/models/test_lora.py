"""Adapters: what is trained, saved, loaded and resumed, against peft itself."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bare import bare_arguments
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import kdlosses
from kdrun import DistillTrainer
from kdrun.config.load import load_config
from kdrun.config.training_sections import LoraConfig
from kdrun.data.collate import Collator
from kdrun.data.encode import encode_chats
from kdrun.data.rows import load_rows
from kdrun.errors import InputError
from kdrun.models.adapters import add_adapters, check_peft
from kdrun.models.generation import answer
from kdrun.models.load import load_model
from kdrun.models.locate import locate_model
from kdrun.models.tokenizers import load_tokenizer

peft = pytest.importorskip("peft")
# What peft itself asks transformers for.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

Distil = Callable[..., Path]
LORA: dict[str, Any] = {"lora__rank": 4, "lora__dropout": 0.1}


def tiny(seed: int, width: int = 16) -> Any:
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=61,
            hidden_size=width,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=False,
        )
    )


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 40).unsqueeze(0)
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids).logits
    return found


TEN_STEPS = {
    "training__max_steps": 10,
    "training__save_steps": 4,
    "training__save_total_limit": 9,
    "training__gradient_accumulation_steps": 2,
    **LORA,
}


@pytest.fixture(scope="module")
def adapted(distil: Distil, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps with adapters."""
    return distil(tmp_path_factory.mktemp("lora") / "run", **TEN_STEPS)


def test_the_student_is_an_adapter_that_peft_loads_and_kdrun_loads_alike(
    adapted: Path, tiny_pair: Any
) -> None:
    folder = adapted / "student"
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= names
    assert "chat_template.jinja" in names
    assert "model.safetensors" not in names
    kept = json.loads((folder / "adapter_config.json").read_text())
    assert kept["base_model_name_or_path"] == str(tiny_pair.student.resolve())
    assert "lm_head" not in kept["target_modules"]
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_pair.student)
    plain = logits(base)
    theirs = logits(peft.PeftModel.from_pretrained(base, folder))
    ours = logits(load_model(locate_model(folder)))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours - plain).abs().max() > 1e-2
    assert load_tokenizer(locate_model(folder)).chat_template
    assert list(answer(str(adapted), "the user", 3, 0.0, 0, False))
    summary = json.loads((adapted / "summary.json").read_text())
    assert summary["after"]["eval_ce"] < summary["before"]["eval_ce"]


def test_ten_steps_equal_four_steps_and_six_after_a_kill(
    adapted: Path, distil: Distil, tmp_path: Path
) -> None:
    """The folder is made into what a kill between steps 4 and 8 leaves."""
    shutil.copytree(adapted, tmp_path / "run")
    for name in ("checkpoint-8", "checkpoint-10"):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / name)
    shutil.rmtree(tmp_path / "run" / "student")
    (tmp_path / "run" / "summary.json").unlink()
    folder = distil(tmp_path / "run", resume=True, **TEN_STEPS)
    assert digest(folder / "student") == digest(adapted / "student")
    first, second = (
        [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
        for place in (adapted, folder)
    )
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (first, second)]
    assert losses[1] == losses[0][-len(losses[1]) :]


def test_r7_initial_and_trained_adapters_follow_from_the_seed(
    distil: Distil, tiny_pair: Any, tmp_path: Path
) -> None:
    settings = LoraConfig(rank=4)

    def initial(seed: int, drawn: int) -> dict[str, torch.Tensor]:
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny_pair.student)
        torch.rand(drawn)
        named = add_adapters(model, settings, "x", seed).named_parameters()
        return {name: p.detach() for name, p in named if "lora_A" in name}

    one, other = initial(7, 0), initial(7, 5)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not all(torch.equal(one[name], x) for name, x in initial(8, 0).items())
    digests = [
        digest(distil(tmp_path / f"{i}", training__seed=seed, **LORA) / "student")
        for i, seed in enumerate((7, 7, 8))
    ]
    assert digests[0] == digests[1]
    assert digests[1] != digests[2]


def rows() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 61, (n,), generator=generator).tolist() for n in (9, 14, 6, 11)]
    return [{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in ids]


class Gradients(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.first: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.first:
            named = kwargs["model"].named_parameters()
            self.first = {n: p.grad.clone() for n, p in named if p.grad is not None}


def train(folder: Path, student: Any, loss: str = "forward_kl_chunked", **options: Any) -> Any:
    trainer = DistillTrainer(
        model=student,
        teacher=tiny(0, 32),
        loss=kdlosses.get_loss(loss, compiled=False) if loss.endswith("_chunked") else loss,
        args=bare_arguments(
            folder,
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            **options,
        ),
        data_collator=Collator(0),
        train_dataset=rows(),
    )
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return trainer, gradients.first


@pytest.mark.parametrize("dora", [False, True])
def test_r11_gradient_checkpointing_trains_every_matrix_with_the_same_gradients(
    tmp_path: Path, dora: bool
) -> None:
    found = {}
    for checkpointing in (False, True):
        student = add_adapters(tiny(1), LoraConfig(rank=2, dora=dora), "x", 3)
        trainer, gradients = train(tmp_path, student, activation_checkpointing=checkpointing)
        assert trainer.model.is_activation_checkpointing == checkpointing
        matrices = {n: p for n, p in student.named_parameters() if "lora_B" in n}
        assert len(matrices) == 2 * 7
        assert all(p.norm() > 0 for p in matrices.values())
        found[checkpointing] = gradients
    assert found[False].keys() == found[True].keys()
    assert len(found[False]) == 2 * 7 * (3 if dora else 2)
    for name, gradient in found[False].items():
        torch.testing.assert_close(found[True][name], gradient, rtol=1e-5, atol=1e-8)


def test_gradients_equal_those_of_peft_with_plain_autograd(tmp_path: Path) -> None:
    _, ours = train(tmp_path, add_adapters(tiny(1), LoraConfig(rank=2, alpha=4), "x", 3))
    settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")
    teacher, base = tiny(0, 32).double(), tiny(1)
    transformers.set_seed(3)
    student = peft.get_peft_model(base, settings).double()
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for row in rows():
        ids = torch.tensor([row["input_ids"]])
        q = torch.log_softmax(student(ids).logits[0, 1:-1], -1)
        p = torch.log_softmax(teacher(ids).logits[0, 1:-1], -1).detach()
        labels = ids[0, 2:]
        tokens += len(labels)
        ce = -q[torch.arange(len(labels)), labels].sum()
        total = total + 0.5 * ce + 0.5 * (p.exp() * (p - q)).sum()
    (total / tokens).backward()
    theirs = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
    norm = torch.sqrt(sum((g**2).sum() for g in theirs.values()))  # type: ignore[arg-type]
    clipped = min(1.0, 1.0 / float(norm))
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name].double(), gradient * clipped, rtol=1e-4, atol=1e-7)


class HeadShaped(TorchDispatchMode):
    """Counts new tensors that have the shape of the output head."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.data_ptr() for x in tree_flatten((args, kwargs))[0] if torch.is_tensor(x)}
        for value in tree_flatten(result)[0]:
            if torch.is_tensor(value) and value.shape == (61, 16):
                self.count += value.data_ptr() not in given
        return result


def test_a_frozen_head_gets_no_gradient_and_no_memory_for_one(tmp_path: Path) -> None:
    counts = []
    for student in (tiny(1), add_adapters(tiny(1), LoraConfig(rank=2), "x", 3)):
        with HeadShaped() as seen:
            trainer, _ = train(tmp_path, student)
        counts.append(seen.count)
    assert counts[0] > 0
    assert counts[1] == 0
    assert trainer.model.get_output_embeddings().weight.grad is None


def test_merged_students_are_plain_folders_beside_their_adapter(
    distil: Distil, tiny_pair: Any, tmp_path: Path
) -> None:
    run = distil(tmp_path / "run", lora__merge=True, **LORA)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_pair.student)
    theirs = logits(peft.PeftModel.from_pretrained(base, run / "adapter"))
    student = transformers.AutoModelForCausalLM.from_pretrained(run / "student")
    torch.testing.assert_close(logits(student), theirs, rtol=0, atol=1e-5)
    before, after = (
        load_file(place / "model.safetensors").keys()
        for place in (tiny_pair.student, run / "student")
    )
    assert before == after
    assert not (run / "student" / "adapter_config.json").exists()
    assert (run / "adapter" / "tokenizer.json").is_file()


def test_an_adapter_serves_as_teacher_and_under_another_adapter(
    adapted: Path, distil: Distil, tmp_path: Path
) -> None:
    student = str(adapted / "student")
    run = distil(tmp_path / "second", model__teacher=student, model__student=student, **LORA)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["before"]["eval_forward_kl"] == pytest.approx(0.0, abs=1e-6)
    assert summary["after"]["eval_forward_kl"] > 0
    source = locate_model(run / "student")
    assert source.adapters == (student, str(run / "student"))
    assert torch.isfinite(logits(load_model(source))).all()


def test_evaluate_measures_an_adapter_as_its_run_did(adapted: Path, tiny_pair: Any) -> None:
    from kdrun.evaluation.tasks import TaskChoice
    from kdrun.quiet import make_console
    from kdrun.run.evaluate import evaluate

    config = load_config(adapted / "config.yaml", [("data.eval", str(tiny_pair.rows))])
    student = str(adapted / "student")
    plain, ours = (
        evaluate(config, [name], TaskChoice(), None, make_console())[-1].measures["ce"]
        for name in (str(tiny_pair.student), student)
    )
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_pair.student)
    theirs = peft.PeftModel.from_pretrained(base, student)
    tokenizer = load_tokenizer(tiny_pair.student)
    loose = encode_chats(load_rows(tiny_pair.rows).rows, tokenizer, 128).examples  # type: ignore[arg-type]
    total, tokens = 0.0, 0
    for example in loose:
        ids, labels = (torch.tensor([example[key]]) for key in ("input_ids", "labels"))  # type: ignore[literal-required]
        with torch.no_grad():
            found = theirs(input_ids=ids).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(found, labels[0, 1:], reduction="sum"))
        tokens += int((labels[0, 1:] != -100).sum())
    assert ours == pytest.approx(total / tokens, rel=1e-5)
    assert ours < plain


def test_half_precision_with_gradient_checkpointing(distil: Distil, tmp_path: Path) -> None:
    run = distil(
        tmp_path / "run",
        model__dtype="bfloat16",
        training__gradient_checkpointing=True,
        data__packing=True,
        **LORA,
    )
    kept = load_file(run / "student" / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in kept.values())
    assert all(tensor.norm() > 0 for name, tensor in kept.items() if "lora_B" in name)


def test_a_run_that_was_moved_with_its_base_still_loads(adapted: Path, tmp_path: Path) -> None:
    shutil.copytree(adapted / "student", tmp_path / "moved" / "student")
    file = tmp_path / "moved" / "student" / "adapter_config.json"
    kept = json.loads(file.read_text())
    (tmp_path / "moved" / "base").symlink_to(kept["base_model_name_or_path"])
    file.write_text(json.dumps({**kept, "base_model_name_or_path": "/was/here/base"}))
    assert locate_model(tmp_path / "moved" / "student").path == str(tmp_path / "moved" / "base")
    (tmp_path / "moved" / "base").unlink()
    with pytest.raises(InputError, match="base model /was/here/base does not exist"):
        locate_model(tmp_path / "moved" / "student")


def test_f26_another_base_of_the_same_shape_is_refused(
    adapted: Path, distil: Distil, tiny_pair: Any, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(tiny_pair.student, first)
    run = distil(tmp_path / "run", model__student=str(first), lora__merge=True, **LORA)
    below = str(adapted / "student")
    nested = distil(tmp_path / "nested", model__student=below, **LORA) / "student"
    assert not (run / "student" / "base_model.json").exists()
    adapter, moved = run / "adapter", tmp_path / "moved"
    ours = logits(load_model(locate_model(adapter)))
    half = load_model(locate_model(adapter), dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    shutil.copytree(adapter, moved)
    first.rename(second)
    kept = json.loads((moved / "adapter_config.json").read_text())
    kept["base_model_name_or_path"] = str(second)
    (moved / "adapter_config.json").write_text(json.dumps(kept))
    torch.testing.assert_close(logits(load_model(locate_model(moved))), ours, rtol=0, atol=0)
    weights = load_file(second / "model.safetensors")
    save_file({n: x + 0.01 for n, x in weights.items()}, second / "model.safetensors")
    with pytest.raises(InputError, match="second are not those that the adapter was trained on"):
        load_model(locate_model(moved))
    (moved / "base_model.json").unlink()
    assert torch.isfinite(logits(load_model(locate_model(moved)))).all()
    (moved / "base_model.json").write_text("{")
    with pytest.raises(InputError, match=r"base_model\.json is damaged; remove it"):
        load_model(locate_model(moved))
    assert torch.isfinite(logits(load_model(locate_model(nested)))).all()
    kept = json.loads((nested / "base_model.json").read_text())
    (nested / "base_model.json").write_text(json.dumps({"weights": kept["weights"][::-1]}))
    with pytest.raises(InputError, match=f"its base model {below} are not"):
        load_model(locate_model(nested))


def test_the_built_in_student_is_saved_for_its_adapter(distil: Distil, tmp_path: Path) -> None:
    text = tmp_path / "few.txt"
    text.write_text("Few words to measure on.\n" * 100, encoding="utf-8")
    built_in = {"model__teacher": "builtin", "model__student": "builtin", "data__train": "builtin"}
    run = distil(tmp_path / "run", data__eval=str(text), training__max_steps=1, **built_in, **LORA)
    assert locate_model(run / "student").path == str((run / "base").resolve())
    assert list(answer(str(run), "The", 3, 0.0, 0, False))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("lm_head",), "lm_head is the output head"),
        (("q_prj",), "did you mean q_proj"),
        (("x",), "there are down_proj"),
    ],
)
def test_layers_that_cannot_be_adapted_are_named(given: tuple[str, ...], expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        add_adapters(tiny(1), LoraConfig(rank=2, target_modules=given), "x", 0)


def test_settings() -> None:
    config = load_config(None, [("lora.rank", 2), ("lora.target_modules", "q_proj, v_proj")])
    assert config.lora.target_modules == ("q_proj", "v_proj")
    with pytest.raises(InputError, match=r"lora\.dora has no effect without lora\.rank"):
        load_config(None, [("lora.dora", True)])
    with pytest.raises(InputError, match="name at least one layer"):
        load_config(None, [("lora.rank", 2), ("lora.target_modules", ",")])


def test_without_peft_the_command_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"pip install 'kdlosses\[lora\]'"):
        check_peft(LoraConfig(rank=2))
