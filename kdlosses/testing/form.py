"""Checks of docstring, parameters and traits."""

import inspect
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

from kdlosses.definition import Definition
from kdlosses.divergence import Divergence, Loss
from kdlosses.testing.cases import close, no_nan, normal, pair, permutation, rows
from kdlosses.testing.catalogue import D, conformance


@conformance(about="documentation")
def _docstring(loss: Loss) -> None:
    """The docstring has a formula in its summary and a reference; parameters are described."""
    check_docstring(type(loss))


def check_docstring(kind: type[BaseModel]) -> None:
    """Refuse a class without formula, reference, or description of its parameters.

    Raises:
        AssertionError: names what is missing.
    """
    text = inspect.cleandoc(kind.__dict__.get("__doc__") or "")
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
    for name, field in kind.model_fields.items():
        if not field.description:
            raise AssertionError(f"parameter {name} has no description (Field(description=...))")


@conformance()
def _bounds(loss: Loss) -> None:
    """Parameters have defaults, bounds are enforced, and values on a bound give no NaN."""

    def usable(at_bound: Loss) -> None:
        teacher, student, labels = pair(5, 9, dtype=torch.float32)
        no_nan(f"the value of {at_bound!r}", rows(at_bound, student, teacher, labels))

    check_bounds(loss, usable)


def check_bounds(definition: D, usable: Callable[[D], None]) -> None:
    """Raise an AssertionError unless a definition has defaults and enforces its bounds.

    Args:
        definition: a loss or a token weight.
        usable: raises if a definition with a parameter on its bound gives no right value.
    """
    kind = type(definition)
    kind()  # fails if a parameter has no default
    given = definition.model_dump()
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
                    _evaluates(kind, {**given, name: limit}, usable)
                else:
                    _refused(kind, {**given, name: limit}, f"{name}={limit}")
    for name in kind.model_fields:
        try:
            setattr(definition, name, getattr(definition, name))
        except ValidationError:
            continue
        raise AssertionError(f"parameter {name} can be changed: keep frozen=True")


def _refused(kind: type[Definition], values: dict[str, Any], what: str) -> None:
    try:
        _quiet(kind, values)
    except ValidationError:
        return
    raise AssertionError(f"{what} is accepted")


def _evaluates(kind: type[D], values: dict[str, Any], usable: Callable[[D], None]) -> None:
    try:
        at_bound = _quiet(kind, values)
    except ValidationError:
        return  # a custom validator may exclude a bound
    usable(at_bound)


def _quiet(kind: type[D], values: dict[str, Any]) -> D:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(**values)


@conformance()
def _serialization(loss: Loss) -> None:
    """Pickle and JSON restore an equal loss with the same values."""
    teacher, student, labels = pair(4, 9)
    expected = rows(loss, student, teacher, labels)
    copies = {
        "pickle": pickle.loads(pickle.dumps(loss)),
        "JSON": type(loss).model_validate_json(loss.model_dump_json()),
    }
    for how, copy in copies.items():
        if copy != loss:
            raise AssertionError(f"{how} gives {copy!r} for {loss!r}")
        close(f"the value after {how}", rows(copy, student, teacher, labels), expected)


@conformance(lambda loss: isinstance(loss, Divergence))
def _elementwise(loss: Loss) -> None:
    """Each term of the integrand depends only on its own entry."""
    assert isinstance(loss, Divergence)
    teacher, student, _ = pair(4, 10)
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    whole = loss.integrand(p, q)
    if whole.shape != p.shape:
        raise AssertionError(f"integrand gives {list(whole.shape)} for {list(p.shape)}")
    parts = [loss.integrand(p[..., cut], q[..., cut]) for cut in (slice(3), slice(3, None))]
    close("the terms of a part of the vocabulary", torch.cat(parts, -1), whole)
    order = permutation(10)
    close(
        "the terms in another order", loss.integrand(p[..., order], q[..., order]), whole[:, order]
    )


@conformance(lambda loss: isinstance(loss, Divergence) and loss.linear_finish)
def _linear_finish(loss: Loss) -> None:
    """Finish is linear, as declared by linear_finish."""
    assert isinstance(loss, Divergence)
    a, b = normal(2, 6).abs() + 0.1
    combined = loss.finish(2 * a + 3 * b)
    close("finish(2 a + 3 b)", combined, 2 * loss.finish(a) + 3 * loss.finish(b))
