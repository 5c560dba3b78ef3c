"""A student that teaches itself: present weights, weights without adapters, running means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pair_configs import tiny_llama

from kdrun.models.heads import find_split, install
from kdrun.models.mean_teacher import MeanAdapters, MeanTeacher, save_mean
from kdrun.models.self_teacher import SelfTeacher

VOCAB = 31
IDS = torch.arange(12).view(2, 6)


def student(dropout: float = 0.0) -> Any:
    model = tiny_llama(VOCAB, 16, 0, attention_dropout=dropout).train()
    install(model, find_split(model))
    return model


def logits(model: Any) -> torch.Tensor:
    training = model.training
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    model.train(training)
    return found


def given(teacher: Any) -> torch.Tensor:
    source = teacher.source(IDS)
    assert not source.hidden.requires_grad
    assert not source.weight.requires_grad
    found: torch.Tensor = source.hidden @ source.weight.T
    return found


def move(model: Any) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.3 * torch.randn_like(weight))


def adapted() -> Any:
    from kdrun.config.training_sections import LoraConfig
    from kdrun.models.adapters import add_adapters

    model = student()
    return model, add_adapters(model, LoraConfig(rank=2), "base", 0)


def test_live_weights_are_the_present_ones_without_dropout() -> None:
    model = student(dropout=0.5)
    teacher = SelfTeacher(model, find_split(model), live=True)
    for _ in range(2):
        move(model)
        assert torch.allclose(given(teacher), logits(model), atol=1e-5)
        assert model.training


def test_without_adapters_it_is_the_base_model_and_they_stay_trainable() -> None:
    model = student()
    base = logits(model)
    teacher = SelfTeacher(model, find_split(model), live=False)
    model, wrapped = adapted()
    teacher = SelfTeacher(model, find_split(model), live=False)
    teacher.begin(wrapped)
    move(wrapped)
    assert torch.allclose(given(teacher), base, atol=1e-5)
    assert not torch.allclose(logits(wrapped), base, atol=1e-2)
    assert sum(weight.requires_grad for weight in wrapped.parameters()) > 0


@pytest.mark.parametrize("kind", ["live", "adapters", "mean"])
def test_under_autocast_the_students_weights_still_get_gradients(kind: str) -> None:
    if kind == "live":
        model = wrapped = student()
        teacher: Any = SelfTeacher(model, find_split(model), live=True)
    else:
        model, wrapped = adapted()
        split = find_split(model)
        teacher = (
            MeanAdapters(model, split, 0.9)
            if kind == "mean"
            else SelfTeacher(model, split, live=False)
        )
        teacher.begin(wrapped)
    move(wrapped)
    with torch.autocast("cpu", torch.bfloat16):
        teacher.source(IDS)
        found = wrapped(IDS).logits.float()
    found.square().mean().backward()
    with torch.autocast("cpu", torch.bfloat16):
        again = wrapped(IDS).logits.float()
    wanted = torch.autograd.grad(
        again.square().mean(), [w for w in wrapped.parameters() if w.requires_grad]
    )
    own = [w.grad for w in wrapped.parameters() if w.requires_grad]
    for one, other in zip(own, wanted, strict=True):
        assert one is not None
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("adapters", [False, True])
def test_a_mean_follows_and_is_kept(adapters: bool, tmp_path: Path) -> None:
    if adapters:
        model, moving = adapted()
    else:
        model = moving = student()

    def made() -> Any:
        if adapters:
            found: Any = MeanAdapters(model, find_split(model), 0.75)
            found.begin(moving)
            return found
        copy = tiny_llama(VOCAB, 16, 0)
        return MeanTeacher(copy, find_split(copy), 0.75)

    teacher = made()
    trained = [name for name, weight in moving.named_parameters() if weight.requires_grad]
    history = [{name: moving.get_parameter(name).detach().clone() for name in trained}]
    for _ in range(3):
        move(moving)
        teacher.follow(moving)
        history.append({name: moving.get_parameter(name).detach().clone() for name in trained})
    shares = [0.75**3, 0.75**2 * 0.25, 0.75 * 0.25, 0.25]
    expected = {
        name: sum(share * then[name] for share, then in zip(shares, history, strict=True))
        for name in trained
    }
    with torch.no_grad():
        for name in trained:
            moving.get_parameter(name).copy_(expected[name])
    by_hand = logits(moving)
    with torch.no_grad():
        for name in trained:
            moving.get_parameter(name).copy_(history[-1][name])
    assert torch.allclose(given(teacher), by_hand, atol=1e-4)
    assert not torch.allclose(logits(moving), by_hand, atol=1e-2)

    save_mean(teacher.state(), tmp_path)
    again = made()
    again.load(tmp_path)
    assert torch.equal(given(again), given(teacher))
