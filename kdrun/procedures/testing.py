"""Conformance checks of procedures: what each must do, whoever wrote it.

``check_procedure("gkd:lambda=0.5")`` runs them all on a small pair of models. Plugin authors run
the same ones, in their tests or with ``kdrun procedures check NAME``.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError
from torch import Tensor

from kdlosses import KDObjective, get_loss
from kdrun.builtin import TEACHER_DIR
from kdrun.data.collate import IGNORE_INDEX, Collator, shift_labels
from kdrun.data.encode import Example
from kdrun.procedures.base import ROLLOUT, LossRows, MicroBatch, Origin, Procedure
from kdrun.procedures.registry import get_procedure
from kdrun.procedures.sampling import Sampling, examples_of
from kdrun.procedures.session import Place, Session

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_VOCAB, _ROWS, _STEPS = 2048, 4, 4
_SAMPLING = Sampling(max_new_tokens=6, max_length=24)


class ConformanceError(AssertionError):
    """A procedure fails checks; the message has their names and the reasons."""


@dataclass(frozen=True)
class CheckResult:
    """What became of one check.

    Attributes:
        name: of the check.
        reason: why it failed; empty where it passed.
    """

    name: str
    reason: str


def run_checks(procedure: Procedure | str) -> list[CheckResult]:
    """Run all checks; a failure is recorded, not raised."""
    checked = get_procedure(procedure) if isinstance(procedure, str) else procedure
    return [CheckResult(name, _failure(check, checked)) for name, check in CHECKS.items()]


def check_procedure(procedure: Procedure | str) -> None:
    """Run all checks.

    Args:
        procedure: an instance, or a spec of a registered one.

    Raises:
        ConformanceError: with the names and reasons of the failed checks.
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
    """Defaults of a run name existing keys."""
    from kdrun.config.load import every_key

    for key in procedure.defaults:
        if key not in every_key():
            raise AssertionError(f"defaults: there is no key {key!r}")


def _state(procedure: Procedure) -> None:
    """The state is what JSON can hold, at each step."""
    for step in _usual(procedure):
        if json.loads(json.dumps(step.state)) != step.state:
            raise AssertionError(f"step {step.number}: the state changes on its way through JSON")


def _shapes(procedure: Procedure) -> None:
    """As many micro-batches as were given, of aligned tensors, with an origin for each row."""
    for step in _usual(procedure):
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
    """Targets stand at their own tokens, never on padding, and shift by one."""
    for step in _usual(procedure):
        for batch in step.batches:
            ids, labels = batch["input_ids"], batch["labels"]
            supervised = labels != IGNORE_INDEX
            if (labels != ids)[supervised].any():
                raise AssertionError("a label differs from the token at its place")
            if (supervised & (batch["attention_mask"] == 0)).any():
                raise AssertionError("padding is supervised")
            if not torch.equal(batch["shift_labels"], shift_labels(labels)):
                raise AssertionError("shift_labels are not the labels, shifted by one")


def _answers(procedure: Procedure) -> None:
    """Of a written answer all tokens are targets, up to its end token, and nothing else is."""
    stops = _session(procedure).stops
    for step in _usual(procedure):
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
                    raise AssertionError("something follows an end token")
                if len(targets) > _SAMPLING.max_new_tokens:
                    raise AssertionError(f"an answer has {len(targets)} tokens")


def _determinism(procedure: Procedure) -> None:
    """Seed and step decide everything; torch's global generator is left alone."""
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = [_content(step.batches) for step in _run(_session(procedure))]
    if not torch.equal(torch.get_rng_state(), before):
        raise AssertionError("torch's global generator was used; take session.draw")
    torch.manual_seed(8)
    second = [_content(step.batches) for step in _run(_session(procedure))]
    if first != second:
        raise AssertionError("the same seed gives other batches")


