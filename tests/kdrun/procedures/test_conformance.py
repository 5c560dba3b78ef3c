"""The built-in procedures pass the checks that plugins are given; broken ones fail theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from kdrun.procedures import Procedure, check_procedure, get_procedure
from kdrun.procedures.base import ROLLOUT, LossRows, Origin
from kdrun.procedures.sampling import Sample, examples_of
from kdrun.procedures.testing import CHECKS, ConformanceError, run_checks

SPECS = (
    "gkd",
    "gkd:lambda=1,class_loss=true",
    "seqkd",
    "distillm:increase=0.5,capacity=5",
    "minillm",
    "minillm:reuse=2,importance=sequence,whiten=true",
    "distillm2:student_loss=reverse_kl",
)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("spec", SPECS)
def test_built_in_procedures_pass(spec: str, check: str) -> None:
    CHECKS[check](get_procedure(spec))


class Broken(Procedure):
    """Always the student's text, wrongly.

    Reference: none.
    """

    def batches(self, given: Sequence[Any], session: Any) -> list[Any]:
        return [
            session.collate(self.spoil(session.write(examples_of(batch), number), session), batch)
            for number, batch in enumerate(given)
        ]

    def spoil(self, samples: list[Sample], session: Any) -> list[Sample]:
        return samples


def failed(procedure: Procedure) -> set[str]:
    return {result.name for result in run_checks(procedure) if result.reason}


def test_the_base_of_the_broken_ones_is_sound() -> None:
    check_procedure(Broken())


def test_something_after_the_end_token_is_found() -> None:
    class After(Broken):
        """Goes on after the end.

        Reference: none.
        """

        def spoil(self, samples: list[Sample], session: Any) -> list[Sample]:
            end = min(session.stops)
            return [Sample(s.prompt, [*s.answer[:2], end, 7], s.origin) for s in samples]

    assert failed(After()) == {"answers"}
    with pytest.raises(ConformanceError, match="fails 1 of 12 checks:\n  answers: tokens foll"):
        check_procedure(After())


def test_decisions_of_a_single_process_are_found() -> None:
    class OwnWay(Broken):
        """Each process has a state of its own.

        Reference: none.
        """

        def batches(self, given: Sequence[Any], session: Any) -> list[Any]:
            session.state["rank"] = session.place.rank
            return super().batches(given, session)

    assert failed(OwnWay()) == {"rank_agreement"}


def test_a_state_that_is_forgotten_is_found() -> None:
    class Forgetful(Broken):
        """Takes turns by a counter that is not in the state.

        Reference: none.
        """

        def batches(self, given: Sequence[Any], session: Any) -> list[Any]:
            session.turn = getattr(session, "turn", 0) + 1
            return list(given) if session.turn % 3 else super().batches(given, session)

    assert failed(Forgetful()) == {"resume"}


def test_a_mean_over_the_micro_batch_is_found() -> None:
    class OwnMean(Broken):
        """Divides by its own tokens.

        Reference: none.
        """

        def loss(self, rows: LossRows) -> Any:
            from dataclasses import replace

            own = (rows.labels != -100).sum().clamp_min(1)
            return super().loss(replace(rows, step_tokens=own))

    assert failed(OwnMean()) == {"denominators"}


def test_a_row_too_few_origins_is_found() -> None:
    class Short(Broken):
        """Loses an origin.

        Reference: none.
        """

        def batches(self, given: Sequence[Any], session: Any) -> list[Any]:
            made = super().batches(given, session)
            for batch in made:
                batch[ROLLOUT]["origins"] = (Origin.STUDENT,)
            return made

    assert "shapes" in failed(Short())
