"""Conformance checks: what a loss must do, chosen by its traits. Plugins run them like built-ins.

``check_loss("forward_kl")`` runs them all; ``parametrize_with_checks`` turns them into the tests of
a plugin. The checks use relations and finite differences, so they need no reference value.
"""

import inspect
import math
import pickle
import re
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kdlosses.divergence import Divergence, Loss, RowLoss
from kdlosses.engine import Chunking
from kdlosses.objective import TokenLoss
from kdlosses.registry import get_loss
from kdlosses.sources import Projected

__all__ = [
    "Check",
    "CheckResult",
    "ConformanceError",
    "check_loss",
    "checks_for",
    "parametrize_with_checks",
    "run_checks",
]

LossLike = str | Loss | type[Loss]
Verdict = Literal["passed", "failed", "expected failure"]

_WIDE = 49152
_IGNORED = -100
_ROUNDING = 5e-7  # of the logarithm of a float32 sum near 1, which no author can avoid


class ConformanceError(AssertionError):
    """A loss fails checks; the message has their names and the reasons."""


@dataclass(frozen=True)
class Check:
    """One named check.

    Attributes:
        name: what ``expected_failures`` and reports call it.
        description: what it demands, one line.
        function: raises where a loss fails.
    """

    name: str
    description: str
    function: Callable[[Loss], None]

    def __call__(self, loss: LossLike) -> None:
        """Check a loss.

        Raises:
            AssertionError: the loss fails; any other exception is a failure too.
        """
        with torch.enable_grad():
            self.function(_as_loss(loss))


@dataclass(frozen=True)
class CheckResult:
    """What became of one check.

    Attributes:
        name: of the check.
        verdict: ``"passed"``, ``"failed"``, or ``"expected failure"`` where the loss declares it.
        reason: why it failed, or the loss's written reason; empty where it passed.
    """

    name: str
    verdict: Verdict
    reason: str


def checks_for(loss: LossLike) -> Iterator[Check]:
    """The checks that apply to a loss, by its traits.

    Args:
        loss: a spec such as ``"skew_forward_kl:alpha=0.2"``, a class, or an instance.
    """
    loss = _as_loss(loss)
    for check, applies in _CHECKS.values():
        if applies(loss):
            yield check


def run_checks(loss: LossLike) -> list[CheckResult]:
    """Run all checks of a loss; a failure is recorded, not raised.

    A declared failure that does not happen counts as failed: its declaration is out of date.
    """
    loss = _as_loss(loss)
    results = []
    for check in checks_for(loss):
        reason = _failure(check, loss)
        declared = loss.expected_failures.get(check.name)
        if declared is None:
            result = CheckResult(check.name, "failed" if reason else "passed", reason or "")
        elif reason:
            result = CheckResult(check.name, "expected failure", declared)
        else:
            result = CheckResult(check.name, "failed", f"passes, though declared: {declared}")
        results.append(result)
    return results


def check_loss(loss: LossLike) -> None:
    """Run all checks of a loss.

    Args:
        loss: a spec such as ``"skew_forward_kl:alpha=0.2"``, a class, or an instance.

    Raises:
        ConformanceError: with the names and reasons of the failed checks.
    """
    loss = _as_loss(loss)
    results = run_checks(loss)
    failed = [result for result in results if result.verdict == "failed"]
    if failed:
        lines = [f"  {result.name}: {result.reason}" for result in failed]
        heading = f"{loss!r} fails {len(failed)} of {len(results)} checks:"
        raise ConformanceError("\n".join([heading, *lines]))


