"""The conformance checks of token weights."""

import json
import pickle
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from kdlosses.engine import Chunking
from kdlosses.losses.forward_kl import ForwardKL
from kdlosses.numerics import LOG_ZERO
from kdlosses.objective import KDObjective
from kdlosses.sources import Projected
from kdlosses.testing.cases import close, finite, normal, pair, permutation
from kdlosses.testing.catalogue import Catalogue
from kdlosses.testing.form import check_bounds, check_docstring
from kdlosses.testing.verdicts import CheckResult
from kdlosses.token_loss import TokenLoss
from kdlosses.token_weight import TokenWeight
from kdlosses.weight_registry import get_weight

WEIGHT_CONFORMANCE_VERSION = 1
"""Raised when a check is added or demands more, so that a verdict says what was checked."""

WeightLike = str | TokenWeight | type[TokenWeight]


def as_weight(weight: WeightLike) -> TokenWeight:
    """The token weight given by a spec, a class or an instance.

    Raises:
        TypeError: none of the three.
    """
    if isinstance(weight, str):
        return get_weight(weight)
    found = weight() if isinstance(weight, type) else weight
    if not isinstance(found, TokenWeight):
        raise TypeError(f"expected a token weight or the name of one, got {weight!r}")
    return found


_WEIGHTS: Catalogue[TokenWeight] = Catalogue("weight", as_weight, WEIGHT_CONFORMANCE_VERSION)
_conformance = _WEIGHTS.conformance


def run_weight_checks(weight: WeightLike) -> list[CheckResult]:
    """Run all checks of a token weight and record failures instead of raising them.

    Args:
        weight: a spec such as ``"disagreement:power=0.5"``, a class, or an instance.
    """
    return _WEIGHTS.run(weight)


def check_weight(weight: WeightLike) -> None:
    """Run all checks of a token weight; argument as in :func:`run_weight_checks`.

    Raises:
        ConformanceError: contains the names and reasons of the failed checks.
    """
    _WEIGHTS.demand(weight)


def report_weight_checks(weight: WeightLike) -> dict[str, Any]:
    """Run all checks and describe the result as :func:`report_checks` does, with ``weight``."""
    return _WEIGHTS.report(weight)


def parametrize_with_weight_checks(weights: Iterable[WeightLike]) -> Any:
    """A pytest decorator like :func:`parametrize_with_checks`; the test takes ``weight, check``."""
    return _WEIGHTS.parametrize("weight", weights)


def _bound(weight: TokenWeight, rows: int, dtype: torch.dtype = torch.float64) -> TokenWeight:
    """The weight in its initial state, with positions 0, 1, 2, ... if it uses them."""
    state = {n: torch.tensor(x, dtype=dtype) for n, x in weight.initial_state().items()}
    place = {"position": torch.arange(rows)} if weight.uses_position else {}
    return weight.bind({**state, **place})


def _weigh(weight: TokenWeight, teacher: Tensor, student: Tensor, labels: Tensor) -> Tensor:
    """The weights of rows of logits."""
    bound = _bound(weight, len(labels), student.dtype)
    p, q = (side.log_softmax(-1).clamp_min(LOG_ZERO) for side in (teacher, student))
    return bound.weigh(p, q, labels)


@_conformance(about="documentation")
def _docstring(weight: TokenWeight) -> None:
    """The docstring has a formula and a reference; parameters are described."""
    check_docstring(type(weight))


@_conformance()
def _bounds(weight: TokenWeight) -> None:
    """Parameters have defaults, bounds are enforced, and values on a bound give finite weights."""

    def usable(at_bound: TokenWeight) -> None:
        finite(f"the weight of {at_bound!r}", _weigh(at_bound, *pair(5, 9, dtype=torch.float32)))

    check_bounds(weight, usable)


@_conformance()
def _serialization(weight: TokenWeight) -> None:
    """Pickle and JSON restore an equal weight."""
    kind = type(weight)
    for how, copy in (
        ("pickle", pickle.loads(pickle.dumps(weight))),
        ("JSON", kind(**json.loads(weight.model_dump_json()))),
    ):
        if copy != weight:
            raise AssertionError(f"{how} gives {copy!r} for {weight!r}")


