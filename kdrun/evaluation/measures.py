"""Measures of a model's distributions on held-out rows, through the trainer that trains it."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kdlosses import TokenLoss
    from kdrun.models.heads import Teacher
    from kdrun.trainer import DistillTrainer

_KEYS = (
    "eval_ce",
    "eval_forward_kl",
    "eval_reverse_kl",
    "eval_top1_agreement",
    "eval_calibration_error",
    "eval_tokens",
)


def held_out_measures(trainer: DistillTrainer) -> dict[str, Any]:
    """Sums over supervised tokens of the trainer's held-out rows, each over their number.

    Those that need a teacher are None without one. An evaluation at the present step, such as the
    one at the end of a training, is not done again.
    """
    step = trainer.state.global_step
    done = (line for line in reversed(trainer.state.log_history) if line.get("step") == step)
    found = next((line for line in done if "eval_ce" in line), None) or trainer.evaluate()
    return {key: found[key] for key in _KEYS}


def measure_model(
    model: PreTrainedModel,
    teacher: Teacher | None,
    loss: TokenLoss,
    examples: Any,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
) -> dict[str, Any]:
    """The same of any model, as a run measures its student.

    Args:
        model: a causal language model.
        teacher: what it is compared with, or None.
        loss: gives the cut of the vocabulary and the chunk size.
        examples: rows with ``input_ids`` and ``labels``.
        tokenizer: gives the padding.
        batch_size: rows at once.
    """
    from transformers import TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    from kdrun.data.collate import Collator
    from kdrun.models.heads import uninstall
    from kdrun.trainer import DistillTrainer

    with tempfile.TemporaryDirectory() as unused:
        arguments = TrainingArguments(
            output_dir=unused,
            per_device_eval_batch_size=batch_size,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        trainer = DistillTrainer(
            model=model,
            teacher=teacher,
            loss=loss,
            kd_ratio=0.0,
            args=arguments,
            data_collator=Collator(tokenizer.pad_token_id),
            eval_dataset=examples,
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)  # the caller shows a table
        found = held_out_measures(trainer)
        uninstall(model)
    return found