def parametrize_with_checks(losses: Iterable[LossLike]) -> Any:
    """A pytest decorator: one test for each loss and check.

    The test takes ``loss`` and ``check`` and calls ``check(loss)``. Declared failures become
    strict ``xfail`` marks with their reasons.
    """
    pytest = import_module("pytest")  # needed by those who write tests only
    cases = []
    for given in losses:
        loss = _as_loss(given)
        label = given.__name__ if isinstance(given, type) else f"{given!r}".strip("'")
        for check in checks_for(loss):
            reason = loss.expected_failures.get(check.name)
            marks = () if reason is None else pytest.mark.xfail(reason=reason, strict=True)
            cases.append(pytest.param(loss, check, marks=marks, id=f"{label}-{check.name}"))
    return pytest.mark.parametrize(("loss", "check"), cases)


_CHECKS: dict[str, tuple[Check, Callable[[Loss], bool]]] = {}


def _check(
    applies: Callable[[Loss], bool] = lambda loss: True,
) -> Callable[[Callable[[Loss], None]], Callable[[Loss], None]]:
    def register(function: Callable[[Loss], None]) -> Callable[[Loss], None]:
        name = function.__name__.lstrip("_")
        _CHECKS[name] = (Check(name, inspect.getdoc(function) or "", function), applies)
        return function

    return register


# The loss as it is written.


@_check()
def _docstring(loss: Loss) -> None:
    """The docstring has a formula in its summary and a reference; parameters are described."""
    text = inspect.cleandoc(type(loss).__dict__.get("__doc__") or "")
    if not text:
        raise AssertionError("the class has no docstring")
    summary = " ".join(text.split("\n\n", 1)[0].split())
    _, separator, formula = summary.partition("," if "," in summary else "=")
    if not separator or not re.search(r"[(|+*/^-]|\bsum\b", formula):
        raise AssertionError(
            f"the summary gives no formula after a comma or '=' (Name, sum p log(p / q).): "
            f"{summary!r}"
        )
    if not re.search(r"^References?:\s*\S", text, re.MULTILINE):
        raise AssertionError("the docstring has no line 'Reference: ...'")
    for name, field in type(loss).model_fields.items():
        if not field.description:
            raise AssertionError(f"parameter {name} has no description (Field(description=...))")


@_check()
def _expected_failures(loss: Loss) -> None:
    """Declared failures name existing checks and carry a reason."""
    for name, reason in loss.expected_failures.items():
        if name not in _CHECKS:
            raise AssertionError(f"no check is called {name!r}; there are {', '.join(_CHECKS)}")
        if not reason.strip():
            raise AssertionError(f"{name} has no written reason")


@_check()
def _bounds(loss: Loss) -> None:
    """Defaults exist, values beyond a declared bound are refused, values on one give no NaN."""
    kind = type(loss)
    kind()  # every loss constructs without arguments
    given = loss.model_dump()
    _refused(kind, {**given, "no_such_parameter": 1}, "an unknown parameter")
    for name, field in kind.model_fields.items():
        for bound in field.metadata:
            for relation, beyond, inside in (
                ("ge", -1, True),
                ("gt", -1, False),
                ("le", 1, True),
                ("lt", 1, False),
            ):
                limit = getattr(bound, relation, None)
                if not isinstance(limit, int | float):
                    continue
                _refused(kind, {**given, name: limit + beyond}, f"{name}={limit + beyond}")
                if inside:
                    _evaluates(kind, {**given, name: limit}, f"{name}={limit}")
                else:
                    _refused(kind, {**given, name: limit}, f"{name}={limit}")
    for name in kind.model_fields:
        try:
            setattr(loss, name, getattr(loss, name))
        except ValidationError:
            continue
        raise AssertionError(f"parameter {name} can be changed: keep frozen=True")


def _refused(kind: type[Loss], values: dict[str, Any], what: str) -> None:
    try:
        _quiet(kind, values)
    except ValidationError:
        return
    raise AssertionError(f"{what} is accepted")


def _evaluates(kind: type[Loss], values: dict[str, Any], what: str) -> None:
    try:
        loss = _quiet(kind, values)
    except ValidationError:
        return  # a validator of its own may exclude a bound
    teacher, student, labels = _pair(5, 9, dtype=torch.float32)
    _no_nan(f"the value at {what}", _rows(loss, student, teacher, labels))


