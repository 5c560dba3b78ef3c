"""Keys of ``transformers.TrainingArguments`` in section ``trainer``: which may be set there."""

from __future__ import annotations

import dataclasses
import difflib
from functools import cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from kdrun.errors import InputError

_OWNED = {
    "output_dir": "output.dir",
    "max_steps": "training.max_steps",
    "num_train_epochs": "training.num_epochs",
    "per_device_train_batch_size": "training.batch_size",
    "per_device_eval_batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "activation_checkpointing": "training.gradient_checkpointing",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "torch_compile": "training.torch_compile",
    "bf16": "training.precision",
    "fp16": "training.precision",
    "bf16_full_eval": "training.precision",
    "fp16_full_eval": "training.precision",
    "logging_steps": "training.logging_steps",
    "logging_strategy": "training.logging_steps",
    "eval_steps": "training.eval_steps",
    "eval_strategy": "training.eval_steps",
    "save_steps": "training.save_steps",
    "save_strategy": "training.save_steps",
    "save_total_limit": "training.save_total_limit",
    "load_best_model_at_end": "training.keep_best",
    "metric_for_best_model": "training.keep_best",
    "greater_is_better": "training.keep_best",
    "seed": "training.seed",
    "data_seed": "training.seed",
    "report_to": "training.report_to",
    "fsdp": "training.fsdp",
    "fsdp_config": "training.fsdp",
    "deepspeed": "training.deepspeed",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "max_grad_norm": "optimizer.max_grad_norm",
    "lr_scheduler_type": "optimizer.scheduler",
    "lr_scheduler_kwargs": "optimizer.scheduler_kwargs",
    "warmup_steps": "optimizer.warmup_steps",
    "optim": "optimizer.name",
    "resume_from_checkpoint": "--resume",
}
_SCALED = "the loss of a step is divided by its tokens over all processes"
_MEASURES = "measures are sums over the tokens of all held-out rows"
_RESUMABLE = "a resumed run would not be equal to an uninterrupted one"
_REFUSED = {
    "average_tokens_across_devices": f"has no effect: {_SCALED}",
    "label_smoothing_factor": "has no effect: cross-entropy is that of the labels",
    "label_names": "has no effect: labels have one name",
    "use_liger_kernel": "has no effect: it replaces the loss, which is set by loss.spec",
    "liger_kernel_config": "has no effect: it replaces the loss, which is set by loss.spec",
    "auto_find_batch_size": "has no effect: the rows of a step are fixed; --dry-run estimates its "
    "memory",
    "prediction_loss_only": f"has no effect: {_MEASURES}",
    "include_for_metrics": f"has no effect: {_MEASURES}",
    "batch_eval_metrics": f"has no effect: {_MEASURES}",
    "eval_do_concat_batches": f"has no effect: {_MEASURES}",
    "eval_use_gather_object": f"has no effect: {_MEASURES}",
    "eval_accumulation_steps": f"has no effect: {_MEASURES}",
    "eval_on_start": "has no effect: the student is always evaluated before training",
    "logging_nan_inf_filter": "has no effect: training.nan_loss says what happens to such a loss",
    "disable_tqdm": "has no effect: kdrun has its own display",
    "remove_unused_columns": "has no effect: rows have the columns that are used",
    "length_column_name": "has no effect: lengths are those of the tokenised rows",
    "use_cache": "has no effect: training never uses the key-value cache",
    "do_train": "has no effect: a run trains and evaluates",
    "do_eval": "has no effect: a run trains and evaluates",
    "do_predict": "has no effect: a run trains and evaluates",
    "use_cpu": "has no effect: training is on the accelerator where there is one; hide it with "
    "CUDA_VISIBLE_DEVICES=",
    "local_rank": "has no effect: torchrun sets it",
    "save_only_model": f"is refused: {_RESUMABLE}",
    "ignore_data_skip": f"is refused: {_RESUMABLE}",
    "restore_callback_states_from_checkpoint": "has no effect: no callback of kdrun has state",
    "enable_jit_checkpoint": "has no effect: signals save a checkpoint already",
    "save_on_each_node": "is refused: one process writes the run's folder",
    "dataloader_drop_last": f"is refused: {_MEASURES}",
    "dataloader_persistent_workers": "is refused: rows change between epochs",
    "accelerator_config": "is refused: kdrun deals out batches, and the order of rows follows from "
    "training.seed",
    "parallelism_config": "is refused: use training.fsdp",
    "hub_token": "is refused: a run records its configuration; set HF_TOKEN in the environment",
}
_MOVED = {"group_by_length": "train_sampling_strategy=group_by_length"}
"""Arguments of earlier versions of transformers that have become a value of another one."""


@cache
def _fields() -> dict[str, Any]:
    from transformers import TrainingArguments

    return {field.name: field.type for field in dataclasses.fields(TrainingArguments)}


def type_of(name: str) -> Any:
    """Return the type of a key of section ``trainer``.

    Raises:
        InputError: the installed transformers has no such argument (with a suggestion), or it is
            kdrun's own, or would have no effect.
    """
    key = f"trainer.{name}"
    if name in _OWNED:
        raise InputError(f"{key} is set by {_OWNED[name]}; use that instead")
    if name in _REFUSED:
        raise InputError(f"{key} {_REFUSED[name]}; remove it")
    fields = _fields()
    if name in fields:
        return fields[name]
    if name in _MOVED:
        raise InputError(f"{key}: in this version of transformers it is trainer.{_MOVED[name]}")
    from transformers import __version__

    known = [field for field in fields if field not in _REFUSED]
    close = difflib.get_close_matches(name, known, n=1)
    own = f"; in kdrun it is {_OWNED[close[0]]}" if close and close[0] in _OWNED else ""
    hint = f", did you mean {close[0]}{own}?" if close else ""
    raise InputError(f"{key}: transformers {__version__} has no such training argument{hint}")


def check_value(name: str, value: Any) -> None:
    """Refuse a value of another type than the argument's.

    Raises:
        InputError: names key, value and type.
    """
    annotation = type_of(name)
    try:
        adapter = TypeAdapter[Any](annotation, config=ConfigDict(arbitrary_types_allowed=True))
        adapter.validate_python(value)
    except ValidationError as error:
        expected = getattr(annotation, "__name__", str(annotation))
        raise InputError(f"trainer.{name}={value!r}: expected {expected}") from error
