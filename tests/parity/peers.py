"""Finds other people's own implementations, and compares a value and its gradient with ours.

A peer that cannot be had skips its tests with the reason. None of their code is in this project.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

IGNORED = -100

Evaluate = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    """Random logits ``[2, 8, 11]``, and labels ``[2, 8]`` of which five are ignored."""

    student: Tensor
    teacher: Tensor
    labels: Tensor

    @classmethod
    def random(cls) -> Batch:
        generator = torch.Generator().manual_seed(5)
        student, teacher = 2 * torch.randn(2, 2, 8, 11, generator=generator)
        labels = torch.randint(0, 11, (2, 8), generator=generator)
        labels[0, :4] = labels[1, 6] = IGNORED
        return cls(student, teacher, labels)

    @property
    def kept(self) -> Tensor:
        return self.labels != IGNORED

    @property
    def teacher_entropy(self) -> float:
        """Mean over the supervised rows: what the cross-entropies of some peers have beyond KL."""
        log_p = self.teacher[self.kept].double().log_softmax(-1)
        return -(log_p.exp() * log_p).sum(-1).mean().item()


def assert_same(
    theirs: Evaluate,
    ours: Evaluate,
    student: Tensor,
    *,
    factor: float = 1.0,
    beyond: float = 0.0,
    rtol: float = 2e-5,
    atol: float = 2e-6,
) -> None:
    """``theirs = factor * ours + beyond``, and the gradients of the student differ by the factor.

    Args:
        theirs: the peer's scalar of the student's logits.
        ours: the scalar of kdlosses.
        student: where both are evaluated.
        factor: theirs over ours.
        beyond: a constant that theirs has in addition.
        rtol: relative tolerance.
        atol: absolute tolerance.
    """
    value, gradient = _differentiated(theirs, student)
    expected, slope = _differentiated(ours, student)
    torch.testing.assert_close(
        value, factor * expected + beyond, rtol=rtol, atol=atol, check_dtype=False
    )
    assert slope.abs().max() > 100 * atol
    torch.testing.assert_close(gradient, factor * slope, rtol=rtol, atol=atol)


def _differentiated(evaluate: Evaluate, student: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    value = evaluate(leaf)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def imported(module: str) -> Any:
    """A module of an installed peer.

    Importing some peers warns (of experimental APIs, of packages they would like): that is no
    business of these tests, so their import alone runs without the filter that makes warnings
    errors.
    """
    package = module.split(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(module)
        except ImportError as error:
            pytest.skip(f"{module} cannot be imported: {' '.join(str(error).split())}")


def torchtune() -> Any:
    """torchtune's module of distillation losses.

    The package refuses to be imported without torchao, which its losses do not use; the file
    alone is enough.
    """
    spec = importlib.util.find_spec("torchtune")
    if spec is None:
        pytest.skip("the package torchtune is not installed")
    file = Path(next(iter(spec.submodule_search_locations or ()))) / "modules/loss/kd_losses.py"
    if not file.is_file():
        pytest.skip("this torchtune has no modules/loss/kd_losses.py")
    return _module("torchtune_kd_losses", file)


def checkout(variable: str, repository: str, file: str) -> Any:
    """A file of a repository that is no package, from the folder an environment variable names."""
    folder = os.environ.get(variable)
    if not folder:
        pytest.skip(f"{repository} is no package: set {variable} to a checkout of it")
    return _module(variable.lower(), Path(folder) / file)


def _module(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