def _quiet(kind: type[Loss], values: dict[str, Any]) -> Loss:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(**values)


@_check()
def _serialization(loss: Loss) -> None:
    """Pickle and JSON give back an equal loss with the same values."""
    teacher, student, labels = _pair(4, 9)
    expected = _rows(loss, student, teacher, labels)
    copies = {
        "pickle": pickle.loads(pickle.dumps(loss)),
        "JSON": type(loss).model_validate_json(loss.model_dump_json()),
    }
    for how, copy in copies.items():
        if copy != loss:
            raise AssertionError(f"{how} gives {copy!r} for {loss!r}")
        _close(f"the value after {how}", _rows(copy, student, teacher, labels), expected)


@_check(lambda loss: isinstance(loss, Divergence))
def _elementwise(loss: Loss) -> None:
    """A term of the integrand depends on its own entry only."""
    assert isinstance(loss, Divergence)
    teacher, student, _ = _pair(4, 10)
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    whole = loss.integrand(p, q)
    if whole.shape != p.shape:
        raise AssertionError(f"integrand gives {list(whole.shape)} for {list(p.shape)}")
    parts = [loss.integrand(p[..., cut], q[..., cut]) for cut in (slice(3), slice(3, None))]
    _close("the terms of a part of the vocabulary", torch.cat(parts, -1), whole)
    order = _permutation(10)
    _close(
        "the terms in another order", loss.integrand(p[..., order], q[..., order]), whole[:, order]
    )


@_check(lambda loss: isinstance(loss, Divergence) and loss.linear_finish)
def _linear_finish(loss: Loss) -> None:
    """Finish is linear, as linear_finish says."""
    assert isinstance(loss, Divergence)
    a, b = _normal(2, 6).abs() + 0.1
    combined = loss.finish(2 * a + 3 * b)
    _close("finish(2 a + 3 b)", combined, 2 * loss.finish(a) + 3 * loss.finish(b))


# Values.


@_check(lambda loss: loss.nonnegative)
def _nonnegative(loss: Loss) -> None:
    """No value, and no term of a sum, is below 0 on random distributions."""
    for scale in (0.1, 1.0, 5.0, 20.0):
        teacher, student, labels = _pair(20, 50, scale, torch.float32)
        _at_least_zero(loss, student, teacher, labels)


@_check(lambda loss: loss.nonnegative)
def _nonnegative_near_equality(loss: Loss) -> None:
    """No value, and no term of a sum, is below 0 near equality on a wide vocabulary."""
    teacher, noise, labels = _pair(3, _WIDE, 2.0, torch.float32)
    for scale in (1e-1, 1e-2, 1e-3, 1e-5):
        _at_least_zero(loss, teacher + scale * noise, teacher, labels)


def _at_least_zero(loss: Loss, student: Tensor, teacher: Tensor, labels: Tensor) -> None:
    lowest = _rows(loss, student, teacher, labels).min().item()
    if not lowest >= -_rounding(loss):
        raise AssertionError(f"the lowest value is {lowest:.3g}")
    if isinstance(loss, Divergence) and loss.reduction == "sum":
        term = loss.integrand(teacher.log_softmax(-1), student.log_softmax(-1)).min().item()
        if not term >= 0:
            raise AssertionError(
                f"the lowest term is {term:.3g}: the sum cancels (kdlosses.numerics.kl_terms)"
            )


def _rounding(loss: Loss) -> float:
    """What float32 leaves of 0 where the total is a logarithm: its rounding, through finish."""
    if not isinstance(loss, Divergence) or loss.reduction == "sum":
        return 0.0
    with torch.no_grad():
        ends = loss.finish(torch.tensor([0.0, _ROUNDING], dtype=torch.float64))
    return (ends[1] - ends[0]).abs().item()


