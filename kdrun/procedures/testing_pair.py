"""The small pair of models for the checks of procedures, and a run without a trainer."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdlosses import KDObjective, get_loss
from kdrun.builtin import TEACHER_DIR
from kdrun.data.collate import IGNORE_INDEX, Collator
from kdrun.data.encoding import Example
from kdrun.procedures.base import ROLLOUT, LossRows, MicroBatch, Procedure
from kdrun.procedures.sampling import Sampling, examples_of
from kdrun.procedures.session import Place, Session

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCAB, ROWS, STEPS = 2048, 4, 4
SAMPLING = Sampling(max_new_tokens=6, max_length=24)


@dataclass(frozen=True)
class Step:
    """A step: its number, the micro-batches of the procedure, and the state after the step."""

    number: int
    batches: list[MicroBatch]
    state: dict[str, Any]


class Meeting:
    """Exchanges objects between threads that simulate processes."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=120)
        self._things: list[Any] = [None] * size

    def gather(self, rank: int, things: Sequence[Any]) -> list[Any]:
        """Gather objects from all threads, on each thread."""
        self._things[rank] = list(things)
        self.barrier.wait()
        every = [thing for own in self._things for thing in own]
        self.barrier.wait()
        return every


class ThreadSession(Session):
    """A session whose processes are threads."""

    meeting: Meeting

    def gather(self, things: Sequence[Any]) -> list[Any]:
        """Gather objects from all threads."""
        return self.meeting.gather(self.place.rank, things)


def open_session(
    procedure: Procedure, place: Place | None = None, meeting: Meeting | None = None
) -> Session:
    """Create a session for the small pair."""
    kind = Session if meeting is None else ThreadSession
    session = kind(
        procedure=procedure,
        settings=SAMPLING,
        student=make_model(16, 1),
        teacher=make_model(24, 0),
        tokenizer=load_tokenizer(),
        vocab_size=VOCAB,
        seed=3,
        place=place or Place(batch_size=ROWS),
        steps=STEPS,
        kd_ratio=0.5,
    )
    if isinstance(session, ThreadSession) and meeting is not None:
        session.meeting = meeting
    return session


def run_steps(session: Session, first: int = 0) -> Any:
    """Run steps of two micro-batches, with evaluations in between that get worse."""
    rows = session.procedure.prepare(example_rows(), session)
    collate = Collator(session.tokenizer.pad_token_id)
    rank, size, mine = session.place.rank, session.place.size, session.place.batch_size
    for number in range(first, STEPS):
        session.step = number
        session.evaluated(1.0 + number)
        given = []
        for micro in range(2):
            start = (number * 2 + micro) * mine * size + rank * mine
            given.append(collate([rows[(start + row) % len(rows)] for row in range(mine)]))
        batches = session.micro_batches(given)
        state = json.loads(json.dumps(session.state))
        yield Step(number, batches, state if state == session.state else dict(session.state))


@lru_cache
def usual_steps(procedure: Procedure) -> list[Step]:
    """Run a single process, for several checks."""
    return list(run_steps(open_session(procedure)))


def alike(one: Any, other: Any) -> bool:
    """Whether states are equal, up to rounding differences between batch sizes."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-4)
    return bool(one == other)


def example_rows() -> list[Example]:
    """Rows with a prompt and an answer."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for number in range(8):
        ids = torch.randint(3, VOCAB, (8 + number,), generator=generator).tolist()
        prompt = 3 + number % 4
        found.append(Example(input_ids=ids, labels=[IGNORE_INDEX] * prompt + ids[prompt:]))
    return found


def content_of(batches: Sequence[MicroBatch]) -> list[list[Any]]:
    """The rows of micro-batches in a comparable form."""
    found = []
    for batch in batches:
        examples = examples_of(batch)
        rollout = batch.get(ROLLOUT, {"origins": (0,) * len(examples)})
        pairs = zip(examples, rollout["origins"], strict=True)
        found.append([[row["input_ids"], row["labels"], int(origin)] for row, origin in pairs])
    return found


def count_tokens(batch: MicroBatch) -> Tensor:
    """The number of supervised tokens of a micro-batch by origin."""
    from kdrun.procedures.sampling import tokens_by_origin

    return tokens_by_origin([batch])


def halves(batch: MicroBatch) -> list[MicroBatch]:
    """Split a micro-batch into two."""
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


def loss_of(procedure: Procedure, batch: MicroBatch, counts: Tensor) -> tuple[Tensor, Tensor]:
    """The value, and the gradient of the student's logits, in float64."""
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


def check_close(what: str, got: Tensor, expected: Tensor) -> None:
    """Check that tensors differ by no more than rounding.

    Raises:
        AssertionError: names the tensors.
    """
    if not torch.isclose(got, expected, rtol=1e-9, atol=1e-11):
        raise AssertionError(f"{what} is {got.item():.6g} instead of {expected.item():.6g}")


@lru_cache
def _table(seed: int) -> Tensor:
    """A table of next-token logits per token: a model small enough for float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(VOCAB, VOCAB, generator=generator, dtype=torch.float64)


def make_model(width: int, seed: int) -> PreTrainedModel:
    """A small causal language model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCAB,
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
def load_tokenizer() -> Any:
    """The tokenizer of the built-in pair."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TEACHER_DIR)
