"""A teacher on an inference server, asked for the next rows while the student computes."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdlosses import Projected, TopK
from kdrun.data.batch_rows import BatchRow, fill_columns, rows_of
from kdrun.data.collate import teacher_inputs
from kdrun.models.heads import HeadSplit
from kdrun.served.client import ServerError
from kdrun.served.states import Space
from kdrun.served.workers import Workers

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from kdrun.served.engine import Engine
    from kdrun.served.head import Head

_ROWS_PER_REQUEST = 4
"""Rows asked for ahead, for each request at a time."""


@dataclass(frozen=True)
class Asked:
    """What is asked of a server for each row, settled by the probe.

    Attributes:
        engine: the server.
        model: name of the model on it.
        vocab_size: tokens that teacher and student share.
        head: norm and head for states; None takes log-probabilities.
        folder: with states: where the server leaves them.
        state_bytes: with states: of one state.
        space: with states: bytes that answers on their way may take.
        timeout: with states: seconds to wait for a file.
        top_k: with log-probabilities: entries of each position.
        temperature: with log-probabilities: at which the server gives them.
        concurrency: requests at a time in this process.
        probe: log-probabilities by which the model is recognised.
    """

    engine: Engine
    model: str
    vocab_size: int
    head: Head | None = None
    folder: Path = Path()
    state_bytes: int = 0
    space: int = 0
    timeout: float = 120.0
    top_k: int = 64
    temperature: float = 1.0
    concurrency: int = 8
    probe: tuple[float, ...] = ()


@dataclass
class _Expected:
    """A row that was asked for, how often it is needed, and its answer."""

    answer: Future[tuple[Tensor, ...]]
    uses: int = field(default=1)


class ServedTeacher:
    """A teacher on a server; rows are asked for in the background.

    Only rows with supervised positions are sent, and of these no token that the last supervised
    position does not need.

    Args:
        asked: what is asked, and of whom.

    Attributes:
        split: how logits are computed.
        asked: what is asked.
        waited: seconds in which a batch waited for its answers.
    """

    def __init__(self, asked: Asked) -> None:
        import torch

        self.asked = asked
        head = asked.head
        self.split = HeadSplit() if head is None else HeadSplit(head.logit_scale, head.softcap)
        self.waited = 0.0
        self._space = Space(asked.space)
        self._workers = Workers(asked.concurrency)
        self._expected: dict[bytes, _Expected] = {}
        self._settled: dict[bytes, tuple[Tensor, ...]] = {}
        self._device = torch.device("cpu")

    @property
    def exact(self) -> bool:
        """Whether full distributions are available, which measures need."""
        return self.asked.head is not None

    @property
    def width(self) -> int:
        """Size of the output head, or of the shared vocabulary."""
        head = self.asked.head
        return self.asked.vocab_size if head is None else len(head.weight)

    def to(self, device: torch.device) -> None:
        """Set the device of sources, and move the head to it."""
        self._device = device
        if self.asked.head is not None:
            self.asked.head.to(device)

    def close(self) -> None:
        """End requests on their way."""
        self.asked.engine.client.close()
        self._workers.close()

    def expect(self, batch: Mapping[str, Any]) -> int:
        """Ask for the rows of a batch that is needed soon.

        Args:
            batch: as :meth:`source` takes it.

        Returns:
            The number of rows with supervised positions.
        """
        rows = list(_rows(batch))
        for row in rows:
            expected = self._expected.get(row.key)
            if expected is None:
                self._expected[row.key] = _Expected(self._workers.submit(self._answer, row))
            else:
                expected.uses += 1
        return len(rows)

    def settle(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Wait for the rows of a step's batches, and keep them until the next step.

        Args:
            batches: as :meth:`source` takes them; rows that were not asked for are asked for now.

        Raises:
            ServerError: the server is away for too long, refuses, or answers wrongly.
        """
        futures = self._take([row for batch in batches for row in _rows(batch)])
        self._settled = {key: self._await(future) for key, future in futures.items()}

    def forget(self) -> None:
        """Drop what was asked for: the next steps do not need it."""
        self._expected.clear()
        self._settled = {}

    def source(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        shift_labels: Tensor,
        position_ids: Tensor | None = None,
        **inputs: Any,
    ) -> Projected | TopK:
        """The source of logits for a batch.

        Args:
            input_ids: ``[rows, length]``.
            attention_mask: same shape; 0 is padding, on either side.
            shift_labels: same shape, aligned with the logits; define the supervised positions.
            position_ids: positions of packed rows, whose examples are sent one by one.
            **inputs: further inputs of a live teacher, ignored.

        Raises:
            ServerError: the server is away for too long, refuses, or answers wrongly.
        """
        rows = list(rows_of(input_ids, attention_mask, shift_labels, position_ids))
        asked = self._take([row for row in rows if row.key not in self._settled])
        answers = {key: self._await(future) for key, future in asked.items()}
        found = [(row, answers.get(row.key) or self._settled[row.key]) for row in rows]
        columns = fill_columns(input_ids.shape, found) or self._nothing(input_ids.shape)
        return self._source_of([column.to(self._device) for column in columns])

    def empty_source(self, shape: torch.Size) -> Projected | TopK:
        """Return a source without any row, which shows whether a loss supports such a teacher."""
        return self._source_of([column.to(self._device) for column in self._nothing(shape)])

    def _take(self, rows: Iterable[BatchRow]) -> dict[bytes, Future[tuple[Tensor, ...]]]:
        """Return the answers to rows, each once however often it occurs."""
        taken: dict[bytes, Future[tuple[Tensor, ...]]] = {}
        for row in rows:
            expected = self._expected.get(row.key)
            if expected is None:
                if row.key not in taken:
                    taken[row.key] = self._workers.submit(self._answer, row)
                continue
            taken[row.key] = expected.answer
            expected.uses -= 1
            if not expected.uses:
                del self._expected[row.key]
        return taken

    def _await(self, future: Future[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        began = time.monotonic()
        try:
            return self.asked.engine.client.result_of(future)
        finally:
            self.waited += time.monotonic() - began

    def _answer(self, row: BatchRow) -> tuple[Tensor, ...]:
        """Ask for a row, in a worker."""
        asked, positions = self.asked, row.within.tolist()
        if asked.head is None:
            return asked.engine.score(
                asked.model,
                # Entry j + 1 is the distribution of position j, whatever token stands there.
                (row.ids + row.ids[:1])[: positions[-1] + 2],
                positions,
                asked.top_k,
                asked.vocab_size,
                asked.temperature,
            )
        first, ids = positions[0], row.ids[: positions[-1] + 1]
        with self._space.taken((len(ids) - first) * asked.state_bytes):
            states = asked.engine.states(asked.model, ids, first, asked.folder, asked.timeout)
        if states is None:
            raise ServerError(
                f"{asked.engine.client.address} no longer gives hidden states; start it with the "
                "connector again ('kdrun served connector')"
            )
        return (asked.head.normed(states[row.within - first]).cpu(),)

    def _source_of(self, columns: list[Tensor]) -> Projected | TopK:
        head = self.asked.head
        if head is not None:
            return Projected(columns[0], head.weight, head.bias, head.logit_scale, head.softcap)
        log_probs, indices, tail = columns
        return TopK(log_probs, indices, tail, self.asked.vocab_size, self.asked.temperature)

    def _nothing(self, shape: torch.Size) -> list[Tensor]:
        import torch

        head, k = self.asked.head, self.asked.top_k
        if head is not None:
            return [torch.zeros(*shape, head.weight.shape[1], dtype=head.weight.dtype)]
        tokens = torch.arange(k).expand(*shape, k).clone()
        return [torch.zeros(*shape, k), tokens, torch.zeros(shape)]


def _rows(batch: Mapping[str, Any]) -> Iterator[BatchRow]:
    given = teacher_inputs(batch)
    ids, mask = given["input_ids"], given.get("attention_mask")
    return rows_of(ids, mask, given["shift_labels"], given.get("position_ids"))


class Ahead:
    """Batches of an iterator, whose rows are asked for before they are needed.

    Args:
        batches: the iterator.
        teacher: is asked.
        most: number of batches that will be needed at most; None for all.
        rows: keep about so many rows asked for; None for four of each request at a time.

    Attributes:
        batches: the iterator.
        asks: whether rows are asked for, rather than only passed on.
    """

    def __init__(
        self,
        batches: Any,
        teacher: ServedTeacher,
        most: int | None = None,
        rows: int | None = None,
    ) -> None:
        self.batches, self.asks = batches, True
        self._teacher = teacher
        self._rows = _ROWS_PER_REQUEST * teacher.asked.concurrency if rows is None else rows
        self._left = sys.maxsize if most is None else most
        self._seen: deque[tuple[Any, int]] = deque()
        self._waiting = 0

    def __iter__(self) -> Ahead:
        return self

    def __next__(self) -> Any:
        """Return the next batch, and ask for those after it."""
        if not self._seen and not self._look():
            raise StopIteration
        batch, rows = self._seen.popleft()
        self._waiting -= rows
        while self.asks and self._left > 0 and self._waiting < self._rows and self._look():
            pass
        return batch

    def _look(self) -> bool:
        for batch in self.batches:
            rows = self._teacher.expect(batch) if self.asks else 0
            self._seen.append((batch, rows))
            self._waiting += rows
            self._left -= 1
            return True
        return False
