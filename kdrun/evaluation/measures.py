"""Measures of a model's distributions: of one batch, of all batches, and of a model by itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdlosses import KDObjective, TokenLoss, calibration_error, measure
from kdrun.data.collate import IGNORE_INDEX, LABELS, Collator, split_inputs
from kdrun.errors import TrainingError
from kdrun.models.heads import Consumer, Teacher, call, find_split, install, uninstall

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_COMPILED_FROM = 16384
KEYS = (
    "ce",
    "forward_kl",
    "reverse_kl",
    "top1_agreement",
    "calibration_error",
    "tokens",
)
"""What is reported of held-out rows, beside the loss itself."""


def prepare_measures(
    inputs: Mapping[str, Any], loss: TokenLoss, teacher: Teacher | None
) -> tuple[Consumer, dict[str, Any]]:
    """What measures a batch, and the inputs of the model's call that it goes into.

    Args:
        inputs: the batch.
        loss: of the run, whose value is measured too; it gives the cut of the vocabulary.
        teacher: what the model is compared with, or None.

    Returns:
        The consumer for the model's head, which gives ``sums`` for :func:`figures`; and the
        features.
    """
    labels, features = split_inputs(inputs)
    source = None if teacher is None else teacher.source(**features, shift_labels=labels)

    def consume(student: Any) -> dict[str, Tensor]:
        chunking = loss.chunking
        eager = student.vocab_size < _COMPILED_FROM or (
            chunking is not None and chunking.compiled is False
        )
        compiled = False if eager else None
        found = measure(loss, student, source, labels, compiled=compiled)
        columns = (
            found.num_tokens,
            found.cross_entropy,
            found.kd,
            found.forward_kl,
            found.reverse_kl,
            found.top1_agreement,
        )
        zero = found.cross_entropy.new_zeros(())
        terms = zero.expand(len(loss.terms))
        sums = torch.stack([zero if column is None else column for column in columns])
        kd_terms = terms if found.kd_terms is None else found.kd_terms
        return {"sums": torch.cat([sums, kd_terms, found.calibration.flatten()])}

    return consume, features


def figures(sums: Tensor, objective: KDObjective, with_teacher: bool) -> dict[str, float | None]:
    """Measures from their sums over all batches and processes.

    Args:
        sums: of what :func:`prepare_measures` gives.
        objective: gives the ratio and the names of the loss's terms.
        with_teacher: whether there was a teacher; measures that need one are else None.

    Raises:
        TrainingError: no row supervises a token.
    """
    tokens = sums[0].item()
    if tokens == 0:
        raise TrainingError("the evaluation rows contain no supervised token")
    columns, calibration = sums.tensor_split([6 + len(objective.loss.terms)])
    ce, kd, forward_kl, reverse_kl, agreement, *terms = (columns[1:] / tokens).tolist()
    ratio = objective.kd_ratio
    loss = (1 - ratio) * ce + ratio * kd if ratio > 0 else ce
    return {
        "loss": loss if with_teacher or ratio == 0 else None,
        "ce": ce,
        "kd_loss": kd if with_teacher else None,
        **(named_terms(objective.loss, terms) if with_teacher else {}),
        "forward_kl": forward_kl if with_teacher else None,
        "reverse_kl": reverse_kl if with_teacher else None,
        "top1_agreement": agreement if with_teacher else None,
        "calibration_error": calibration_error(calibration.view(3, -1)).item(),
        "tokens": int(tokens),
    }


def named_terms(loss: TokenLoss, values: Sequence[float]) -> dict[str, float]:
    """The terms of a sum by name; a single loss is its own sum and adds nothing."""
    if len(loss.terms) == 1:
        return {}
    return {f"kd_loss/{term.name}": x for term, x in zip(loss.terms, values, strict=True)}


def silence_repeats(
    inputs: Mapping[str, Any], *, number: int, total: int, batch_size: int, rank: int, world: int
) -> int:
    """Ignore rows that only fill up the last round of several processes.

    accelerate deals out whole batches, batch ``k`` to rank ``k % world``, and begins anew with
    the first rows where a batch or a rank would otherwise go without: they would count twice.

    Args:
        inputs: the batch; its labels are changed.
        number: of the batch among those of this process.
        total: rows of the data set.
        batch_size: rows of a whole batch.
        rank: of this process.
        world: number of processes.

    Returns:
        Rows that count.
    """
    count: int = len(inputs["input_ids"])
    if world == 1:
        return count
    first = (number * world + rank) * batch_size
    kept: int = min(count, max(0, total - first))
    for name in LABELS:
        if name in inputs:
            inputs[name][kept:] = IGNORE_INDEX
    return kept


def measure_model(
    model: PreTrainedModel,
    teacher: Teacher | None,
    loss: TokenLoss,
    examples: Any,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
) -> dict[str, Any]:
    """The measures of any model, as a run measures its student.

    Args:
        model: a causal language model; it is moved to the device that training would take.
        teacher: what it is compared with, or None.
        loss: gives the cut of the vocabulary and the chunk size.
        examples: rows with ``input_ids`` and ``labels``.
        tokenizer: gives the padding.
        batch_size: rows at once.

    Returns:
        By the names of :data:`KEYS`; those that need a teacher are None without one.
    """
    from torch.utils.data import DataLoader

    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    batches = DataLoader(examples, batch_size, collate_fn=Collator(tokenizer.pad_token_id))
    if teacher is not None:
        teacher.to(device)
    install(model.to(device), find_split(model))
    try:
        sums = _sum(model.eval(), teacher, loss, batches, device)
    finally:
        uninstall(model)
    found = figures(sums, KDObjective(loss, 0.0), teacher is not None)
    return {name: found[name] for name in KEYS}


def _sum(
    model: PreTrainedModel,
    teacher: Teacher | None,
    loss: TokenLoss,
    batches: Iterable[Mapping[str, Tensor]],
    device: torch.device,
) -> Tensor:
    sums: Tensor | None = None
    for batch in batches:
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        consume, features = prepare_measures(inputs, loss, teacher)
        with torch.no_grad():
            found = call(model, consume, **features)["sums"]
        sums = found if sums is None else sums + found
    assert sums is not None, "a data set has a row"
    return sums
