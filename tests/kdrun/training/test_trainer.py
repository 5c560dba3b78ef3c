"""DistillTrainer on tiny models: denominators, frozen teacher, evaluation, what is saved."""

from __future__ import annotations

import gc
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bare import bare_arguments

import kdlosses
from kdrun import DistillTrainer
from kdrun.data.collate import Collator
from kdrun.errors import TrainingError

VOCAB = 37


def make(seed: int, dropout: float = 0.0) -> Any:
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            attention_dropout=dropout,
            tie_word_embeddings=True,
        )
    )


def rows(lengths: list[int], seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of uneven length; the first three tokens of each are a prompt."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for length in lengths:
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        result.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    return result


def train(
    folder: Path,
    data: list[dict[str, list[int]]],
    *,
    loss: str = "forward_kl_chunked",
    kd_ratio: float = 0.5,
    with_teacher: bool = True,
    **options: Any,
) -> DistillTrainer:
    settings: dict[str, Any] = {
        "max_steps": 1,
        "per_device_train_batch_size": len(data),
        "learning_rate": 1e-2,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
    }
    settings.update(options)
    trainer = DistillTrainer(
        model=make(1),
        teacher=make(0, dropout=0.5) if with_teacher else None,
        loss=kdlosses.get_loss(loss, compiled=False) if loss.endswith("_chunked") else loss,
        kd_ratio=kd_ratio,
        args=bare_arguments(
            folder,
            **settings,
        ),
        data_collator=Collator(0),
        train_dataset=data,
        eval_dataset=data,
    )
    trainer.train()
    return trainer


def weights(trainer: DistillTrainer) -> torch.Tensor:
    return torch.cat([p.detach().cpu().flatten() for p in trainer.model.parameters()])


UNEVEN = [5, 12, 20, 6, 9, 4, 16, 11]


@pytest.mark.parametrize("loss", ["forward_kl", "forward_kl_chunked"])
@pytest.mark.parametrize("micro", [1, 2, 4])
def test_accumulation_changes_nothing_though_micro_batches_hold_uneven_numbers_of_tokens(
    tmp_path: Path, loss: str, micro: int
) -> None:
    whole = train(tmp_path, rows(UNEVEN), loss="forward_kl")
    split = train(
        tmp_path,
        rows(UNEVEN),
        loss=loss,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=len(UNEVEN) // micro,
    )
    torch.testing.assert_close(weights(split), weights(whole), rtol=0, atol=1e-6)
    logged = split.state.log_history[0]
    reference = whole.state.log_history[0]
    for key in ("loss", "class_loss", "kd_loss"):
        assert logged[key] == pytest.approx(reference[key], rel=1e-4)
    assert logged["loss"] == pytest.approx(
        0.5 * logged["class_loss"] + 0.5 * logged["kd_loss"], abs=2e-4
    )


def test_n12_the_last_short_window_is_stepped_and_normalised_by_its_own_tokens(
    tmp_path: Path,
) -> None:
    same = rows([9]) * 5
    trainer = train(
        tmp_path,
        same,
        max_steps=-1,
        num_train_epochs=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        learning_rate=1e-9,
    )
    norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    assert trainer.state.global_step == 2
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_n9_a_micro_batch_without_supervised_tokens_changes_nothing(tmp_path: Path) -> None:
    masked = [{"input_ids": [5, 6, 7, 8], "labels": [-100] * 4}]
    options: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    with_empty = train(tmp_path, [*masked, *rows([9])], **options)
    without = train(tmp_path, rows([9]))
    assert torch.isfinite(weights(with_empty)).all()
    torch.testing.assert_close(weights(with_empty), weights(without), rtol=0, atol=1e-6)


def test_r10_the_teacher_is_untouched_and_in_no_optimizer(tmp_path: Path) -> None:
    def digest(model: Any) -> str:
        data = b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters())
        return hashlib.sha256(data).hexdigest()

    trainer = train(tmp_path, rows(UNEVEN), max_steps=5)
    assert trainer.teacher is not None
    assert digest(trainer.teacher.model) == digest(make(0, dropout=0.5))
    optimised = {
        id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]
    }
    assert optimised == {id(parameter) for parameter in trainer.model.parameters()}
    assert not any(p.grad is not None for p in trainer.teacher.model.parameters())


def test_d20_evaluation_gives_the_training_loss_on_the_same_rows(tmp_path: Path) -> None:
    for loss, ratio in (("reverse_kl_chunked", 0.3), ("reverse_kl", 0.3), ("forward_kl", 0.0)):
        trainer = train(tmp_path, rows(UNEVEN), loss=loss, kd_ratio=ratio, learning_rate=0.0)
        found = trainer.evaluate()
        assert found["eval_loss"] == pytest.approx(trainer.state.log_history[0]["loss"], abs=1e-4)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_evaluation_measures_are_means_over_tokens_whatever_the_batches(
    tmp_path: Path, batch: int
) -> None:
    data = rows(UNEVEN)
    trainer = train(tmp_path, data, learning_rate=0.0, per_device_eval_batch_size=batch)
    found = trainer.evaluate()
    teacher, student = make(0).eval(), make(1).eval()
    sums = torch.zeros(4, dtype=torch.float64)
    tokens = 0
    for row in data:
        ids = torch.tensor([row["input_ids"]])
        labels = torch.tensor(row["labels"])[1:]
        p, q = (
            torch.log_softmax(model(ids).logits[0, :-1].double(), -1)
            for model in (teacher, student)
        )
        kept = labels != -100
        p, q, labels = p[kept], q[kept], labels[kept]
        tokens += len(labels)
        sums += torch.stack(
            [
                -q[torch.arange(len(labels)), labels].sum(),
                (p.exp() * (p - q)).sum(),
                (q.exp() * (q - p)).sum(),
                (p.argmax(-1) == q.argmax(-1)).sum().double(),
            ]
        )
    keys = ("eval_ce", "eval_forward_kl", "eval_reverse_kl", "eval_top1_agreement")
    assert found["eval_tokens"] == tokens
    assert [found[key] for key in keys] == pytest.approx((sums / tokens).tolist(), rel=1e-5)