@_conformance()
def _values(weight: TokenWeight) -> None:
    """One weight a row, finite and at least 0, also for impossible and certain tokens."""
    teacher, student, labels = pair(6, 9, 3.0)
    certain = torch.where(torch.arange(9) == labels.unsqueeze(-1), 0.0, -torch.inf).double()
    none_in_common = certain.roll(1, -1)
    for what, p, q in (
        ("ordinary rows", teacher, student),
        ("equal rows", student, student),
        ("rows of one possible token", certain, certain),
        ("a certain teacher", certain, student),
        ("a certain student", teacher, certain),
        ("rows without a common token", none_in_common, certain),
    ):
        found = _weigh(weight, p, q, labels)
        if found.shape != labels.shape:
            raise AssertionError(f"gives {list(found.shape)} for labels {list(labels.shape)}")
        finite(f"the weight of {what}", found)
        if (found < 0).any():
            raise AssertionError(f"the weight of {what} is {found.min().item():.3g}, below 0")


@_conformance()
def _rows(weight: TokenWeight) -> None:
    """The weight of a row does not depend on the other rows of its tile."""
    teacher, student, labels = pair(7, 9)
    whole = _weigh(weight, teacher, student, labels)
    bound = _bound(weight, 7)
    order = permutation(7)[:3]
    if weight.uses_position:
        bound = bound.bind({"position": order})
    p, q = (side.log_softmax(-1)[order] for side in (teacher, student))
    close("the weights of some of the rows", bound.weigh(p, q, labels[order]), whole[order])


@_conformance()
def _precision(weight: TokenWeight) -> None:
    """Weights in float32 are close to those in float64."""
    sides = pair(50, 33, 3.0)
    exact = _weigh(weight, *sides)
    rounded = _weigh(weight, *(x.float() if x.is_floating_point() else x for x in sides))
    close("the weight in float32", rounded.double(), exact, rtol=1e-4, atol=1e-5)


@_conformance()
def _objective(weight: TokenWeight) -> None:
    """Plain, chunked and fused objectives give the weighted sum, without a gradient through it."""
    hidden, head = normal(6, 4), normal(9, 4)
    teacher, _, labels = pair(6, 9)
    leaf = hidden.clone().requires_grad_()
    rows = TokenLoss(ForwardKL())(leaf @ head.T, teacher, labels, reduction="none")
    weights = _weigh(weight, teacher, (hidden @ head.T), labels)
    expected = (rows * weights).sum() / len(labels)
    (gradient,) = torch.autograd.grad(expected, leaf)
    for name, chunking, fused in (
        ("plain", None, False),
        ("chunked", Chunking(4, compiled=False), False),
        ("fused", Chunking(4, compiled=False), True),
    ):
        leaf = hidden.clone().requires_grad_()
        student = Projected(leaf, head) if fused else leaf @ head.T
        out = KDObjective(TokenLoss(ForwardKL(), chunking=chunking), 1.0, weight)(
            student, teacher, labels
        )
        close(f"the {name} objective", out.loss.detach(), expected.detach())
        (found,) = torch.autograd.grad(out.loss, leaf)
        close(f"the {name} gradient", found, gradient)


@_conformance(lambda weight: weight.supports_top_k)
def _top_k(weight: TokenWeight) -> None:
    """A weight that supports top-k teachers ignores labels, and all tokens but one are enough."""
    teacher, student, labels = pair(6, 9)
    whole = _weigh(weight, teacher, student, labels)
    order = permutation(9)
    events = _weigh(weight, teacher[:, order], student[:, order], torch.zeros_like(labels))
    close("the weight over events in another order, without labels", events, whole)


@_conformance(lambda weight: weight.stateful)
def _state(weight: TokenWeight) -> None:
    """The next state has the same variables, as finite numbers."""
    state = weight.initial_state()
    for mean, share in ((0.0, 0.0), (0.3, 0.5), (1.0, 1.0)):
        after = weight.next_state(state, mean, share, 0.5)
        if set(after) != set(state):
            raise AssertionError(f"next_state gives {sorted(after)} instead of {sorted(state)}")
        for name, value in after.items():
            finite(f"{name} after a step", torch.tensor(float(value)))
