"""A loss that is not finite: the run stops, or leaves the step out; both name step and rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bare import bare_arguments

import kdlosses
from kdrun import DistillTrainer
from kdrun.data.collate import Collator
from kdrun.data.origins import Numbered, Origins
from kdrun.data.records import Position
from kdrun.errors import TrainingError
from kdrun.training.guard import LossGuard

Distil = Callable[..., Path]
VOCAB, POISON = 37, 36


def student(seed: int) -> Any:
    """A model whose hidden states are NaN behind one token."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            tie_word_embeddings=False,
        )
    )
    model.model.embed_tokens.weight.data[POISON] = float("nan")
    return model


def teacher() -> Any:
    model = student(0)
    model.model.embed_tokens.weight.data[POISON] = 0.0
    return model


def rows(poisoned: tuple[int, ...], count: int = 12) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        ids = torch.randint(3, POISON, (6 + number % 3,), generator=generator).tolist()
        if number in poisoned:
            ids[1] = POISON
        found.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return found


class InOrder(DistillTrainer):
    """Rows in their order, so that it is known which step has which."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def train(
    folder: Path,
    data: Any,
    guard: LossGuard,
    loss: str,
    model: Any = None,
    callbacks: Any = None,
    kd_ratio: Any = 0.5,
    **options: Any,
) -> InOrder:
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "logging_steps": 1, **options}
    trainer = InOrder(
        model=student(1) if model is None else model,
        callbacks=callbacks,
        kd_ratio=kd_ratio,
        teacher=teacher(),
        loss=kdlosses.get_loss(loss, **({"compiled": False} if "chunked" in loss else {})),
        args=bare_arguments(
            folder,
            learning_rate=1e-2,
            weight_decay=0.1,
            lr_scheduler_type="constant",
            gradient_accumulation_steps=2,
            **settings,
        ),
        data_collator=Collator(0),
        train_dataset=Numbered(data),
    )
    trainer.guard = guard
    trainer.train()
    return trainer


def state(trainer: InOrder) -> list[torch.Tensor]:
    """Weights, and what the optimiser keeps of each."""
    kept = [value for entry in trainer.optimizer.state.values() for value in entry.values()]
    return [*(p.detach() for p in trainer.model.parameters()), *kept]


@pytest.mark.parametrize("loss", ["forward_kl", "forward_kl_chunked"])
def test_a_run_stops_and_names_the_step_and_the_rows(tmp_path: Path, loss: str) -> None:
    positions = [Position("rows.jsonl", 10 + number) for number in range(12)]
    guard = LossGuard(name_rows=Origins(positions).name)
    with pytest.raises(TrainingError, match=r"loss is nan at step 2 .*rows\.jsonl, line 17;"):
        train(tmp_path, rows(poisoned=(7,)), guard, loss)
    with pytest.raises(TrainingError, match=r"at step 2 .*from training rows 4, 5 \(counted from"):
        train(tmp_path, rows(poisoned=(4, 5)), LossGuard(), loss)


def test_schedules_follow_the_number_of_the_step_whether_steps_are_left_out(
    tmp_path: Path,
) -> None:
    """One third of the way from 0.1 to 0.7 a step; the second one is left out."""
    ratio = kdlosses.Linear(start=0.1, end=0.7)
    guard = LossGuard(skip=True)
    trainer = train(tmp_path, rows(poisoned=(7,)), guard, "forward_kl", kd_ratio=ratio)
    first, _, third, _ = trainer.state.log_history
    assert (first["kd_ratio"], third["kd_ratio"]) == pytest.approx((0.1, 0.5))


@pytest.mark.parametrize("loss", ["forward_kl", "taid_chunked"])
def test_a_step_that_is_left_out_leaves_weights_optimiser_and_state_untouched(
    tmp_path: Path, loss: str
) -> None:
    """Rows 4 to 7 are the second step: without it, the steps are the first and the third."""
    said: list[str] = []
    data = rows(poisoned=(7,))
    trainer = train(tmp_path, data, LossGuard(skip=True, say=said.append), loss)
    without = train(tmp_path, data[:4] + data[8:], LossGuard(), loss, max_steps=2)
    assert trainer.guard.skipped == 1
    for ours, theirs in zip(state(trainer), state(without), strict=True):
        assert torch.isfinite(ours).all() or ours.shape == (VOCAB, 16)
        assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))
    first, skipped, third, _ = trainer.state.log_history
    assert skipped["skipped_steps"] == 1
    assert "loss" not in skipped
    assert "grad_norm" not in skipped
    one, two = without.state.log_history[:2]
    for ours, theirs in ((first, one), (third, two)):
        assert "skipped_steps" not in ours
        for key in ("loss", "class_loss", "kd_loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-6)
    (line,) = said
    assert "at step 2" in line
    assert "row" in line
    json.dumps(trainer.state.log_history, allow_nan=False)


def test_means_of_a_line_count_the_steps_that_were_kept(tmp_path: Path) -> None:
    data = rows(poisoned=(7,))
    trainer = train(tmp_path, data, LossGuard(skip=True), "forward_kl", logging_steps=3)
    without = train(
        tmp_path, data[:4] + data[8:], LossGuard(), "forward_kl", max_steps=2, logging_steps=2
    )
    ours, theirs = trainer.state.log_history[0], without.state.log_history[0]
    assert ours["skipped_steps"] == 1
    for key in ("loss", "class_loss", "kd_loss"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-6)


class SpoiledGradients(transformers.TrainerCallback):
    """The loss of the second step is finite, and a gradient of it is not."""

    step = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step + 1

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf") if self.step == 2 else gradient


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_is_no_step_either(
    tmp_path: Path, max_grad_norm: float
) -> None:
    data = rows(poisoned=())

    def run(guard: LossGuard) -> InOrder:
        spoil = SpoiledGradients()
        model = student(1)
        model.lm_head.weight.register_hook(spoil)
        return train(
            tmp_path,
            data,
            guard,
            "forward_kl_chunked",
            model=model,
            callbacks=[spoil],
            max_grad_norm=max_grad_norm,
        )

    with pytest.raises(TrainingError, match=r"norm of the gradients is (inf|nan) at step 2"):
        run(LossGuard())
    trainer = run(LossGuard(skip=True))
    without = train(
        tmp_path,
        data[:4] + data[8:],
        LossGuard(),
        "forward_kl_chunked",
        max_steps=2,
        max_grad_norm=max_grad_norm,
    )
    assert trainer.guard.skipped == 1
    for ours, theirs in zip(state(trainer), state(without), strict=True):
        assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))


def test_too_many_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    guard = LossGuard(skip=True, limit=2)
    with pytest.raises(TrainingError, match=r"at step 3 .*after 2 consecutive steps"):
        train(tmp_path, rows(poisoned=(0, 4, 8)), guard, "forward_kl")
    # A good step in between begins the count anew.
    train(tmp_path, rows(poisoned=(0, 8)), LossGuard(skip=True, limit=1), "forward_kl")


def test_rows_are_named_by_their_lines_also_when_packed_or_cut_from_text() -> None:
    positions = [Position("a.jsonl", 2 * number + 1) for number in range(6)]
    assert Origins(positions).name([1, 4]) == "a.jsonl, lines 3, 9"
    packed = Origins(positions, members=[[0, 5], [2]])
    assert packed.name([0]) == "a.jsonl, lines 1, 11"
    assert Origins().name([0, 3]) == "windows 1, 4 of the text"


@pytest.mark.parametrize("packing", [False, True])
def test_a_run_names_the_lines_of_its_file(
    distil: Distil, tiny_pair: Any, tmp_path: Path, packing: bool
) -> None:
    """A letter that stands in one line only has an infinite embedding in the student."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_pair.student)
    (token,) = tokenizer("Z", add_special_tokens=False)["input_ids"]
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(tiny_pair.student)
    config.tie_word_embeddings = False
    model = transformers.LlamaForCausalLM(config)
    model.model.embed_tokens.weight.data[token, 0] = float("inf")
    model.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    lines = tiny_pair.rows.read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[22])
    lines[22] = json.dumps({**row, "prompt": f"Z {row['prompt']}"})
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    given: dict[str, Any] = {
        "model__student": str(tmp_path / "student"),
        "data__train": str(tmp_path / "rows.jsonl"),
        "data__eval": str(tiny_pair.rows),
        "data__packing": packing,
        "training__max_steps": None,  # each row once
    }
    with pytest.raises(TrainingError, match=r"rows\.jsonl, lines? (\d+, )*23\b"):
        distil(tmp_path / "stops", **given)
    run = distil(tmp_path / "skips", training__nan_loss="skip", **given)
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["skipped_steps"] == 1
    logged = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in logged]
    assert sum(line.get("skipped_steps", 0) for line in found) == 1
