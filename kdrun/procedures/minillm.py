"""Reverse KL of whole answers, optimised by policy gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from kdrun.errors import InputError
from kdrun.procedures.base import (
    Cost,
    LossRows,
    MicroBatch,
    Origin,
    Procedure,
    SessionProtocol,
    Settings,
)

if TYPE_CHECKING:
    from torch import Tensor

    from kdlosses import KDOutput
    from kdrun.procedures.sampling import Sample


class MiniLLM(Procedure):
    """Reverse KL of whole answers: a single-step part in closed form, and a long-term part.

    Answers are sampled from a mixture of teacher and student. With r_t = log p(y_t) - log q(y_t),
    the gradient of the reverse KL is the gradient of each step's reverse KL over the vocabulary,
    plus -sum_t R_(t+1) grad log q(y_t), where R_(t+1) sums the r of later tokens. The first part is
    the run's loss, by default ``reverse_kl``. The second part uses importance weights and a clipped
    ratio. Cross-entropy on plain text (``procedure.text``; without one, on the training rows), with
    weight 1 - kd_ratio, preserves the language modelling ability of the student.

    Reference: Gu et al. 2024, arXiv:2306.08543.
    """

    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({"loss.spec": "reverse_kl_chunked"})
    takes_text: ClassVar[bool] = True
    mixes_models: ClassVar[bool] = True

    teacher_mix: float = Field(
        0.2, ge=0, lt=1, description="the teacher's share of the sampling distribution"
    )
    importance: Literal["token", "sequence"] = Field(
        "token",
        description="use the weight q / mixture of each token alone, or its product over the "
        "answer, which is unbiased but has more variance",
    )
    gamma: float = Field(1.0, ge=0, le=1, description="discount of later rewards")
    length_normalised: bool = Field(
        True, description="divide returns by the number of tokens they sum over"
    )
    reward_clip: float = Field(10.0, ge=0, description="bound of each reward; 0 disables it")
    clip: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="maximum distance of the weighted ratio from 1; 0 disables the bound",
    )
    whiten: bool = Field(
        False, description="shift and scale the returns of a micro-batch to mean 0 and variance 1"
    )
    reuse: int = Field(1, ge=1, description="number of consecutive steps that use the same samples")

    def needs_answers(self, config: Settings) -> bool:
        """Only for the cross-entropy, if no plain text is given for it."""
        return config.procedure.text is None

    def check(self, config: Settings) -> None:
        """Also check that plain text has a weight, and that no token weight is given.

        Raises:
            InputError: text that would have no effect, or a token weight.
        """
        super().check(config)
        if config.token_weight.spec is not None:
            raise InputError(
                "procedure minillm: --token-weight would apply to one of the two parts of its "
                "objective only; remove it, or use --procedure gkd"
            )
        if config.procedure.text is not None and not _takes_data(config):
            raise InputError(
                "procedure.text: has no effect at --kd-ratio 1, because its cross-entropy has "
                "weight 0; lower the ratio, or remove the text"
            )

    def cost(self, config: Settings) -> Cost:
        """The cost of answers that both models evaluate, and of the data rows if they are used."""
        written = 1.0 / self.reuse
        return Cost(1 + _takes_data(config), student_answers=written, teacher_answers=written)

    def initial_state(self) -> dict[str, Any]:
        """A state without samples."""
        return {"samples": []}

    def batches(self, given: Sequence[MicroBatch], session: SessionProtocol) -> list[MicroBatch]:
        """Return samples, and the rows of the data if cross-entropy is used."""
        from kdrun.procedures.sampling import examples_of

        stored = session.state["samples"]
        if session.step % self.reuse == 0 or len(stored) < len(given):
            stored = [
                session.gather(
                    [
                        [sample.prompt, sample.answer, dict(sample.values)]
                        for sample in self._write(batch, number, session)
                    ]
                )
                for number, batch in enumerate(given)
            ]
            session.state["samples"] = stored if self.reuse > 1 else []
        made = []
        for number, batch in enumerate(given):
            share = len(stored[number]) // session.place.size
            own = stored[number][session.place.rank * share :][:share]
            rows = self._weighted(own)
            data: list[Any] = []
            if session.kd_ratio < 1:
                count = len(batch["input_ids"])
                plain = session.text is not None
                data = session.text_rows(number, count) if plain else examples_of(batch)
            made.append(session.collate([*data, *rows], batch))
        return made

    def loss(self, rows: LossRows) -> KDOutput:
        """Both parts on the samples and cross-entropy on the data, each a mean over its tokens."""
        weights = rows.values.get("weight")
        single = rows.objective_of(
            Origin.STUDENT, class_loss=False, own_mean=True, token_weights=weights
        )
        # With kd_ratio 0 no teacher runs, and both parts have weight 0.
        if single is not None and single.kd_loss is not None and weights is not None:
            ratio = rows.objective.kd_ratio
            long_term = self.long_term(rows)
            single = replace(
                single,
                loss=single.loss + ratio * long_term,
                kd_loss=single.kd_loss + long_term.detach(),
            )
        return rows.add(single, rows.objective_of(Origin.DATA, kd_loss=False, own_mean=True))

    def long_term(self, rows: LossRows) -> Tensor:
        """The clipped surrogate of -sum R_(t+1) log q(y_t), as a mean over the sampled tokens."""
        from kdrun.procedures.likelihood import token_log_probs

        labels = rows.labels_of(Origin.STUDENT)
        run = rows.objective.loss
        log_q = token_log_probs(rows.student, labels, run)
        returns = rows.values["return"].to(log_q.dtype)
        weight = rows.values["weight"].to(log_q.dtype)
        ratio = (log_q - rows.values["old"].to(log_q.dtype)).exp() * weight
        surrogate = ratio * returns
        if self.clip > 0:
            bounded = ratio.clamp(1 - self.clip, 1 + self.clip) * returns
            surrogate = surrogate.minimum(bounded)
        surrogate = surrogate.masked_fill(labels == run.ignore_index, 0.0)
        count = rows.origin_tokens[int(Origin.STUDENT)].clamp_min(1)
        return -surrogate.sum() / count

    def _write(self, batch: MicroBatch, number: int, session: SessionProtocol) -> list[Sample]:
        from kdrun.procedures.sampling import examples_of

        # The teacher is included even with share 0, because rewards use its log-probabilities.
        writers = {Origin.STUDENT: 1 - self.teacher_mix, Origin.TEACHER: self.teacher_mix}
        return session.write(examples_of(batch), number, writers, with_log_probs=True)

    def _weighted(self, stored: Sequence[tuple[Any, Any, Any]]) -> list[Sample]:
        """Samples with the values that the loss needs: weight, return, old log-probability."""
        from kdrun.procedures.sampling import Sample

        found = []
        for _, answer, values in stored:
            old = values["student"] if answer else []
            rewards = [
                self._bounded(p - q)
                for p, q in zip(values["teacher"] if answer else [], old, strict=True)
            ]
            found.append(
                {
                    "old": old,
                    "weight": self._weights(old, values["drawn"] if answer else []),
                    "return": later_returns(rewards, self.gamma, self.length_normalised),
                }
            )
        if self.whiten:
            whitened = iter(whiten([x for row in found for x in row["return"]]))
            for row in found:
                row["return"] = [next(whitened) for _ in row["return"]]
        return [
            Sample(prompt, answer, Origin.STUDENT, values if answer else {})
            for (prompt, answer, _), values in zip(stored, found, strict=True)
        ]

    def _bounded(self, reward: float) -> float:
        if self.reward_clip == 0:
            return reward
        return max(-self.reward_clip, min(self.reward_clip, reward))

    def _weights(self, old: Sequence[float], drawn: Sequence[float]) -> list[float]:
        logs = [q - mixture for q, mixture in zip(old, drawn, strict=True)]
        if self.importance == "sequence":
            logs = [sum(logs)] * len(logs)
        return [math.exp(x) for x in logs]


def _takes_data(config: Settings) -> bool:
    """Whether cross-entropy is used at any step."""
    return config.loss.kd_ratio < 1 or "kd_ratio" in config.loss.schedules


def later_returns(rewards: Sequence[float], gamma: float, normalised: bool) -> list[float]:
    """The discounted sum of later rewards, for each token.

    Args:
        rewards: rewards of the tokens of an answer.
        gamma: discount factor.
        normalised: divide by the number of later tokens.
    """
    found = [0.0] * len(rewards)
    total = 0.0
    for place in range(len(rewards) - 2, -1, -1):
        total = rewards[place + 1] + gamma * total
        later = len(rewards) - 1 - place
        found[place] = total / later if normalised else total
    return found


def whiten(values: Sequence[float]) -> list[float]:
    """Shift and scale values to mean 0 and (population) variance 1."""
    if not values:
        return []
    mean = sum(values) / len(values)
    variance = sum((x - mean) ** 2 for x in values) / len(values)
    return [(x - mean) / math.sqrt(variance + 1e-8) for x in values]
