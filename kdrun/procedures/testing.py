"""Conformance checks that every procedure must pass.

``check_procedure("gkd:lambda=0.5")`` runs all checks on a small pair of models. Plugin authors run
the same checks in their tests or with ``kdrun procedures check NAME``.
"""

from __future__ import annotations

import inspect
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import ValidationError

from kdrun.data.collate import IGNORE_INDEX, shift_labels
from kdrun.procedures.base import ROLLOUT, Origin, Procedure
from kdrun.procedures.registry import get_procedure
from kdrun.procedures.sampling import examples_of
from kdrun.procedures.session import Place
from kdrun.procedures.testing_pair import (
    ROWS,
    SAMPLING,
    STEPS,
    Meeting,
    Step,
    alike,
    check_close,
    content_of,
    count_tokens,
    halves,
    loss_of,
    open_session,
    run_steps,
    usual_steps,
)


class ConformanceError(AssertionError):
    """A procedure fails checks; the message contains their names and reasons."""


@dataclass(frozen=True)
class CheckResult:
    """The result of one check.

    Attributes:
        name: name of the check.
        reason: why it failed; empty if it passed.
    """

    name: str
    reason: str


def run_checks(procedure: Procedure | str) -> list[CheckResult]:
    """Run all checks and record failures instead of raising them."""
    checked = get_procedure(procedure) if isinstance(procedure, str) else procedure
    return [CheckResult(name, _failure(check, checked)) for name, check in CHECKS.items()]


def check_procedure(procedure: Procedure | str) -> None:
    """Run all checks.

    Args:
        procedure: an instance, or a spec of a registered procedure.

    Raises:
        ConformanceError: contains the names and reasons of the failed checks.
    """
    results = run_checks(procedure)
    failed = [f"  {result.name}: {result.reason}" for result in results if result.reason]
    if failed:
        heading = f"{procedure!r} fails {len(failed)} of {len(results)} checks:"
        raise ConformanceError("\n".join([heading, *failed]))


def _failure(check: Callable[[Procedure], None], procedure: Procedure) -> str:
    try:
        check(procedure)
    except AssertionError as error:
        return str(error) or "an assertion failed"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _documentation(procedure: Procedure) -> None:
    """The docstring has a reference; parameters are described, have defaults and are frozen."""
    kind = type(procedure)
    text = inspect.cleandoc(kind.__dict__.get("__doc__") or "")
    if not text:
        raise AssertionError("the class has no docstring")
    if not re.search(r"^References?:\s*\S", text, re.MULTILINE):
        raise AssertionError("the docstring has no line 'Reference: ...'")
    kind()
    try:
        kind.model_validate({"no_such_parameter": 1})
    except ValidationError:
        pass
    else:
        raise AssertionError("an unknown parameter is accepted")
    for shown, name in kind.parameters().items():
        if not kind.model_fields[name].description:
            raise AssertionError(f"parameter {shown} has no description (Field(description=...))")
        try:
            setattr(procedure, name, getattr(procedure, name))
        except ValidationError:
            continue
        raise AssertionError(f"parameter {shown} can be changed: keep frozen=True")


def _defaults(procedure: Procedure) -> None:
    """The defaults are existing configuration keys."""
    from kdrun.config.load import every_key

    for key in procedure.defaults:
        if key not in every_key():
            raise AssertionError(f"defaults: there is no key {key!r}")


def _state(procedure: Procedure) -> None:
    """The state consists of JSON values at each step."""
    for step in usual_steps(procedure):
        if json.loads(json.dumps(step.state)) != step.state:
            raise AssertionError(f"step {step.number}: the state changes when saved as JSON")


def _shapes(procedure: Procedure) -> None:
    """The number of micro-batches is unchanged, tensors are aligned, and each row has an origin."""
    for step in usual_steps(procedure):
        if len(step.batches) != 2:
            raise AssertionError(f"2 micro-batches became {len(step.batches)}")
        for batch in step.batches:
            shape = batch["input_ids"].shape
            for name in ("attention_mask", "labels", "shift_labels"):
                if batch[name].shape != shape:
                    raise AssertionError(f"{name} has shape {list(batch[name].shape)}")
            rollout = batch.get(ROLLOUT)
            if rollout is not None and len(rollout["origins"]) != shape[0]:
                raise AssertionError(f"{shape[0]} rows have {len(rollout['origins'])} origins")


def _labels(procedure: Procedure) -> None:
    """Targets equal the tokens at their positions, are never padding, and are shifted by one."""
    for step in usual_steps(procedure):
        for batch in step.batches:
            ids, labels = batch["input_ids"], batch["labels"]
            supervised = labels != IGNORE_INDEX
            if (labels != ids)[supervised].any():
                raise AssertionError("a label differs from the token at its position")
            if (supervised & (batch["attention_mask"] == 0)).any():
                raise AssertionError("padding is supervised")
            if not torch.equal(batch["shift_labels"], shift_labels(labels)):
                raise AssertionError("shift_labels are not the labels, shifted by one")


