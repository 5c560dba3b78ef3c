"""Every built-in loss passes the conformance checks, and every check can fail."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import Field, field_validator

import kdlosses
from kdlosses import testing
from kdlosses.definition import state_variable
from kdlosses.divergence import Divergence, RowLoss
from kdlosses.losses.forward_kl import ForwardKL
from kdlosses.numerics import kl_terms
from kdlosses.testing import extremes
from kdlosses.testing.catalogue import CHECKS

BUILT_IN = [ref.name for ref in kdlosses.available_losses() if ref.distribution == "kdlosses"]
SPECS = [
    "skew_forward_kl:alpha=0.4",
    "generalized_jsd:beta=0.1",
    "generalized_jsd:beta=0.3,normalize=true",
    "alpha_beta:alpha=0,beta=0",
    "alpha_beta:alpha=0.2,beta=0.7",
    "alpha_beta:alpha=1,beta=-1",
]


@testing.parametrize_with_checks([*BUILT_IN, *SPECS])
def test_built_in_losses_conform(loss, check):
    check(loss)


# A deliberately wrong loss for each check. `Right` is right: what they change is what is wrong.


class Right(RowLoss):
    """Forward KL, sum p log(p / q).

    Reference: none.
    """

    def row(self, teacher_log_probs, student_log_probs, labels):
        return kl_terms(teacher_log_probs, student_log_probs).sum(-1)

    def curvature(self):
        return 1.0


class Plain(Divergence):
    """Forward KL, sum p log(p / q).

    Reference: none.
    """

    def integrand(self, teacher_log_probs, student_log_probs):
        return kl_terms(teacher_log_probs, student_log_probs)


WRONG = {}


def wrong(*names):
    def add(kind):
        for name in names:
            WRONG[name] = kind
        return kind

    return add


@wrong("docstring")
class NoFormula(Right):
    """A divergence.

    Reference: none.
    """


@wrong("expected_failures")
class NoSuchCheck(Right):
    expected_failures = {"no_such_check": "a reason"}  # noqa: RUF012


@wrong("bounds")
class Clips(Right):
    share: float = Field(0.5, ge=0, le=1, description="a share")

    @field_validator("share", mode="before")
    @classmethod
    def _clip(cls, value):
        return min(1.0, max(0.0, value))


@wrong("serialization")
class RoundsItsParameter(Right):
    share: float = Field(1 / 3, description="a share")

    @field_validator("share")
    @classmethod
    def _round(cls, value):
        return value / 2


@wrong("elementwise")
class Neighbours(Plain):
    def integrand(self, teacher_log_probs, student_log_probs):
        return kl_terms(teacher_log_probs, student_log_probs).roll(1, -1)


@wrong("linear_finish")
class RootOfSum(Plain):
    def finish(self, total):
        return (total + 1e-12).sqrt()


@wrong("nonnegative")
class Negative(Right):
    def row(self, teacher_log_probs, student_log_probs, labels):
        return -super().row(teacher_log_probs, student_log_probs, labels)


@wrong("nonnegative_near_equality")
class Cancels(Right):
    def row(self, teacher_log_probs, student_log_probs, labels):
        return (teacher_log_probs.exp() * (teacher_log_probs - student_log_probs)).sum(-1)


@wrong("zero_at_equality")
class CrossEntropy(Right):
    def row(self, teacher_log_probs, student_log_probs, labels):
        return -(teacher_log_probs.exp() * student_log_probs.clamp_min(-1e4)).sum(-1)


@wrong("coarse_graining")
class EuclideanDistance(Plain):
    coarse_graining_monotone = True

    def integrand(self, teacher_log_probs, student_log_probs):
        return (teacher_log_probs.exp() - student_log_probs.exp()) ** 2


@wrong("temperature_power")
class WrongPower(Right):
    temperature_power = 1


@wrong("curvature")
class WrongCurvature(Right):
    """Forward KL, sum p log(p / q).

    Reference: none.
    """

    def curvature(self):
        return 0.25


@wrong("shift_invariance")
class AmplifiesRounding(Right):
    def row(self, teacher_log_probs, student_log_probs, labels):
        value = super().row(teacher_log_probs, student_log_probs, labels)
        return value + ((student_log_probs + teacher_log_probs) * 1e14).sin().square().sum(-1)


@wrong("finite_differences", "finite_differences_softened")
class DetachesSilently(Right):
    def row(self, teacher_log_probs, student_log_probs, labels):
        value = super().row(teacher_log_probs, student_log_probs, labels)
        return value * (1 + value.detach())


class DetachesOpenly(DetachesSilently):
    """Forward KL with a factor, (1 + a) sum p log(p / q) with a its own value, detached.

    Reference: none.
    """

    detached = ("the factor",)


@wrong("teacher_gradient")
class TeachesTheTeacher(Right):
    """The engine lets no gradient through to the teacher: this one reaches into its caller."""

    def row(self, teacher_log_probs, student_log_probs, labels):
        frame = sys._getframe()
        while frame is not None and frame.f_code.co_name != "_teacher_gradient":
            frame = frame.f_back
        if frame is not None:
            teacher = frame.f_locals["two"]
            teacher.grad = torch.zeros_like(teacher)
        return super().row(teacher_log_probs, student_log_probs, labels)


class Drifts(Right):
    """The value depends on how often the loss was called."""

    def row(self, teacher_log_probs, student_log_probs, labels):
        CALLS.append(None)
        return super().row(teacher_log_probs, student_log_probs, labels) * len(CALLS)


CALLS = []
for name in ("grad_output", "frozen_head", "masking", "padded_heads"):
    wrong(name)(Drifts)


@wrong("row_order")
class CountsRows(Right):
    def row(self, teacher_log_probs, student_log_probs, labels):
        value = super().row(teacher_log_probs, student_log_probs, labels)
        return value * torch.arange(1, len(value) + 1)


@wrong("chunk_size", "batch_split", "num_tokens")
class DividesByTheBatch(Right):
    def row(self, teacher_log_probs, student_log_probs, labels):
        value = super().row(teacher_log_probs, student_log_probs, labels)
        return value / len(value)


@wrong("all_masked")
class NeedsARow(Right):
    def row(self, teacher_log_probs, student_log_probs, labels):
        value = super().row(teacher_log_probs, student_log_probs, labels)
        return value * (1 + 0 * value.max())


@wrong("impossible_tokens")
class ThroughProbabilities(Right):
    def row(self, teacher_log_probs, student_log_probs, labels):
        p, q = teacher_log_probs.exp(), student_log_probs.exp()
        return (p * (p / q).log()).sum(-1)


@wrong("underflow")
class LosesFarTokens(Right):
    def row(self, teacher_log_probs, student_log_probs, labels):
        p, q = teacher_log_probs.exp(), student_log_probs.exp()
        tiny = torch.finfo(p.dtype).tiny
        return (p * (p.clamp_min(tiny) / q.clamp_min(tiny)).log()).sum(-1)


@wrong("bfloat16", "float16")
class LowPrecision(Right):
    def row(self, teacher_log_probs, student_log_probs, labels):
        if student_log_probs.dtype == torch.float32:
            student_log_probs = student_log_probs.bfloat16().float()
        return super().row(teacher_log_probs, student_log_probs, labels)


@wrong("chunked_memory")
class KeepsWhatItSaw(Right):
    def row(self, teacher_log_probs, student_log_probs, labels):
        SEEN.append(teacher_log_probs.exp())
        return super().row(teacher_log_probs, student_log_probs, labels)


SEEN = []


@wrong("top_k")
class WeighsByPlace(Plain):
    """Not elementwise: the place among the events counts."""

    def integrand(self, teacher_log_probs, student_log_probs):
        places = torch.arange(1, teacher_log_probs.shape[-1] + 1)
        return kl_terms(teacher_log_probs, student_log_probs) * places


@wrong("sampled")
class SharesOut(Plain):
    """Linear in the total, but the terms know how many they are."""

    def integrand(self, teacher_log_probs, student_log_probs):
        terms = kl_terms(teacher_log_probs, student_log_probs)
        return terms / terms.shape[-1]


@wrong("moving_parameters")
class ConvertsItsParameter(Right):
    share: float = Field(0.5, ge=0, le=1, description="a share")

    def row(self, teacher_log_probs, student_log_probs, labels):
        share = self.share if isinstance(self.share, float) else 2 * self.share
        return share * super().row(teacher_log_probs, student_log_probs, labels)


@wrong("state")
class Forgetful(Right):
    @state_variable
    def steps(self):
        return 1.0

    def row(self, teacher_log_probs, student_log_probs, labels):
        return self.steps * super().row(teacher_log_probs, student_log_probs, labels)

    def next_state(self, state, value, progress):
        return {}


def failed(loss):
    return {result.name for result in testing.run_checks(loss) if result.verdict == "failed"}


def test_what_the_wrong_losses_derive_from_is_right():
    for kind in (Right, Plain):
        testing.check_loss(kind)


def test_every_check_has_a_wrong_loss():
    assert set(WRONG) == set(CHECKS)


@pytest.mark.parametrize("name", list(CHECKS))
def test_the_check_can_fail(name):
    CALLS.clear()
    check, applies = CHECKS[name]
    loss = WRONG[name]()
    assert applies(loss)
    with pytest.raises(RuntimeError if name == "all_masked" else AssertionError):
        check(loss)


@pytest.mark.parametrize("size", [64, None], ids=["large chunks", "plain"])
def test_an_evaluation_that_stores_all_logits_is_found(monkeypatch, size):
    honest = extremes.token_loss
    monkeypatch.setattr(extremes, "token_loss", lambda loss, _size=None: honest(loss, size))
    check, _ = CHECKS["chunked_memory"]
    with pytest.raises(AssertionError, match=r"\[rows, V\]"):
        check(ForwardKL)


def test_declared_detached_quantities_are_held_fixed():
    testing.check_loss(DetachesOpenly)
    assert {"finite_differences", "finite_differences_softened"} <= failed(DetachesSilently)


def test_a_constant_loss_does_not_pass():
    class Nothing(Right):
        def row(self, teacher_log_probs, student_log_probs, labels):
            return 0 * super().row(teacher_log_probs, student_log_probs, labels)

    assert {"zero_at_equality", "temperature_power", "curvature"} <= failed(Nothing)


def test_traits_choose_the_checks():
    names = {check.name for check in testing.checks_for("forward_kl")}
    assert {"coarse_graining", "elementwise", "linear_finish", "curvature"} <= names
    names = {check.name for check in testing.checks_for("total_variation")}
    assert "curvature" not in names
    assert "elementwise" not in {check.name for check in testing.checks_for(Right)}


def test_the_guide_lists_every_check():
    page = Path(__file__).parents[2] / "docs" / "write-a-loss.md"
    rows = [row for row in page.read_text(encoding="utf-8").splitlines() if row.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert set(CHECKS) <= listed


def test_the_error_names_the_failed_checks_and_the_reasons():
    with pytest.raises(testing.ConformanceError, match="1 of 2") as caught:
        testing.check_loss(WrongCurvature)
    assert "curvature: measured 1, curvature() returns 0.25" in str(caught.value)


def test_a_declared_failure_is_expected():
    class Declared(Right):
        """Forward KL, sum p log(p / q).

        Reference: none.
        """

        expected_failures = {"curvature": "stated wrongly on purpose"}  # noqa: RUF012

        def curvature(self):
            return 0.25

    results = {result.name: result for result in testing.run_checks(Declared)}
    assert results["curvature"].verdict == "expected failure"
    assert results["curvature"].reason == "stated wrongly on purpose"
    mark = testing.parametrize_with_checks([Declared])
    [case] = [case for case in mark.args[1] if case.id == "Declared-curvature"]
    assert case.marks[0].kwargs == {"reason": "stated wrongly on purpose", "strict": True}


def test_a_declared_failure_that_passes_is_out_of_date():
    class Declared(Right):
        expected_failures = {"curvature": "was wrong once"}  # noqa: RUF012

    assert "curvature" in failed(Declared)


def test_checks_take_names_classes_and_instances_only():
    testing.check_loss("forward_kl_chunked")
    testing.check_loss(Right())
    with pytest.raises(kdlosses.LossSpecError, match="unknown"):
        testing.check_loss("no_such_loss")
    with pytest.raises(TypeError, match="expected a loss"):
        testing.check_loss(3)


# The command.


def losses_check(*arguments):
    kdrun = Path(sys.executable).with_name("kdrun")
    return subprocess.run(
        [kdrun, "losses", "check", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )


def test_the_command_prints_checks_and_verdict():
    done = losses_check("skew_forward_kl:alpha=0.2")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[0] == ["check", "verdict", "reason"]
    assert ["curvature", "passed"] in rows
    assert done.stdout.splitlines()[-1] == "skew_forward_kl:alpha=0.2: passed (33 checks)"


def test_the_command_refuses_unknown_names_and_no_name():
    assert losses_check("no_such_loss").returncode == 2
    assert losses_check().returncode == 2
    assert losses_check("--all", "forward_kl").returncode == 2


def test_the_command_exits_with_1_when_a_check_fails(monkeypatch, capsys):
    from kdrun.cli import cli
    from kdrun.losses import check

    monkeypatch.setattr(check, "single_loss", lambda spec: WrongCurvature())
    with pytest.raises(SystemExit) as caught:
        cli.main(["losses", "check", "wrong"], standalone_mode=False)
    assert caught.value.code == 1
    out = capsys.readouterr().out
    assert "measured 1, curvature() returns 0.25" in out
    assert "wrong: failed (1 of" in out
