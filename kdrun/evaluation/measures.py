"""Measures of a model's distributions: for a batch, for all batches, and for a whole model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdlosses import KDObjective, TokenLoss, calibration_error, measure
from kdrun.data.collate import IGNORE_INDEX, LABELS, TEACHER_LABELS, Collator, split_inputs
from kdrun.errors import TrainingError
from kdrun.models.device import find_device
from kdrun.models.heads import Consumer, Teacher, call, find_split, install, uninstall
from kdrun.models.view import source_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_COMPILED_FROM = 16384
EVENTS = "events_forward_kl"
"""Measure against a teacher that gives its most likely tokens alone."""
KEYS = (
    "ce",
    "forward_kl",
    "reverse_kl",
    "top1_agreement",
    "calibration_error",
    "tokens",
)
"""Measures reported on held-out rows, in addition to the loss."""


def prepare_measures(
    inputs: Mapping[str, Any], loss: TokenLoss, teacher: Teacher | None
) -> tuple[Consumer, dict[str, Any]]:
    """Prepare the measures of a batch, computed inside the call of the model.

    Args:
        inputs: the batch.
        loss: the loss of the run, which is also measured and defines the shared vocabulary.
        teacher: the teacher to compare with, or None.

    Returns:
        The consumer for the model's head, which returns ``sums`` for :func:`figures`, and the
        model inputs.
    """
    labels, features = split_inputs(inputs)
    source = None if teacher is None else source_of(teacher, inputs)

    def consume(student: Any) -> dict[str, Tensor]:
        chunking = loss.chunking
        eager = student.vocab_size < _COMPILED_FROM or (
            chunking is not None and chunking.compiled is False
        )
        compiled = False if eager else None
        found = measure(loss, student, source, labels, compiled=compiled)
        events = found.events_forward_kl
        columns = (
            found.num_tokens,
            found.cross_entropy,
            found.kd,
            found.forward_kl if events is None else events,
            found.reverse_kl,
            found.top1_agreement,
        )
        zero = found.cross_entropy.new_zeros(())
        terms = zero.expand(len(loss.terms))
        sums = torch.stack([zero if column is None else column for column in columns])
        kd_terms = terms if found.kd_terms is None else found.kd_terms
        return {"sums": torch.cat([sums, kd_terms, found.calibration.flatten()])}

    return consume, features


def figures(
    sums: Tensor, objective: KDObjective, teacher: Teacher | None
) -> dict[str, float | None]:
    """Compute measures from their sums over all batches and processes.

    Args:
        sums: sums from the consumer of :func:`prepare_measures`.
        objective: the objective, for the ratio and the names of the terms.
        teacher: the teacher that was used, or None. Without one, measures that need one are None;
            with one that gives its most likely tokens alone, those that need all tokens are, and
            ``events_forward_kl`` is over these tokens and the rest as one event.

    Raises:
        TrainingError: no row has a supervised token.
    """
    tokens = sums[0].item()
    if tokens == 0:
        raise TrainingError("the evaluation rows contain no supervised token")
    columns, calibration = sums.tensor_split([6 + len(objective.loss.terms)])
    ce, kd, forward_kl, reverse_kl, agreement, *terms = (columns[1:] / tokens).tolist()
    ratio = objective.kd_ratio
    with_teacher, whole = teacher is not None, teacher is not None and teacher.exact
    loss = (1 - ratio) * ce + ratio * kd if ratio > 0 else ce
    return {
        "loss": loss if with_teacher or ratio == 0 else None,
        "ce": ce,
        "kd_loss": kd if with_teacher else None,
        **(named_terms(objective.loss, terms) if with_teacher else {}),
        "forward_kl": forward_kl if whole else None,
        "reverse_kl": reverse_kl if whole else None,
        "top1_agreement": agreement if whole else None,
        **({EVENTS: forward_kl} if with_teacher and not whole else {}),
        "calibration_error": calibration_error(calibration.view(3, -1)).item(),
        "tokens": int(tokens),
    }


def named_terms(loss: TokenLoss, values: Sequence[float]) -> dict[str, float]:
    """The terms of a sum by name; empty for a single loss."""
    if len(loss.terms) == 1:
        return {}
    return {f"kd_loss/{term.name}": x for term, x in zip(loss.terms, values, strict=True)}


def silence_repeats(
    inputs: Mapping[str, Any], *, number: int, total: int, batch_size: int, rank: int, world: int
) -> int:
    """Ignore rows that only pad the last round of several processes.

    accelerate assigns batch ``k`` to rank ``k % world``, and repeats the first rows to fill up
    incomplete batches and ranks without a batch. Repeated rows would count twice.

    Args:
        inputs: the batch; its labels are modified.
        number: index of the batch in this process.
        total: number of rows in the data set.
        batch_size: rows per full batch.
        rank: rank of this process.
        world: number of processes.

    Returns:
        The number of rows that count.
    """
    count: int = len(inputs["input_ids"])
    if world == 1:
        return count
    first = (number * world + rank) * batch_size
    kept: int = min(count, max(0, total - first))
    for name in (*LABELS, TEACHER_LABELS):
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
    """Evaluate any model with the measures that a run uses for its student.

    Args:
        model: a causal language model; moved to the device that training would use.
        teacher: the teacher to compare with, or None.
        loss: the loss, for the shared vocabulary and the chunk size.
        examples: rows with ``input_ids`` and ``labels``.
        tokenizer: the tokenizer, for padding.
        batch_size: rows per batch.

    Returns:
        Measures by the names of :data:`KEYS`; those that need a teacher are None without one.
    """
    from torch.utils.data import DataLoader

    device = find_device()
    batches = DataLoader(examples, batch_size, collate_fn=Collator(tokenizer.pad_token_id))
    if teacher is not None:
        teacher.to(device)
    install(model.to(device), find_split(model))
    try:
        sums = _sum(model.eval(), teacher, loss, batches, device)
    finally:
        uninstall(model)
    found = figures(sums, KDObjective(loss, 0.0), teacher)
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
