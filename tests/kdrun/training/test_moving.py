"""Schedules, state and sums in training: what is logged, what a resumed run continues with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bare import bare_arguments

from kdlosses import Linear, Step, TokenWeighting, get_loss, get_weight
from kdrun import DistillTrainer
from kdrun.cli import main
from kdrun.config.load import load_config
from kdrun.data.collate import Collator
from kdrun.errors import InputError, TrainingError

SPEC = "0.5*skew_forward_kl_chunked + 2*taid_chunked"


def make(seed: int) -> Any:
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=31,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            attention_dropout=0.1,
        )
    )


def trainer(
    folder: Path, spec: str = SPEC, token_weight: Any = None, **options: Any
) -> DistillTrainer:
    generator = torch.Generator().manual_seed(0)
    data = []
    for length in (5, 12, 8, 6, 9, 7, 11, 10):
        ids = torch.randint(3, 31, (length,), generator=generator).tolist()
        data.append({"input_ids": ids, "labels": [-100] * 2 + ids[2:]})
    loss = get_loss(
        spec,
        compiled=False,
        schedules={"temperature": Step(values=(1, 2), at=(0.5,))}
        | ({"alpha": Linear(start=0.1, end=0.5)} if "skew" in spec else {}),
    )
    return DistillTrainer(
        model=make(1),
        teacher=make(0),
        loss=loss,
        kd_ratio=Linear(start=0.2, end=0.8),
        token_weight=token_weight,
        args=bare_arguments(
            folder,
            max_steps=6,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            save_steps=3,
            logging_steps=1,
            learning_rate=1e-2,
            **options,
        ),
        data_collator=Collator(0),
        train_dataset=data,
        eval_dataset=data,
    )


def test_terms_and_moving_values_are_logged_as_the_step_used_them(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.train()
    lines = [line for line in run.state.log_history if "class_loss" in line]
    assert len(lines) == 6
    for step, line in enumerate(lines):
        assert line["kd_ratio"] == pytest.approx(0.2 + 0.6 * step / 6)
        assert line["temperature"] == (1.0 if step < 3 else 2.0)
        assert line["skew_forward_kl.alpha"] == pytest.approx(0.1 + 0.4 * step / 6)
        terms = line["kd_loss/skew_forward_kl"], line["kd_loss/taid"]
        assert line["kd_loss"] == pytest.approx(0.5 * terms[0] + 2 * terms[1], rel=1e-5)
        ratio = line["kd_ratio"]
        total = (1 - ratio) * line["class_loss"] + ratio * line["kd_loss"]
        assert line["loss"] == pytest.approx(total, rel=1e-5)
    # The first step has nothing to compare its loss with; then the line 0.4 + 0.6 progress leads.
    assert [line["taid.t"] for line in lines] == pytest.approx([0.4, 0.4, 0.6, 0.7, 0.8, 0.9])
    # The state saw the whole step's mean, over both micro-batches.
    assert lines[3]["taid.previous"] == pytest.approx(lines[2]["kd_loss/taid"], rel=1e-6)
    measured = run.evaluate()
    assert measured["eval_kd_loss"] == pytest.approx(
        0.5 * measured["eval_kd_loss/skew_forward_kl"] + 2 * measured["eval_kd_loss/taid"]
    )


def test_a_resumed_run_continues_schedules_and_state_bit_for_bit(tmp_path: Path) -> None:
    whole = trainer(tmp_path)
    whole.train()
    resumed = trainer(tmp_path / "elsewhere")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert resumed.objective.moving_values == whole.objective.moving_values
    assert resumed.objective.moving_values["taid.momentum"] != 0


def weighting() -> TokenWeighting:
    return TokenWeighting(get_weight("top_entropy:share=0.3"), "both", "running")


def test_token_weights_are_logged_and_their_state_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole = trainer(tmp_path, token_weight=weighting())
    whole.train()
    lines = [line for line in whole.state.log_history if "class_loss" in line]
    # An indicator: its mean is the share of the tokens; the threshold follows from the shares.
    threshold, means = 0.0, []
    for line in lines:
        assert line["token_weight"] == pytest.approx(line["token_weight_share"])
        assert line["weight.threshold"] == pytest.approx(threshold)
        assert line["weight.running_mean"] == pytest.approx(sum(means or [1.0]) / len(means or [1]))
        means.append(line["token_weight"])
        threshold = max(0.0, threshold + 0.5 * (means[-1] - 0.3))
    resumed = trainer(tmp_path / "elsewhere", token_weight=weighting())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert resumed.objective.moving_values == whole.objective.moving_values
    other = trainer(tmp_path / "other", token_weight="entropy")
    with pytest.raises(TrainingError, match="was saved with the token weight TopEntropy"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_checkpoint_of_another_loss_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path).train()
    other = trainer(tmp_path / "other", "taid_chunked")
    with pytest.raises(
        TrainingError, match=r"checkpoint-3: the state was saved with the loss .* is taid"
    ):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_teacher_is_needed_where_a_schedule_will_come_above_0() -> None:
    with pytest.raises(ValueError, match="teacher: needed"):
        DistillTrainer(make(1), None, "forward_kl", Linear(start=0, end=0.5))


def run(*arguments: str) -> int:
    import sys

    argv, sys.argv = sys.argv, ["kdrun", *arguments]
    try:
        main()
    except SystemExit as error:
        return int(error.code or 0)
    finally:
        sys.argv = argv
    return 0


def test_the_command_takes_a_sum_and_schedules(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    schedules = "{kd_ratio: {kind: linear, start: 0, end: 1}, alpha: {kind: constant, value: 0.2}}"
    code = run(
        *("--loss", "forward_kl_chunked + 0.5*skew_reverse_kl_chunked", "--max-steps", "3"),
        *("--set", f"loss.schedules={schedules}", "--set", "loss.compiled=false"),
        *("--set", "training.logging_steps=1", "--output", str(folder)),
    )
    assert code == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "class_loss" in line]
    assert [line["kd_ratio"] for line in steps] == [0.0, pytest.approx(1 / 3), pytest.approx(2 / 3)]
    assert steps[0]["kd_loss"] == 0
    assert steps[1]["kd_loss/skew_reverse_kl"] > 0
    assert steps[1]["skew_reverse_kl.alpha"] == 0.2
    again = load_config(folder / "config.yaml")
    assert again.loss.schedules["kd_ratio"](0.25) == 0.25


@pytest.mark.parametrize(
    ("schedules", "message"),
    [
        ({"kd_ratio": {"kind": "linear", "start": 0, "end": 1.5}}, r"within \[0, 1\]"),
        ({"alpha": {"kind": "linear", "start": 0}}, "loss.schedules.alpha.*Field required"),
        ({"alpha": {"kind": "lin", "start": 0, "end": 1}}, "'lin' found.*'linear'"),
    ],
)
def test_schedules_without_meaning_are_refused_in_the_configuration(
    schedules: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_config(None, [("loss.schedules", schedules)])