def _answers(procedure: Procedure) -> None:
    """All tokens of a generated answer up to its end token are targets, and no others."""
    stops = open_session(procedure).stops
    for step in usual_steps(procedure):
        for batch in step.batches:
            origins = batch.get(ROLLOUT, {}).get("origins", ())
            for example, origin in zip(examples_of(batch), origins, strict=False):
                if origin == Origin.DATA:
                    continue
                targets = [label for label in example["labels"] if label != IGNORE_INDEX]
                first = len(example["labels"]) - len(targets)
                if example["labels"][first:] != targets:
                    raise AssertionError("an answer is not the end of its row")
                if any(token in stops for token in targets[:-1]):
                    raise AssertionError("tokens follow an end token")
                if len(targets) > SAMPLING.max_new_tokens:
                    raise AssertionError(f"an answer has {len(targets)} tokens")


def _determinism(procedure: Procedure) -> None:
    """The result depends only on seed and step; torch's global generator is not used."""
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = [content_of(step.batches) for step in run_steps(open_session(procedure))]
    if not torch.equal(torch.get_rng_state(), before):
        raise AssertionError("torch's global generator was used; use session.draw")
    torch.manual_seed(8)
    second = [content_of(step.batches) for step in run_steps(open_session(procedure))]
    if first != second:
        raise AssertionError("the same seed gives different batches")


def _resume(procedure: Procedure) -> None:
    """A run resumed from its saved state produces the same batches."""
    whole = [content_of(step.batches) for step in usual_steps(procedure)]
    saved: dict[str, Any] = {}
    session = open_session(procedure)
    for step in run_steps(session):
        if step.number == STEPS // 2 - 1:
            saved = json.loads(json.dumps(session.state_dict()))
            break
    resumed = open_session(procedure)
    resumed.load_state_dict(saved)
    rest = [content_of(step.batches) for step in run_steps(resumed, first=STEPS // 2)]
    if rest != whole[STEPS // 2 :]:
        raise AssertionError("a resumed run differs from an uninterrupted one")


def _ranks(procedure: Procedure) -> None:
    """Two processes make the same decisions, share a state, and use the rows of one process."""
    alone = usual_steps(procedure)
    meeting = Meeting(2)
    found: list[list[Step]] = [[], []]
    errors: list[Exception] = []

    # Created one after the other, because their models use torch's global generator.
    sessions = [open_session(procedure, Place(rank, 2, ROWS // 2), meeting) for rank in range(2)]

    def work(rank: int) -> None:
        try:
            found[rank] = list(run_steps(sessions[rank]))
        except Exception as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    for one, left, right in zip(alone, *found, strict=True):
        if left.state != right.state or not alike(left.state, one.state):
            raise AssertionError(f"step {one.number}: the processes have different states")
        pairs = zip(content_of(left.batches), content_of(right.batches), strict=True)
        both = [sorted(a + b) for a, b in pairs]
        if both != [sorted(rows) for rows in content_of(one.batches)]:
            raise AssertionError(
                f"step {one.number}: two processes train on different rows than one"
            )


def _denominators(procedure: Procedure) -> None:
    """The losses of the parts of a micro-batch sum to the loss of the whole."""
    for step in usual_steps(procedure):
        batch = step.batches[0]
        if ROLLOUT not in batch:
            continue
        counts = count_tokens(batch)
        whole, _ = loss_of(procedure, batch, counts)
        parts = [loss_of(procedure, part, counts)[0] for part in halves(batch)]
        check_close(f"step {step.number}: the sum of two halves", parts[0] + parts[1], whole)


def _gradient(procedure: Procedure) -> None:
    """The loss and its gradient are finite; unsupervised positions have no gradient."""
    for step in usual_steps(procedure):
        batch = step.batches[0]
        if ROLLOUT not in batch:
            continue
        value, gradient = loss_of(procedure, batch, count_tokens(batch))
        if not (value.isfinite() and gradient.isfinite().all()):
            raise AssertionError(f"step {step.number}: the loss or its gradient is not finite")
        silent = batch["shift_labels"] == IGNORE_INDEX
        if gradient[silent].any():
            raise AssertionError(f"step {step.number}: an unsupervised position has a gradient")


def _nothing_said(procedure: Procedure) -> None:
    """Without supervised tokens, the loss is 0 and differentiable, with zero gradients."""
    for step in usual_steps(procedure):
        batch = step.batches[0]
        if ROLLOUT not in batch:
            continue
        ignored = {"shift_labels": torch.full_like(batch["shift_labels"], IGNORE_INDEX)}
        value, gradient = loss_of(procedure, {**batch, **ignored}, torch.zeros(len(Origin)).long())
        if value.item() != 0 or gradient.any():
            raise AssertionError(
                f"step {step.number}: the value without tokens is {value.item():.3g}"
            )


CHECKS: dict[str, Callable[[Procedure], None]] = {
    "documentation": _documentation,
    "defaults": _defaults,
    "state": _state,
    "shapes": _shapes,
    "labels": _labels,
    "answers": _answers,
    "determinism": _determinism,
    "resume": _resume,
    "rank_agreement": _ranks,
    "denominators": _denominators,
    "gradient": _gradient,
    "nothing_supervised": _nothing_said,
}