def test_without_a_teacher_cross_entropy_is_trained_and_the_other_measures_are_null(
    tmp_path: Path,
) -> None:
    trainer = train(tmp_path, rows(UNEVEN), kd_ratio=0.0, with_teacher=False)
    line = trainer.state.log_history[0]
    assert line["loss"] == pytest.approx(line["class_loss"], abs=1e-4)
    assert line["kd_loss"] is None
    found = trainer.evaluate()
    assert found["eval_ce"] > 0
    assert found["eval_forward_kl"] is None
    with pytest.raises(ValueError, match="teacher: needed"):
        train(tmp_path, rows(UNEVEN), with_teacher=False)


def test_d21_kd_falls_when_the_student_learns_from_another_teacher(tmp_path: Path) -> None:
    trainer = train(
        tmp_path, rows(UNEVEN), max_steps=20, kd_ratio=1.0, optim="adamw_torch", learning_rate=1e-2
    )
    lines = [line["kd_loss"] for line in trainer.state.log_history if "kd_loss" in line]
    assert lines[-1] < 0.7 * lines[0]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path: Path) -> None:
    broken = make(1)
    broken.model.norm.weight.data.fill_(float("nan"))
    trainer = DistillTrainer(
        model=broken,
        teacher=make(0),
        loss=kdlosses.get_loss("forward_kl_chunked", compiled=False),
        args=bare_arguments(
            tmp_path,
            max_steps=1,
        ),
        data_collator=Collator(0),
        train_dataset=rows([9]),
    )
    with pytest.raises(TrainingError, match="at step 1"):
        trainer.train()


def peak_of_training(folder: Path, batch: int, accumulation: int) -> int:
    """The most bytes that two steps take, from the allocator's own records."""
    now, peak = 0, 0
    # What an earlier trainer left would be freed within the profile, which knows nothing of it.
    gc.collect()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        train(
            folder,
            rows([120] * 8),
            max_steps=2,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            optim="adamw_torch",
        )
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.cpu
def test_accumulating_eight_micro_batches_takes_no_more_memory_than_one(tmp_path: Path) -> None:
    """What a second micro-batch at a time would take is the measure of it."""
    # The first is not counted: a new process makes the allocator keep its blocks (32 MB, once).
    _, one, eight, twice = (
        peak_of_training(tmp_path, batch, accumulation)
        for batch, accumulation in ((1, 1), (1, 1), (1, 8), (2, 1))
    )
    micro_batch = twice - one
    assert micro_batch > 500_000
    assert abs(eight - one) < 0.2 * micro_batch


def test_a_step_whose_scaled_gradient_overflows_is_the_scalers_to_leave_out(
    tmp_path: Path, device: torch.device
) -> None:
    """As with fp16 on a GPU, where the first scale is mostly too large; here it is far larger."""
    trainer = DistillTrainer(
        model=make(1),
        teacher=make(0),
        loss=kdlosses.get_loss("forward_kl_chunked", compiled=False),
        args=bare_arguments(tmp_path, max_steps=12, logging_steps=1, learning_rate=1e-3),
        data_collator=Collator(0),
        train_dataset=rows(UNEVEN),
    )
    before = weights(trainer)
    scaler = torch.amp.GradScaler(device.type, init_scale=1e38, backoff_factor=1e-3)
    trainer.accelerator.scaler = scaler
    trainer.accelerator.native_amp = True
    trainer.accelerator.state._mixed_precision = "fp16"
    try:
        trainer.train()
    finally:
        trainer.accelerator.state._mixed_precision = "no"  # all accelerators share it
    assert trainer.state.global_step == 12
    assert scaler.get_scale() < 1e38
    assert trainer.guard.skipped == 0
    assert not torch.equal(weights(trainer), before)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_follows_float32(tmp_path: Path, precision: str) -> None:
    options: dict[str, Any] = {"max_steps": 5, "optim": "adamw_torch", "learning_rate": 1e-3}
    mixed = train(tmp_path, rows(UNEVEN), **options, **{precision: True})
    exact = train(tmp_path, rows(UNEVEN), **options)
    assert mixed.model.dtype == torch.float32
    for ours, theirs in zip(mixed.state.log_history[:5], exact.state.log_history[:5], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-2)


@pytest.mark.cpu
def test_one_process_takes_one_of_several_gpus(tmp_path: Path) -> None:
    arguments = bare_arguments(tmp_path, max_steps=1, per_device_train_batch_size=2)
    assert arguments.n_gpu == 0
    arguments._n_gpu = 2  # as where two are visible
    trainer = DistillTrainer(
        model=make(1),
        teacher=make(0),
        args=arguments,
        data_collator=Collator(0),
        train_dataset=rows(UNEVEN),
    )
    trainer.train()
    assert trainer.state.epoch == pytest.approx(2 / len(UNEVEN))


@pytest.mark.parametrize(
    ("arguments", "options", "name"),
    [
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor"),
        ({}, {"compute_metrics": len}, "compute_metrics"),
        ({}, {"compute_loss_func": len}, "compute_loss_func"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(
    tmp_path: Path, arguments: dict[str, Any], options: dict[str, Any], name: str
) -> None:
    with pytest.raises(ValueError, match=name):
        DistillTrainer(make(1), make(0), args=bare_arguments(tmp_path, **arguments), **options)
