"""The term on hidden states in training, against a second, plain forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bare import bare_arguments
from torch.nn.functional import cosine_similarity

import kdlosses
from kdrun import DistillTrainer
from kdrun.data.collate import Collator
from kdrun.errors import TrainingError
from kdrun.models.hidden import find_layers, recorded
from kdrun.training.features import Selected

VOCAB, WEIGHT, RATE = 37, 0.3, 0.1
LENGTHS = [9, 6, 12, 5]


def make(seed: int, width: int, layers: int) -> Any:
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=width,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=2,
        )
    )


def rows() -> list[dict[str, list[int]]]:
    """Rows of uneven length; the first three tokens of each are a prompt."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for length in LENGTHS:
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    return found


class InOrder(DistillTrainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def train(folder: Path, spec: str, student: Any, *, teacher_width: int = 16, **options: Any) -> Any:
    """One step of SGD on all rows; ratio 0, so that nothing else comes from the teacher."""
    term = kdlosses.get_features(
        spec, kdlosses.Hidden(3, teacher_width), kdlosses.Hidden(2, 16), seed=4, chunk_size=5
    )
    before = [weight.detach().clone() for weight in term.parameters()]
    settings = {
        "max_steps": 1,
        "per_device_train_batch_size": len(LENGTHS),
        "learning_rate": RATE,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
    }
    trainer = InOrder(
        model=student,
        teacher=make(0, teacher_width, 3),
        loss=kdlosses.get_loss("forward_kl_chunked", compiled=False),
        kd_ratio=0.0,
        args=bare_arguments(folder, **settings | options),
        data_collator=Collator(0),
        train_dataset=rows(),
        features=term,
    )
    trainer.train()
    return trainer, before


def expected_step(
    student: Any, teacher: Any, projector: torch.Tensor | None, everything: bool = False
) -> tuple[float, dict[str, torch.Tensor], torch.Tensor | None]:
    """The mean of the cosine distances of layers 2-1, row by row, and weights after one step."""
    kept = None if projector is None else projector.clone().requires_grad_()
    class_loss = distances = torch.zeros(())
    tokens = 0
    for row in rows():
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            t = teacher(input_ids=ids, output_hidden_states=True).hidden_states[2][0]
        out = student(input_ids=ids, output_hidden_states=True)
        s = out.hidden_states[1][0]
        if kept is not None:
            s = s @ kept.T
        # Position i predicts token i + 1; the first three tokens are not learned.
        spots = slice(None) if everything else slice(2, -1)
        distances = distances + (1 - cosine_similarity(t, s, dim=-1))[spots].sum()
        logits = out.logits[0, 2:-1]
        class_loss = class_loss + torch.nn.functional.cross_entropy(
            logits, ids[0, 3:], reduction="sum"
        )
        tokens += ids.shape[1] - 3
    loss = (class_loss + WEIGHT * distances) / tokens
    trained = [weight for weight in student.parameters() if weight.requires_grad]
    loss.backward()
    after = {
        name: (weight - RATE * weight.grad).detach()
        for name, weight in student.named_parameters()
        if weight.requires_grad and weight.grad is not None
    }
    assert trained
    projected = None if kept is None else (kept - RATE * kept.grad).detach()
    return (distances / tokens).item(), after, projected


def compare(trainer: Any, found: float, after: dict[str, torch.Tensor]) -> None:
    assert trainer.state.log_history[0]["feature_loss"] == pytest.approx(found, rel=1e-5)
    now = dict(trainer.model.named_parameters())
    for name, value in after.items():
        assert (now[name] - value).abs().max() < 2e-6, name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"activation_checkpointing": True},
    ],
    ids=["whole", "accumulated", "checkpointed"],
)
@pytest.mark.parametrize("teacher_width", [16, 24])
def test_a_step_is_that_of_a_plain_forward_pass(
    tmp_path: Path, teacher_width: int, options: dict[str, Any]
) -> None:
    spec = f"hidden_cosine:layers=2-1,weight={WEIGHT}"
    trainer, before = train(tmp_path, spec, make(1, 16, 2), teacher_width=teacher_width, **options)
    assert len(before) == (teacher_width != 16)
    projector = before[0] if before else None
    found, after, projected = expected_step(
        make(1, 16, 2), make(0, teacher_width, 3).eval(), projector
    )
    compare(trainer, found, after)
    if projected is not None:
        assert (trainer.features.projectors[0] - projected).abs().max() < 2e-6
        assert (projected - before[0]).abs().max() > 1e-4