@_check(lambda loss: loss.zero_at_equality)
def _zero_at_equality(loss: Loss) -> None:
    """The value is 0 where the distributions are equal, and not where they differ."""
    tolerance = max(1e-6, _rounding(loss))
    for width in (20, _WIDE):
        teacher, student, labels = _pair(3, width, 3.0, torch.float32)
        for temperature in (1.0, 2.0):
            same = _rows(loss, teacher, teacher, labels, temperature=temperature)
            _close(
                f"the value at equality, V={width}, T={temperature:g}", same, 0 * same, 0, tolerance
            )
    apart = _rows(loss, student, teacher, labels)
    if not (apart.abs() > 1e-4).all():
        raise AssertionError(f"the value is {apart[0].item():.3g} for distributions that differ")


@_check(lambda loss: loss.coarse_graining_monotone)
def _coarse_graining(loss: Loss) -> None:
    """Merging tokens never raises the value."""
    teacher, student, labels = _pair(50, 12)
    logits = [teacher, student]
    fine = _rows(loss, student, teacher, labels)
    for groups in (6, 4, 2):
        merged = [x.view(50, groups, -1).logsumexp(-1) for x in logits]
        coarse = _rows(loss, merged[1], merged[0], labels % groups)
        if (coarse > fine * (1 + 1e-9) + 1e-12).any():
            raise AssertionError(
                f"merging 12 tokens into {groups} raises a value by "
                f"{(coarse - fine).max().item():.3g}; set coarse_graining_monotone = False"
            )


@_check()
def _temperature_power(loss: Loss) -> None:
    """Near equality the value falls like T ** -temperature_power."""
    teacher, noise, labels = _pair(8, 30)
    excess = [
        _excess(loss, teacher + 0.1 * noise, teacher, labels, temperature).abs().mean()
        for temperature in (50.0, 100.0)
    ]
    measured = (excess[0] / excess[1]).log2().item()
    if not abs(measured - loss.temperature_power) < 0.1:
        raise AssertionError(
            f"measured power {measured:.2f}, temperature_power is {loss.temperature_power}"
        )


@_check(lambda loss: loss.curvature() is not None)
def _curvature(loss: Loss) -> None:
    """Near equality the value is curvature / 2 * sum (p - q)^2 / p."""
    stated = loss.curvature()
    if stated is None:
        return
    teacher, noise, labels = _pair(6, 20)
    measured = torch.zeros(6, dtype=torch.float64)
    for sign in (1e-3, -1e-3):  # both sides, so that third orders cancel
        student = teacher + sign * noise
        p, q = teacher.softmax(-1), student.softmax(-1)
        unit = ((p - q) ** 2 / p).sum(-1) / 2
        measured += _excess(loss, student, teacher, labels) / unit / 2
    worst = measured[(measured - stated).abs().argmax()].item()
    if not abs(worst - stated) < 2e-3:
        raise AssertionError(f"measured {worst:.4g}, curvature() states {stated:g}")


def _excess(
    loss: Loss, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0
) -> Tensor:
    """What the value has beyond its value at equality."""
    apart = _rows(loss, student, teacher, labels, temperature=temperature)
    return apart - _rows(loss, teacher, teacher, labels, temperature=temperature)


@_check()
def _shift_invariance(loss: Loss) -> None:
    """A constant added to all logits of a row changes nothing."""
    teacher, student, labels = _pair(5, 12)
    expected = _rows(loss, student, teacher, labels)
    _close("the student shifted by 30", _rows(loss, student + 30, teacher, labels), expected)
    _close("the teacher shifted by -30", _rows(loss, student, teacher - 30, labels), expected)


# Gradients.


@_check()
def _finite_differences(loss: Loss) -> None:
    """The gradient is that of the value at T = 1, declared detached quantities held fixed."""
    _compare_differences(loss, 1.0)


