"""Losses of 2024 to 2026 against their authors' code, in repositories that are no packages.

``KDLOSSES_TODI`` names a checkout of github.com/jungseongryong/ToDi, ``KDLOSSES_BILD`` one of
github.com/fpcsong/BiLD, ``KDLOSSES_CSD`` one of github.com/aailab-kaist/CSD, and
``KDLOSSES_MODELOPT`` one of github.com/NVIDIA/Model-Optimizer; without them tests are skipped.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from peers import IGNORED, Batch, assert_same, checkout

from kdlosses import get_loss


@pytest.fixture
def todi(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Their function of logits, teacher's logits and labels, summed over tokens."""
    folder = os.environ.get("KDLOSSES_TODI")
    if not folder:
        pytest.skip("ToDi is no package: set KDLOSSES_TODI to a checkout of it")
    monkeypatch.syspath_prepend(f"{folder}/code")
    # The package imports what it trains with; the module of the losses does not need it.
    package = ModuleType("criterions")
    package.__path__ = [f"{folder}/code/criterions"]
    monkeypatch.setitem(sys.modules, "criterions", package)
    module = importlib.import_module("criterions.various_divergence")
    criterion = module.VariousDivergence.__new__(module.VariousDivergence)
    torch.nn.Module.__init__(criterion)
    criterion.padding_id, criterion.kd_temp, criterion.tea_temp = IGNORED, 1.0, 1.0
    return criterion.compute_ToDi


def test_todi_is_equal_in_value_and_gradient(batch: Batch, todi: Any) -> None:
    assert_same(
        lambda x: todi(x, batch.teacher, batch.labels) / batch.kept.sum(),
        lambda x: get_loss("todi")(x, batch.teacher, batch.labels),
        batch.student,
    )


@pytest.mark.parametrize("k", [3, 8])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_bild_is_the_sum_of_both_directions(batch: Batch, k: int, temperature: float) -> None:
    theirs = checkout("KDLOSSES_BILD", "BiLD", "distil_losses/BILD.py").bild_loss
    ours = get_loss(f"bild:k={k}", temperature=temperature, temperature_scaling=False)
    options = {"top_k": k, "temperature": temperature}

    def both(x: Any) -> Any:
        rows = sum(theirs(x, batch.teacher, **options, student_led=led) for led in (False, True))
        return rows.squeeze(-1)[batch.kept].mean()

    assert_same(both, lambda x: ours(x, batch.teacher, batch.labels), batch.student)


@pytest.mark.parametrize("threshold", [0.2, 0.5])
def test_mft_is_equal_with_everywhere(batch: Batch, threshold: float) -> None:
    module = checkout("KDLOSSES_MODELOPT", "Model-Optimizer", "modelopt/torch/distill/losses.py")
    theirs = module.MFTLoss(threshold=threshold)
    ours = get_loss(f"mft:threshold={threshold},everywhere=true")
    kept, labels = batch.kept, batch.labels
    assert_same(
        lambda x: theirs(x[kept], batch.teacher[kept], labels[kept]),
        lambda x: ours(x, batch.teacher, labels),
        batch.student,
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_temperature_of_mft_has_another_power(batch: Batch, temperature: float) -> None:
    module = checkout("KDLOSSES_MODELOPT", "Model-Optimizer", "modelopt/torch/distill/losses.py")
    theirs = module.MFTLoss(temperature=temperature)
    ours = get_loss("mft:everywhere=true", temperature=temperature)
    kept, labels = batch.kept, batch.labels
    assert_same(
        lambda x: theirs(x[kept], batch.teacher[kept], labels[kept]),
        lambda x: ours(x, batch.teacher, labels),
        batch.student,
        factor=temperature,
    )


@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        (None, "concrete_score"),
        ("US", "concrete_score:u=uniform,v=student"),
        ("TS", "concrete_score:u=teacher,v=student"),
    ],
)
def test_the_gradient_of_the_concrete_score_is_a_quarter(
    batch: Batch, kind: str | None, spec: str
) -> None:
    """Their value has the right gradient and no meaning of its own."""
    module = checkout("KDLOSSES_CSD", "CSD", "task_agnostic_distillation/csd/losses.py")
    labels = {"label": batch.labels}
    slopes = []
    for of in (
        lambda x: (
            module.csd(x, batch.teacher, labels)
            if kind is None
            else module.csd_weighting_function(x, batch.teacher, labels, type=kind)
        ),
        lambda x: get_loss(spec)(x, batch.teacher, batch.labels) / 4,
    ):
        leaf = batch.student.clone().requires_grad_()
        slopes.append(torch.autograd.grad(of(leaf), leaf)[0])
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-5)