def _resume(procedure: Procedure) -> None:
    """A run that goes on from its saved state gives the same batches."""
    whole = [_content(step.batches) for step in _usual(procedure)]
    saved: dict[str, Any] = {}
    session = _session(procedure)
    for step in _run(session):
        if step.number == _STEPS // 2 - 1:
            saved = json.loads(json.dumps(session.state_dict()))
            break
    resumed = _session(procedure)
    resumed.load_state_dict(saved)
    rest = [_content(step.batches) for step in _run(resumed, first=_STEPS // 2)]
    if rest != whole[_STEPS // 2 :]:
        raise AssertionError("a resumed run goes another way")


def _ranks(procedure: Procedure) -> None:
    """Two processes decide alike, carry one state, and learn from what one process would."""
    alone = _usual(procedure)
    meeting = _Meeting(2)
    found: list[list[_Step]] = [[], []]
    errors: list[Exception] = []

    # Made one after the other: their models are seeded by torch's global generator.
    sessions = [_session(procedure, Place(rank, 2, _ROWS // 2), meeting) for rank in range(2)]

    def work(rank: int) -> None:
        try:
            found[rank] = list(_run(sessions[rank]))
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
        if left.state != right.state or not _alike(left.state, one.state):
            raise AssertionError(f"step {one.number}: the processes carry different states")
        pairs = zip(_content(left.batches), _content(right.batches), strict=True)
        both = [sorted(a + b) for a, b in pairs]
        if both != [sorted(rows) for rows in _content(one.batches)]:
            raise AssertionError(f"step {one.number}: two processes learn from other rows than one")


def _denominators(procedure: Procedure) -> None:
    """Parts of a micro-batch, with the step's token counts, add up to the whole."""
    for step in _usual(procedure):
        batch = step.batches[0]
        if ROLLOUT not in batch:
            continue
        counts = _counts(batch)
        whole, _ = _loss(procedure, batch, counts)
        parts = [_loss(procedure, part, counts)[0] for part in _halves(batch)]
        _close(f"step {step.number}: the sum of two halves", parts[0] + parts[1], whole)


def _gradient(procedure: Procedure) -> None:
    """The loss is finite, and so is its gradient; unsupervised positions get none."""
    for step in _usual(procedure):
        batch = step.batches[0]
        if ROLLOUT not in batch:
            continue
        value, gradient = _loss(procedure, batch, _counts(batch))
        if not (value.isfinite() and gradient.isfinite().all()):
            raise AssertionError(f"step {step.number}: the loss or its gradient is not finite")
        silent = batch["shift_labels"] == IGNORE_INDEX
        if gradient[silent].any():
            raise AssertionError(f"step {step.number}: an unsupervised position has a gradient")


def _nothing_said(procedure: Procedure) -> None:
    """With nothing supervised the loss is 0 with zero gradients, still connected."""
    for step in _usual(procedure):
        batch = step.batches[0]
        if ROLLOUT not in batch:
            continue
        ignored = {"shift_labels": torch.full_like(batch["shift_labels"], IGNORE_INDEX)}
        value, gradient = _loss(procedure, {**batch, **ignored}, torch.zeros(len(Origin)).long())
        if value.item() != 0 or gradient.any():
            raise AssertionError(f"step {step.number}: value {value.item():.3g} of no token")


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


@dataclass(frozen=True)
class _Step:
    number: int
    batches: list[MicroBatch]
    state: dict[str, Any]


class _Meeting:
    """Where threads that stand for processes exchange things."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=120)
        self._things: list[Any] = [None] * size

    def gather(self, rank: int, things: Sequence[Any]) -> list[Any]:
        self._things[rank] = list(things)
        self.barrier.wait()
        every = [thing for own in self._things for thing in own]
        self.barrier.wait()
        return every


class _ThreadSession(Session):
    """A session whose processes are threads."""

    meeting: _Meeting

    def gather(self, things: Sequence[Any]) -> list[Any]:
        """The things of all threads."""
        return self.meeting.gather(self.place.rank, things)


def _session(
    procedure: Procedure, place: Place | None = None, meeting: _Meeting | None = None
) -> Session:
    kind = Session if meeting is None else _ThreadSession
    session = kind(
        procedure=procedure,
        settings=_SAMPLING,
        student=_model(16, 1),
        teacher=_model(24, 0),
        tokenizer=_tokenizer(),
        vocab_size=_VOCAB,
        seed=3,
        place=place or Place(batch_size=_ROWS),
        steps=_STEPS,
        kd_ratio=0.5,
    )
    if isinstance(session, _ThreadSession) and meeting is not None:
        session.meeting = meeting
    return session


def _run(session: Session, first: int = 0) -> Any:
    """Steps of two micro-batches, with evaluations between them that get worse."""
    rows = session.procedure.prepare(_rows(), session)
    collate = Collator(session.tokenizer.pad_token_id)
    rank, size, mine = session.place.rank, session.place.size, session.place.batch_size
    for number in range(first, _STEPS):
        session.step = number
        session.evaluated(1.0 + number)
        given = []
        for micro in range(2):
            start = (number * 2 + micro) * mine * size + rank * mine
            given.append(collate([rows[(start + row) % len(rows)] for row in range(mine)]))
        batches = session.micro_batches(given)
        state = json.loads(json.dumps(session.state))
        yield _Step(number, batches, state if state == session.state else dict(session.state))


@lru_cache
def _usual(procedure: Procedure) -> list[_Step]:
    """A run of a single process, which several checks look at."""
    return list(_run(_session(procedure)))


def _alike(one: Any, other: Any) -> bool:
    """Whether states are equal, but for the rounding of numbers in batches of another size."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-4)
    return bool(one == other)


def _rows() -> list[Example]:
    generator = torch.Generator().manual_seed(5)
    found = []
    for number in range(8):
        ids = torch.randint(3, _VOCAB, (8 + number,), generator=generator).tolist()
        prompt = 3 + number % 4
        found.append(Example(input_ids=ids, labels=[IGNORE_INDEX] * prompt + ids[prompt:]))
    return found


def _content(batches: Sequence[MicroBatch]) -> list[list[Any]]:
    """The rows of micro-batches in a form that can be compared."""
    found = []
    for batch in batches:
        examples = examples_of(batch)
        rollout = batch.get(ROLLOUT, {"origins": (0,) * len(examples)})
        pairs = zip(examples, rollout["origins"], strict=True)
        found.append([[row["input_ids"], row["labels"], int(origin)] for row, origin in pairs])
    return found


def _counts(batch: MicroBatch) -> Tensor:
    from kdrun.procedures.sampling import tokens_by_origin

    return tokens_by_origin([batch])


def _halves(batch: MicroBatch) -> list[MicroBatch]:
    count = len(batch["input_ids"])
    found = []
    for part in (slice(0, count // 2), slice(count // 2, count)):
        rollout = {
            "origins": batch[ROLLOUT]["origins"][part],
            "values": {name: x[part] for name, x in batch[ROLLOUT]["values"].items()},
        }
        tensors = {name: x[part] for name, x in batch.items() if name != ROLLOUT}
        found.append({**tensors, ROLLOUT: rollout})
    return found


def _loss(procedure: Procedure, batch: MicroBatch, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The value, and the gradient for the student's logits, in float64."""
    ids = batch["input_ids"]
    logits, teacher = (_table(seed)[ids] for seed in (0, 1))
    leaf = logits.requires_grad_()
    out = procedure.loss(
        LossRows(
            student=leaf,
            teacher=teacher,
            labels=batch["shift_labels"],
            origins=batch[ROLLOUT]["origins"],
            values=batch[ROLLOUT]["values"],
            objective=KDObjective(get_loss("generalized_jsd"), 0.5),
            step_tokens=counts.sum(),
            origin_tokens=counts,
        )
    )
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    return out.loss.detach(), gradient


def _close(what: str, got: Tensor, expected: Tensor) -> None:
    if not torch.isclose(got, expected, rtol=1e-9, atol=1e-11):
        raise AssertionError(f"{what} is {got.item():.6g} instead of {expected.item():.6g}")


@lru_cache
def _table(seed: int) -> Tensor:
    """Logits of the next token for each token: a model small enough for float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(_VOCAB, _VOCAB, generator=generator, dtype=torch.float64)


def _model(width: int, seed: int) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=_VOCAB,
                hidden_size=width,
                intermediate_size=width,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=64,
                initializer_range=0.3,
                tie_word_embeddings=True,
            )
        )
    return model


@lru_cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TEACHER_DIR)