@_check()
def _finite_differences_softened(loss: Loss) -> None:
    """The gradient is that of the value at T = 2, declared detached quantities held fixed."""
    _compare_differences(loss, 2.0)


def _compare_differences(loss: Loss, temperature: float) -> None:
    rows, width, step = 3, 6, 1e-3
    teacher, student, labels = _pair(rows, width, 1.5)
    offsets = torch.tensor([-2, -1, 1, 2, -1, -0.5, 0.5, 1], dtype=torch.float64) * step
    directions = torch.eye(width, dtype=torch.float64).expand(rows, -1, -1)
    base = student[None, :, None].expand(len(offsets), rows, width, width)
    module = _module(loss, temperature=temperature)
    held = _Detached() if loss.detached else None

    def values(point: Tensor) -> Tensor:
        targets = teacher[None, :, None].expand_as(point)
        picks = labels[None, :, None].expand(point.shape[:-1])
        result: Tensor = module(point, targets, picks, reduction="none")
        return result

    with torch.no_grad():
        moved = base + offsets[:, None, None, None] * directions
        if held is None:
            table = values(moved)
        else:
            with held:
                values(base)
                held.replay()
                table = values(moved)
    a, b, c, d, e, f, g, h = table
    coarse = (a - 8 * b + 8 * c - d) / (12 * step)
    fine = (e - 8 * f + 8 * g - h) / (6 * step)
    smooth = (coarse - fine).abs() <= 1e-6 * (1 + fine.abs())
    if smooth.sum() < 0.75 * smooth.numel():
        raise AssertionError("the value is not differentiable at random distributions")
    for path, evaluate in _paths(loss, temperature=temperature):
        leaf = student.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(
            evaluate(leaf, teacher, labels, reduction="none").sum(), leaf
        )
        difference = torch.where(smooth, gradient - fine, 0.0).abs().max().item()
        if not difference <= 2e-6 * (1 + fine.abs().max().item()):
            hint = (
                "compute what is detached from .detach() tensors"
                if loss.detached
                else "does it detach something that its trait detached does not name?"
            )
            raise AssertionError(
                f"{path}: gradient and finite differences differ by {difference:.3g}; {hint}"
            )


