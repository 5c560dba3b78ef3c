"""Conformance checks of losses on hidden states, selected by their traits."""

import pickle
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from kdlosses.feature_registry import build_feature
from kdlosses.feature_term import FeatureTerm, Hidden
from kdlosses.hidden_loss import FeatureLoss, HiddenLoss, RelationLoss
from kdlosses.testing.cases import close, finite, normal, permutation
from kdlosses.testing.catalogue import Catalogue, Check
from kdlosses.testing.form import check_bounds, check_docstring
from kdlosses.testing.verdicts import CheckResult

FEATURE_CONFORMANCE_VERSION = 1
"""Raised when a check is added or demands more."""

FeatureLike = str | HiddenLoss | type[HiddenLoss]
_LENGTHS = (4, 1, 3)  # of the sequences in a batch


def as_feature(loss: FeatureLike) -> HiddenLoss:
    """The loss given by a spec, a class or an instance.

    Raises:
        TypeError: none of the three.
    """
    if isinstance(loss, str):
        return build_feature(loss)
    if isinstance(loss, type) and issubclass(loss, HiddenLoss):
        loss = loss()
    if not isinstance(loss, FeatureLoss | RelationLoss):
        raise TypeError(f"expected a loss on hidden states or the name of one, got {loss!r}")
    return loss


_FEATURES: Catalogue[HiddenLoss] = Catalogue("features", as_feature, FEATURE_CONFORMANCE_VERSION)
_conformance = _FEATURES.conformance


def feature_checks_for(loss: FeatureLike) -> Iterator[Check]:
    """The checks that apply to a loss, given its kind and traits.

    Args:
        loss: a spec such as ``"hidden_mse:scale=teacher"``, a class, or an instance.
    """
    return _FEATURES.checks_for(loss)


def run_feature_checks(loss: FeatureLike) -> list[CheckResult]:
    """Run all checks of a loss and record failures instead of raising them."""
    return _FEATURES.run(loss)


def report_feature_checks(loss: FeatureLike) -> dict[str, Any]:
    """Run all checks and describe the result as :func:`report_checks` does, with ``features``."""
    return _FEATURES.report(loss)


def check_feature(loss: FeatureLike) -> None:
    """Run all checks of a loss on hidden states.

    Raises:
        ConformanceError: contains the names and reasons of the failed checks.
    """
    _FEATURES.demand(loss)


def parametrize_with_feature_checks(losses: Iterable[FeatureLike]) -> Any:
    """A pytest decorator like :func:`parametrize_with_checks`; the test takes ``loss, check``."""
    return _FEATURES.parametrize("loss", losses)


def _values(loss: HiddenLoss, teacher: Tensor, student: Tensor) -> Tensor:
    if isinstance(loss, RelationLoss):
        return loss.sequence(teacher, student)
    assert isinstance(loss, FeatureLoss)
    return loss.row(teacher, student)


def _states(rows: int, width: int = 6) -> tuple[Tensor, Tensor]:
    teacher, student = normal(2, rows, width).unbind()
    return teacher, student


@_conformance(about="documentation")
def _docstring(loss: HiddenLoss) -> None:
    """The docstring has a formula in its summary and a reference; parameters are described."""
    check_docstring(type(loss))


@_conformance()
def _bounds(loss: HiddenLoss) -> None:
    """Parameters have defaults, bounds are enforced, and values on a bound give finite values."""

    def usable(at_bound: HiddenLoss) -> None:
        finite(f"the value of {at_bound!r}", _values(at_bound, *_states(5)))

    check_bounds(loss, usable)


@_conformance()
def _serialization(loss: HiddenLoss) -> None:
    """Pickle and JSON restore an equal loss with the same values."""
    teacher, student = _states(4)
    copies = {
        "pickle": pickle.loads(pickle.dumps(loss)),
        "JSON": type(loss).model_validate_json(loss.model_dump_json()),
    }
    for how, copy in copies.items():
        if copy != loss:
            raise AssertionError(f"{how} gives {copy!r} for {loss!r}")
        expected = _values(loss, teacher, student)
        close(f"the value after {how}", _values(copy, teacher, student), expected)


@_conformance()
def _shapes(loss: HiddenLoss) -> None:
    """There is one value per token, also for one token and for width 1."""
    for rows, width in ((5, 6), (1, 6), (3, 1)):
        found = _values(loss, *_states(rows, width))
        if found.shape != (rows,):
            raise AssertionError(f"states [{rows}, {width}] give values {list(found.shape)}")


@_conformance(lambda loss: isinstance(loss, FeatureLoss))
def _rows_are_independent(loss: HiddenLoss) -> None:
    """The value of a token depends on its own states only."""
    teacher, student = _states(6)
    whole, order = _values(loss, teacher, student), permutation(6)
    close("the values of some tokens", _values(loss, teacher[2:5], student[2:5]), whole[2:5])
    close(
        "the values in another order", _values(loss, teacher[order], student[order]), whole[order]
    )
    folded = _values(loss, teacher.view(2, 3, -1), student.view(2, 3, -1))
    close("the values of states [2, 3, H]", folded, whole.view(2, 3))