def test_all_tokens_count_if_asked(tmp_path: Path) -> None:
    spec = f"hidden_cosine:layers=2-1,weight={WEIGHT},tokens=all"
    trainer, _ = train(tmp_path, spec, make(1, 16, 2))
    found, after, _ = expected_step(make(1, 16, 2), make(0, 16, 3).eval(), None, everything=True)
    compare(trainer, found, after)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_adapters_learn_from_it(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def adapted() -> Any:
        model = make(1, 16, 2)
        torch.manual_seed(3)
        return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))

    trainer, _ = train(tmp_path, f"hidden_cosine:layers=2-1,weight={WEIGHT}", adapted())
    found, after, _ = expected_step(adapted(), make(0, 16, 3).eval(), None)
    assert after
    compare(trainer, found, after)


def test_states_are_those_before_the_final_norm() -> None:
    model = make(2, 16, 2).eval()
    ids = torch.arange(5)[None]
    with torch.no_grad(), recorded(find_layers(model, "student"), [1, 2]) as found:
        out = model(input_ids=ids, output_hidden_states=True)
    assert torch.equal(found[1], out.hidden_states[1])
    assert torch.equal(model.model.norm(found[2]), out.hidden_states[2])


def test_packed_rows_are_several_sequences_without_their_padding() -> None:
    inputs = {
        "input_ids": torch.zeros(2, 7, dtype=torch.long),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 0], [0, 1, 2, 3, 0, 1, 2]]),
        "shift_labels": torch.tensor(
            [[-100, 5, -100, 5, -100, -100, -100], [5, 5, 5, -100] * 1 + [7, 7, -100]]
        ),
    }
    supervised = Selected.of(inputs, True)
    assert supervised.places.tolist() == [1, 3, 7, 8, 9, 11, 12]
    groups = supervised.sequences.tolist()
    assert [groups.count(each) for each in dict.fromkeys(groups)] == [1, 1, 3, 2]
    everything = Selected.of(inputs, False)
    assert everything.places.tolist() == [*range(5), *range(7, 14)]


def test_a_relation_stays_within_its_row(tmp_path: Path) -> None:
    """With rows in one batch or one by one, the value is the same."""
    found = []
    for options in ({}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}):
        trainer, _ = train(
            tmp_path, "token_relation:layers=last", make(1, 16, 2), teacher_width=24, **options
        )
        assert not trainer.features.projectors
        found.append(trainer.state.log_history[0]["feature_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] > 1e-3


def test_a_state_that_is_not_finite_is_reported_with_the_term(tmp_path: Path) -> None:
    teacher = make(0, 16, 3)
    teacher.model.layers[2].mlp.down_proj.weight.data[0] = float("nan")
    shapes = kdlosses.Hidden(3, 16), kdlosses.Hidden(2, 16)
    trainer = InOrder(
        model=make(1, 16, 2),
        teacher=teacher,
        kd_ratio=0.0,
        args=bare_arguments(tmp_path, max_steps=1),
        data_collator=Collator(0),
        train_dataset=rows(),
        features=kdlosses.get_features("hidden_mse:layers=last", *shapes),
    )
    with pytest.raises(TrainingError, match=r"nan at step 1 \(class loss .*feature loss nan\)"):
        trainer.train()


def test_a_live_teacher_is_needed(tmp_path: Path) -> None:
    term = kdlosses.get_features("hidden_mse", kdlosses.Hidden(3, 16), kdlosses.Hidden(2, 16))
    with pytest.raises(ValueError, match="features: need the hidden states of a live teacher"):
        DistillTrainer(
            model=make(1, 16, 2),
            teacher=None,
            kd_ratio=0.0,
            args=bare_arguments(tmp_path),
            features=term,
        )