class _Detached(TorchFunctionMode):
    """Records what ``detach`` returns, then returns the same again: it stays fixed."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[Tensor] = []
        self._next: Iterator[Tensor] | None = None

    def replay(self) -> None:
        self._next = iter(self._kept)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func not in (torch.Tensor.detach, torch.detach):
            return func(*args, **(kwargs or {}))
        if self._next is not None:
            return next(self._next)
        self._kept.append(func(*args, **(kwargs or {})).clone())
        return self._kept[-1]


@_check()
def _grad_output(loss: Loss) -> None:
    """The gradient scales with what arrives from above."""
    teacher, student, labels = _pair(6, 9)
    for path, evaluate in _paths(loss):
        single, triple = (
            _value_and_gradient(evaluate, student, teacher, labels, factor=factor)[1]
            for factor in (1.0, 3.0)
        )
        _close(f"{path}: the gradient of 3 times the loss", triple, 3 * single)


@_check()
def _teacher_gradient(loss: Loss) -> None:
    """The teacher receives no gradient; the student does."""
    teacher, student, labels = _pair(6, 9)
    for path, evaluate in _paths(loss):
        one, two = (x.clone().requires_grad_() for x in (student, teacher))
        evaluate(one, two, labels).backward()
        if two.grad is not None:
            raise AssertionError(f"{path}: the teacher receives a gradient")
        if one.grad is None or not one.grad.any():
            raise AssertionError(f"{path}: the student receives no gradient")


@_check()
def _frozen_head(loss: Loss) -> None:
    """A frozen head receives no gradient, and the hidden states the same one as before."""
    hidden, weight, teacher, labels = _projected(6, 9)
    for path, evaluate in _paths(loss):
        found = []
        for trains in (True, False):
            x = hidden.clone().requires_grad_()
            head = weight.clone().requires_grad_(trains)
            evaluate(Projected(x, head), teacher, labels).backward()
            if (head.grad is not None) != trains:
                raise AssertionError(f"{path}: the head's gradient is {head.grad}")
            found.append(x.grad)
        assert found[0] is not None
        assert found[1] is not None
        _close(f"{path}: the hidden states' gradient", found[1], found[0])


# Batches.


@_check()
def _masking(loss: Loss) -> None:
    """Ignored rows are as if they were not there, whatever they hold."""
    teacher, student, labels = _pair(8, 9)
    kept = torch.tensor([0, 2, 3, 6])
    masked = torch.full_like(labels, _IGNORED).index_copy(0, kept, labels[kept])
    spoiled = torch.full_like(student, math.nan).index_copy(0, kept, student[kept])
    for path, evaluate in _paths(loss):
        expected, gradient = _value_and_gradient(
            evaluate, student[kept], teacher[kept], labels[kept]
        )
        value, full = _value_and_gradient(evaluate, spoiled, teacher, masked)
        _close(f"{path}: the value with ignored rows", value, expected)
        _close(
            f"{path}: the gradient with ignored rows",
            full,
            torch.zeros_like(full).index_copy(0, kept, gradient),
        )


@_check()
def _all_masked(loss: Loss) -> None:
    """With every row ignored the value is 0 and the gradient zeros, still connected."""
    teacher, student, labels = _pair(4, 9)
    for path, evaluate in _paths(loss):
        value, gradient = _value_and_gradient(
            evaluate, student, teacher, torch.full_like(labels, _IGNORED)
        )
        if value.item() != 0 or gradient.any():
            raise AssertionError(f"{path}: value {value.item():.3g}, gradient not all 0")


@_check()
def _chunk_size(loss: Loss) -> None:
    """Value and gradient are those of the plain evaluation for every chunk size."""
    hidden, weight, teacher, labels = _projected(10, 9)

    def run(size: int | None) -> tuple[Tensor, ...]:
        x, head = (leaf.clone().requires_grad_() for leaf in (hidden, weight))
        value = _module(loss, size, temperature=1.5)(Projected(x, head), teacher, labels)
        return value.detach(), *torch.autograd.grad(value, (x, head))

    expected = run(None)
    for size in (1, 3, 10, 64):
        names = ("value", "gradient of the hidden states", "gradient of the head")
        for name, got, wanted in zip(names, run(size), expected, strict=True):
            _close(f"the {name} in chunks of {size}", got, wanted)


@_check()
def _row_order(loss: Loss) -> None:
    """Each row keeps its value in another order of rows."""
    teacher, student, labels = _pair(8, 9)
    order = _permutation(8)
    expected = _rows(loss, student, teacher, labels)[order]
    _close(
        "the values in another order",
        _rows(loss, student[order], teacher[order], labels[order]),
        expected,
    )


@_check()
def _batch_split(loss: Loss) -> None:
    """Each row keeps its value in a smaller batch."""
    teacher, student, labels = _pair(8, 9)
    parts = [
        _rows(loss, student[cut], teacher[cut], labels[cut]) for cut in (slice(3), slice(3, None))
    ]
    _close("the values in two batches", torch.cat(parts), _rows(loss, student, teacher, labels))


@_check()
def _num_tokens(loss: Loss) -> None:
    """Micro-batches with the step's token count add up to the undivided step."""
    teacher, student, labels = _pair(9, 9)
    labels[[1, 7, 8]] = _IGNORED
    for path, evaluate in _paths(loss):
        expected = _value_and_gradient(evaluate, student, teacher, labels)
        parts = [
            _value_and_gradient(evaluate, student[cut], teacher[cut], labels[cut], num_tokens=6)
            for cut in (slice(2), slice(2, 7), slice(7, None))
        ]
        _close(f"{path}: the value", torch.stack([value for value, _ in parts]).sum(), expected[0])
        _close(f"{path}: the gradient", torch.cat([part for _, part in parts]), expected[1])