@_conformance(lambda loss: not loss.equal_widths)
def _other_widths(loss: HiddenLoss) -> None:
    """States of different widths are accepted, as equal_widths = False declares."""
    teacher, student = normal(5, 6), normal(5, 4)
    found = _values(loss, teacher, student)
    if found.shape != (5,):
        raise AssertionError(f"widths 6 and 4 give values {list(found.shape)}")


@_conformance(lambda loss: loss.zero_at_equality)
def _zero_at_equality(loss: HiddenLoss) -> None:
    """The value is 0 if the states are equal."""
    states, _ = _states(5)
    close("the value at equality", _values(loss, states, states.clone()), states.new_zeros(5))


@_conformance(lambda loss: loss.nonnegative)
def _nonnegative(loss: HiddenLoss) -> None:
    """No value is below 0, also in float32 and close to equality."""
    teacher, student = _states(50)
    for what, other in (("random", student), ("close", teacher + 1e-6 * student)):
        lowest = _values(loss, teacher.float(), other.float()).min().item()
        if lowest < 0:
            raise AssertionError(f"the value of {what} states reaches {lowest:.3g}")


@_conformance(lambda loss: loss.scale_invariant)
def _scale_invariant(loss: HiddenLoss) -> None:
    """Multiplying one side by 3 changes no value, as scale_invariant declares."""
    teacher, student = _states(5)
    expected = _values(loss, teacher, student)
    for what, found in (
        ("3 times the teacher's states", _values(loss, 3 * teacher, student)),
        ("3 times the student's states", _values(loss, teacher, 3 * student)),
    ):
        close(f"the value for {what}", found, expected, rtol=1e-6, atol=1e-9)


@_conformance()
def _extremes(loss: HiddenLoss) -> None:
    """Values and gradients are finite in float32 for states of 0, equal states and large ones."""
    teacher, student = (each.float() for each in _states(4))
    zero = torch.zeros_like(student)
    for what, t, s in (
        ("a student of zeros", teacher, zero),
        ("a teacher of zeros", zero, student),
        ("equal states", teacher, teacher.clone()),
        ("states of 10000", 1e4 * teacher, 1e4 * student),
    ):
        leaf = s.clone().requires_grad_()
        value = _values(loss, t, leaf)
        finite(f"the value for {what}", value)
        finite(f"the gradient for {what}", torch.autograd.grad(value.sum(), leaf)[0])


@_conformance()
def _finite_differences(loss: HiddenLoss) -> None:
    """The gradient agrees with finite differences."""
    teacher, student = _states(3, 5)
    step = 1e-4
    leaf = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(_values(loss, teacher, leaf).sum(), leaf)
    smooth = 0
    for place in range(student.numel()):
        move = torch.zeros_like(student).view(-1)
        move[place] = step
        move = move.view_as(student)

        def slope(by: float, move: Tensor = move) -> float:
            up = _values(loss, teacher, student + by * move).sum()
            down = _values(loss, teacher, student - by * move).sum()
            return float(up - down) / (2 * by * step)

        # By Richardson, without the term of the second order; a kink shows in the difference.
        fine, coarse = slope(1.0), slope(2.0)
        found, expected = gradient.view(-1)[place].item(), (4 * fine - coarse) / 3
        if abs(fine - coarse) > 1e-5 * (1 + abs(fine)):
            continue
        smooth += 1
        if abs(found - expected) > 2e-6 * (1 + abs(expected)):
            raise AssertionError(
                f"the gradient is {found:.6g}, but finite differences give {expected:.6g}; does "
                "the loss detach the student?"
            )
    if smooth < 0.75 * student.numel():
        raise AssertionError("the value is not differentiable at random states")


@_conformance()
def _chunks(loss: HiddenLoss) -> None:
    """The evaluation in chunks gives the value and the gradients of the plain one."""
    ids = torch.repeat_interleave(torch.arange(len(_LENGTHS)), torch.tensor(_LENGTHS))
    ids = ids.to(torch.get_default_device())
    for width in (6, 4):  # with and without a projector
        teacher, student = normal(2, sum(_LENGTHS), 6), normal(2, sum(_LENGTHS), width)
        found = []
        for chunk_size in (None, 3):
            term = FeatureTerm(
                loss,
                Hidden(2, 6),
                Hidden(2, width),
                chunk_size=chunk_size,
            ).double()
            leaf = student.clone().requires_grad_()
            value, mean = term(teacher.unbind(), leaf.unbind(), 5, ids)
            leaves = [leaf, *term.parameters()]
            found.append([value.detach(), mean, *torch.autograd.grad(value, leaves)])
        for plain, chunked in zip(*found, strict=True):
            close(f"in chunks, with widths 6 and {width}, a value or gradient", chunked, plain)
