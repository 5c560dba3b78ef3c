"""The load-balancing loss of a student with experts, against the model's own and autograd."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bare import bare_arguments

import kdlosses
from kdrun import DistillTrainer
from kdrun.data.collate import Collator
from kdrun.models.heads import install
from kdrun.models.routers import find_balancing

VOCAB, COEFFICIENT = 37, 10.0
FAMILIES = ("Mixtral", "Qwen3Moe", "Olmoe", "GraniteMoe", "GptOss")


def make(seed: int, family: str = "Mixtral", **options: Any) -> Any:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 16,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_dropout": 0.0,
        **options,
    }
    config = getattr(transformers, f"{family}Config")(**settings)
    return getattr(transformers, f"{family}ForCausalLM")(config)


def balanced(seed: int, family: str = "Mixtral") -> Any:
    return make(seed, family, output_router_logits=True, router_aux_loss_coef=COEFFICIENT)


def rows() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (9, 14, 6, 11)]
    return [{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in ids]


class Gradients(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.found = {n: p.grad.clone() for n, p in named if p.grad is not None}


def train(
    folder: Path, student: Any, loss: str = "forward_kl_chunked", **options: Any
) -> tuple[DistillTrainer, dict[str, torch.Tensor]]:
    trainer = DistillTrainer(
        model=student,
        teacher=make(0),
        loss=kdlosses.get_loss(loss, compiled=False) if loss.endswith("_chunked") else loss,
        args=bare_arguments(
            folder,
            max_steps=1,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_grad_norm=0.0,
            logging_steps=1,
            **{"learning_rate": 1e-2, **options},
        ),
        data_collator=Collator(0),
        train_dataset=rows(),
        eval_dataset=rows(),
    )
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return trainer, gradients.found


def expected(student: Any, trainer: DistillTrainer) -> tuple[dict[str, torch.Tensor], float]:
    """Gradients of plain autograd, with the model's own load-balancing loss; and that loss."""
    teacher, student = make(0), student.train()
    total, tokens = torch.zeros(()), 0
    aux = torch.zeros(())
    sampled, _ = trainer.step_batches
    for batch in sampled:
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        out = student(**given, output_router_logits=True)
        q = torch.log_softmax(out.logits, -1)
        with torch.no_grad():
            p = torch.log_softmax(teacher(**given).logits, -1)
        kept = labels != -100
        ce = -q.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        total = total + (0.5 * (ce + kl) * kept).sum()
        tokens += int(kept.sum())
        aux = aux + out.aux_loss / len(sampled)
    (total / tokens + COEFFICIENT * aux).backward()
    named = student.named_parameters()
    return {n: p.grad for n, p in named if p.grad is not None}, float(aux.detach())


@pytest.mark.parametrize("loss", ["forward_kl_chunked", "forward_kl"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_f5_gradients_are_those_of_the_objective_and_the_models_own_balancing_loss(
    tmp_path: Path, loss: str, checkpointing: bool
) -> None:
    trainer, ours = train(tmp_path, balanced(1), loss, activation_checkpointing=checkpointing)
    theirs, aux = expected(balanced(1), trainer)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)
    line = trainer.state.log_history[0]
    assert line["aux_loss"] == pytest.approx(aux, rel=1e-5)
    parts = 0.5 * line["class_loss"] + 0.5 * line["kd_loss"]
    assert line["loss"] == pytest.approx(parts + COEFFICIENT * aux, rel=1e-5)
    _, without = train(tmp_path, make(1), loss)
    assert any(not torch.allclose(ours[n], x, rtol=1e-2) for n, x in without.items() if "gate" in n)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("whole", [False, True])
def test_f5_the_loss_is_the_classes_own(family: str, whole: bool) -> None:
    from kdrun.models.heads import call, find_split

    model = balanced(1, family).train()
    split = find_split(model)
    assert split.reason is None
    assert find_balancing(model).coefficient == COEFFICIENT
    ids = torch.arange(3, 17).view(2, 7)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    theirs = model(input_ids=ids, attention_mask=mask, output_router_logits=True).aux_loss
    install(model, replace(split, reason="made whole") if whole else split, balanced=True)
    ours = call(model, lambda source: {}, ids, mask)["aux_loss"]
    torch.testing.assert_close(ours, theirs)
    model.eval()
    assert "aux_loss" not in call(model, lambda source: {}, ids, mask)


def test_f5_held_out_measures_and_gradient_parts_leave_it_out(tmp_path: Path) -> None:
    found = []
    for student in (make(1), balanced(1)):
        trainer, _ = train(tmp_path, student, learning_rate=0.0)
        trainer.get_batch_samples(
            iter(list(trainer.get_train_dataloader())), 2, torch.device("cpu")
        )
        trainer.model.zero_grad()
        trainer.model.train()
        trainer.backward_at(0.0, trainer.step_batches[0][0])
        gate = trainer.model.model.layers[0].mlp.gate.weight.grad
        found.append((trainer.evaluate()["eval_ce"], gate))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1])


def test_f5_it_reaches_adapters(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from kdrun.config.training_sections import LoraConfig
    from kdrun.models.adapters import add_adapters

    found = []
    for student in (make(1), balanced(1)):
        adapted = add_adapters(student, LoraConfig(rank=2, target_modules=("q_proj",)), "x", 3)
        trainer, gradients = train(tmp_path, adapted)
        found.append(torch.cat([gradients[name].flatten() for name in sorted(gradients)]))
    assert "aux_loss" in trainer.state.log_history[0]
    assert not torch.allclose(*found, rtol=1e-2)


def test_f5_what_is_left_out_is_said() -> None:
    asked = find_balancing(make(1, router_aux_loss_coef=0.01))
    assert asked.coefficient == 0
    assert asked.note is not None
    assert "set output_router_logits to true in its config.json" in asked.note
    assert find_balancing(make(1, router_aux_loss_coef=0.0)).note is None
    dense = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    assert find_balancing(dense).note is None
    added = find_balancing(balanced(1)).note
    assert added is not None
    assert "is added with weight 10" in added