@_check()
def _padded_heads(loss: Loss) -> None:
    """Entries beyond the shared vocabulary take no part."""
    teacher, student, labels = _pair(5, 9)
    padding = torch.full((5, 4), 20.0, dtype=torch.float64)
    wide_teacher, wide_student = (torch.cat([x, padding], -1) for x in (teacher, student))
    for path, evaluate in _paths(loss):
        expected, gradient = _value_and_gradient(evaluate, student, teacher, labels)
        value, _ = _value_and_gradient(evaluate, student, wide_teacher, labels)
        _close(f"{path}: the value with a wider teacher", value, expected)
        value, wide = _value_and_gradient(evaluate, wide_student, teacher, labels)
        _close(f"{path}: the value with a wider student", value, expected)
        _close(f"{path}: its gradient", wide, torch.cat([gradient, 0 * padding], -1))


# Extremes.


@_check()
def _impossible_tokens(loss: Loss) -> None:
    """Logits of -inf on either side or both give no NaN in value or gradient."""
    for where in ("student", "teacher", "both"):
        teacher, student, labels = _pair(6, 9, dtype=torch.float32)
        for side, logits in (("student", student), ("teacher", teacher)):
            if where in (side, "both"):
                logits[:, 2:5] = -math.inf
        labels %= 5  # some labels are impossible too
        for path, evaluate in _paths(loss):
            value, gradient = _value_and_gradient(evaluate, student, teacher, labels)
            _no_nan(f"{path}: the value with -inf on {where}", value)
            _finite(f"{path}: the gradient with -inf on {where}", gradient)


@_check()
def _underflow(loss: Loss) -> None:
    """Far logits at T = 0.05 give the value of float64 and finite gradients."""
    teacher, student, labels = _pair(8, 12, 10.0, torch.float32)
    for path, evaluate in _paths(loss, temperature=0.05):
        exact = evaluate(student.double(), teacher.double(), labels, reduction="none")
        value = evaluate(student, teacher, labels, reduction="none")
        _no_nan(f"{path}: the value", value)
        _close(f"{path}: the value in float32", value.double(), exact, 1e-3, 1e-5)
        _finite(f"{path}: the gradient", _value_and_gradient(evaluate, student, teacher, labels)[1])


@_check()
def _bfloat16(loss: Loss) -> None:
    """Logits in bfloat16 give the value of float64 on the same numbers."""
    _compare_precision(loss, torch.bfloat16)


@_check()
def _float16(loss: Loss) -> None:
    """Logits in float16 give the value of float64 on the same numbers."""
    _compare_precision(loss, torch.float16)


def _compare_precision(loss: Loss, dtype: torch.dtype) -> None:
    teacher, student, labels = _pair(6, 40, 1.5, dtype)
    precision = torch.finfo(dtype).eps
    for path, evaluate in _paths(loss):
        expected, value = (
            evaluate(x, y, labels, reduction="none")
            for x, y in ((student.double(), teacher.double()), (student, teacher))
        )
        _close(f"{path}: the value", value.double(), expected, 1e-4, 1e-5)
        _, exact = _value_and_gradient(evaluate, student.double(), teacher.double(), labels)
        _, gradient = _value_and_gradient(evaluate, student, teacher, labels)
        if gradient.dtype != dtype:
            raise AssertionError(f"{path}: the gradient is {gradient.dtype}")
        scale = exact.abs().max().item()
        _close(f"{path}: the gradient", gradient.double(), exact, 2 * precision, precision * scale)


