"""Adaptive use of the student's own text, with a buffer of earlier samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from pydantic import Field

from kdrun.procedures.base import MicroBatch, Origin, Procedure, SessionProtocol, State

Source = Literal["fresh", "buffer", "data"]


class DistiLLM(Procedure):
    """Adaptive student-generated text, used more often when the held-out likelihood gets worse.

    ``phi`` starts at 0, and the reference is the held-out cross-entropy before training. If an
    evaluation is at least ``margin`` above the reference, phi increases by ``increase``, up to 1,
    and the evaluation becomes the reference. In step t of T, with r uniform: if
    r < phi (1 - t / T), or r < phi while the buffer is not full, the student answers the prompts,
    and its answers are used for training and added to the buffer; otherwise, if r < phi, rows of
    the buffer are used; otherwise the data. A full buffer drops its oldest rows.

    Reference: Ko et al. 2024, arXiv:2402.03898.
    """

    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"loss.spec": "skew_forward_kl_chunked", "training.eval_steps": 100}
    )

    margin: float = Field(
        0.1, ge=0, description="rise of the held-out loss above which phi increases"
    )
    increase: float = Field(0.1, gt=0, le=1, description="amount by which phi increases")
    capacity: int = Field(1000, ge=1, description="maximum number of rows in the buffer")

    def initial_state(self) -> dict[str, Any]:
        """No reference, phi 0 and an empty buffer."""
        return {"phi": 0.0, "reference": None, "rises": 0, "buffer": []}

    def evaluated(self, state: State, cross_entropy: float) -> None:
        """Increase phi if the loss has risen by the margin."""
        if state["reference"] is None:
            state["reference"] = cross_entropy
        elif cross_entropy >= state["reference"] + self.margin:
            state["phi"] = min(1.0, round(state["phi"] + self.increase, 12))
            state["reference"] = cross_entropy
            state["rises"] += 1

    def source(self, state: State, uniform: float, progress: float) -> Source:
        """Choose the source of the rows of a step.

        Args:
            state: state at this step.
            uniform: r in [0, 1).
            progress: t / T.
        """
        phi = state["phi"]
        full = len(state["buffer"]) >= self.capacity
        if uniform < phi * (1 - progress) or (uniform < phi and not full):
            return "fresh"
        return "buffer" if uniform < phi else "data"

    def batches(self, given: Sequence[MicroBatch], session: SessionProtocol) -> list[MicroBatch]:
        """Return the micro-batches of a step, all from one source."""
        source = self.source(session.state, session.draw("source"), session.step / session.steps)
        if source == "data":
            return list(given)
        return self._fresh(given, session) if source == "fresh" else self._stored(given, session)

    def figures(self, state: State) -> dict[str, float]:
        """Phi, and the number of rows in the buffer."""
        return {"phi": state["phi"], "buffer_rows": len(state["buffer"])}

    def remarks(self, state: State) -> list[str]:
        """A note if the student's text was never used."""
        if state["rises"]:
            return []
        return [
            "phi never rose: the held-out loss never exceeded its value before training by "
            f"{self.margin:g}, so every step used the data; lower margin, or evaluate more often "
            "(training.eval_steps)"
        ]

    def _fresh(self, given: Sequence[MicroBatch], session: SessionProtocol) -> list[MicroBatch]:
        from kdrun.procedures.sampling import examples_of

        made = []
        for number, batch in enumerate(given):
            samples = session.write(examples_of(batch), number)
            made.append(session.collate(samples, batch))
            # In the order of the step's rows, independent of the number of processes.
            pairs = session.gather([[s.prompt, s.answer] for s in samples if s.answer])
            session.state["buffer"] = [*session.state["buffer"], *pairs][-self.capacity :]
        return made

    def _stored(self, given: Sequence[MicroBatch], session: SessionProtocol) -> list[MicroBatch]:
        from kdrun.procedures.sampling import Sample

        buffer = session.state["buffer"]
        order = session.order(len(buffer), "buffer")
        made = []
        for number, batch in enumerate(given):
            first = session.place.first_row(number)
            places = [order[(first + row) % len(order)] for row in range(len(batch["input_ids"]))]
            rows = [Sample(buffer[place][0], buffer[place][1], Origin.STUDENT) for place in places]
            made.append(session.collate(rows, batch))
        return made