@_check()
def _chunked_memory(loss: Loss) -> None:
    """In chunks, a further row costs far less memory than its logits: nothing is [rows, V]."""
    width, few, many = 1024, 16, 64

    def peak(rows: int) -> int:
        hidden, weight, teacher, labels = _projected(rows, width)
        source = Projected(hidden.requires_grad_(), weight.requires_grad_())
        target = Projected(teacher @ weight.detach(), weight.detach())
        module = _module(loss, 8)
        with _LiveBytes() as live:
            module(source, target, labels).backward()
        peak_bytes: int = live.peak
        return peak_bytes

    peak(few)  # what a first call sets up is no matter of rows
    per_row = (peak(many) - peak(few)) / (many - few)
    if not per_row < width / 2:
        raise AssertionError(
            f"a further row takes {per_row:.0f} bytes at V={width}: something of size [rows, V] "
            "is made or kept"
        )


class _LiveBytes(TorchDispatchMode):
    """The largest number of bytes alive at once among the tensors made inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._now = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else (result,):
            if isinstance(made, Tensor):
                self._add(made.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def gone(_: Any) -> None:
            del self._seen[key]
            self._now -= size

        self._seen[key] = weakref.ref(storage, gone)
        self._now += size
        self.peak = max(self.peak, self._now)


# Shared by the checks.


def _as_loss(loss: LossLike) -> Loss:
    if isinstance(loss, str):
        return get_loss(loss).loss
    if isinstance(loss, type) and issubclass(loss, Loss):
        loss = loss()
    if not isinstance(loss, Divergence | RowLoss):
        raise TypeError(f"expected a loss or the name of one, got {loss!r}")
    return loss


def _failure(check: Check, loss: Loss) -> str | None:
    try:
        check(loss)
    except AssertionError as error:
        return str(error) or "an assertion failed"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _module(loss: Loss, chunk_size: int | None = None, temperature: float = 1.0) -> TokenLoss:
    chunking = None if chunk_size is None else Chunking(chunk_size, compiled=False)
    return TokenLoss(loss, chunking=chunking, temperature=temperature)


def _paths(loss: Loss, temperature: float = 1.0) -> Iterator[tuple[str, TokenLoss]]:
    yield "plain", _module(loss, None, temperature)
    yield "chunked", _module(loss, 3, temperature)


def _rows(
    loss: Loss, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 1.0
) -> Tensor:
    """Each row's value, without the temperature's factor."""
    module = TokenLoss(loss, temperature=temperature, temperature_scaling=False)
    values: Tensor = module(student, teacher, labels, reduction="none")
    return values.detach()


def _normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _permutation(size: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(size))


def _pair(
    rows: int, width: int, scale: float = 1.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a teacher and a student ``[rows, width]``, and labels ``[rows]``."""
    teacher, student = (scale * _normal(2, rows, width)).to(dtype).unbind()
    return teacher, student, torch.arange(rows) * 7 % width


def _projected(rows: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, head, the teacher's logits, labels."""
    teacher, _, labels = _pair(rows, width)
    return _normal(rows, 4), _normal(width, 4), teacher, labels


def _value_and_gradient(
    evaluate: TokenLoss,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    num_tokens: int | None = None,
    factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    value = factor * evaluate(leaf, teacher, labels, num_tokens)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def _close(
    what: str, got: Tensor, expected: Tensor, rtol: float = 1e-9, atol: float = 1e-11
) -> None:
    if got.shape != expected.shape:
        raise AssertionError(f"{what} has shape {list(got.shape)}, expected {list(expected.shape)}")
    wrong = ~torch.isclose(got, expected, rtol=rtol, atol=atol)
    if wrong.any():
        raise AssertionError(
            f"{what} is {got[wrong][0].item():.6g} instead of {expected[wrong][0].item():.6g}"
        )


def _no_nan(what: str, values: Tensor) -> None:
    if values.isnan().any():
        raise AssertionError(f"{what} is NaN")


def _finite(what: str, values: Tensor) -> None:
    if not values.isfinite().all():
        raise AssertionError(f"{what} is not finite")
