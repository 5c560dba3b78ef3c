"""Schedules, and the losses and objectives that follow them."""

import json
import warnings

import pytest
import torch
from draws import Draws
from oracles import NAMES
from pydantic import Field, TypeAdapter, ValidationError, field_validator

from kdlosses import (
    Constant,
    Cosine,
    KDObjective,
    Linear,
    LossSpecError,
    Schedule,
    Step,
    TokenLoss,
    get_loss,
)
from kdlosses.losses.forward_kl import ForwardKL


def logits(which):
    """The logits of the student (0) or the teacher (1), on the default device."""
    return Draws(3).normal(2, 6, 11)[which].double()


def targets():
    return torch.arange(6)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(value=3), {0: 3, 0.5: 3, 1: 3}),
        (Linear(start=1, end=3), {0: 1, 0.25: 1.5, 1: 3}),
        (Linear(start=1, end=3, begin=0.5, until=0.75), {0: 1, 0.5: 1, 0.625: 2, 0.8: 3, 1: 3}),
        (Cosine(start=2, end=0), {0: 2, 0.25: 1.7071067811865475, 0.5: 1, 1: 0}),
        (Step(values=(1, 5, 2), at=(0.3, 0.6)), {0: 1, 0.29: 1, 0.3: 5, 0.59: 5, 0.6: 2, 1: 2}),
        (Step(values=(4,)), {0: 4, 1: 4}),
    ],
)
def test_values(schedule, expected):
    for progress, value in expected.items():
        assert schedule(progress) == pytest.approx(value, abs=1e-12)
        assert min(schedule.extremes) <= schedule(progress) <= max(schedule.extremes)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "linear", "start": 0}, "end"),
        ({"kind": "linear", "start": 0, "end": 1, "begin": 0.5, "until": 0.5}, "must be less than"),
        ({"kind": "cosine", "start": 0, "end": 1, "until": 1.5}, "less than or equal to 1"),
        ({"kind": "step", "values": [1, 2], "at": []}, "one value more"),
        ({"kind": "step", "values": [1, 2, 3], "at": [0.5, 0.5]}, "must increase"),
        ({"kind": "constant", "value": float("nan")}, "finite"),
        ({"kind": "constant", "value": 1, "stop": 2}, "not permitted"),
        ({"kind": "sawtooth", "value": 1}, "does not match any of the expected tags"),
    ],
)
def test_schedules_without_meaning(given, message):
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(Schedule).validate_python(given)


@pytest.mark.parametrize("suffix", ["", "_chunked"])
def test_a_scheduled_parameter_is_read_at_its_present_value(suffix):
    options = {"compiled": False, "chunk_size": 4} if suffix else {}
    moving = get_loss(
        f"skew_forward_kl{suffix}", schedules={"alpha": Linear(start=0.2, end=0.6)}, **options
    )
    for progress, alpha in [(None, 0.2), (0.5, 0.4), (1.0, 0.6)]:
        if progress is not None:
            moving.advance(progress)
        assert moving.moving_values == pytest.approx({"alpha": alpha})
        expected = get_loss(f"skew_forward_kl:alpha={alpha}")
        for loss in (moving, expected):
            leaf = logits(0).clone().requires_grad_()
            value = loss(leaf, logits(1), targets())
            loss.found = (value.detach(), *torch.autograd.grad(value, leaf))
        for a, b in zip(moving.found, expected.found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_temperature_and_ratio_move_with_the_parameters():
    loss = get_loss(
        "reverse_kl+skew_forward_kl",
        schedules={
            "temperature": Step(values=(1, 3), at=(0.5,)),
            "skew_forward_kl.alpha": Linear(start=0, end=0.5),
        },
    )
    objective = KDObjective(loss, Linear(start=0.0, end=1.0))
    assert objective.kd_ratio == 0
    assert objective.needs_teacher
    objective.advance(0.5)
    assert objective.moving_values == {
        "kd_ratio": 0.5,
        "temperature": 3.0,
        "skew_forward_kl.alpha": 0.25,
    }
    fixed = get_loss("reverse_kl+skew_forward_kl:alpha=0.25", temperature=3.0)
    expected = KDObjective(fixed, 0.5)(logits(0), logits(1), targets())
    found = objective(logits(0), logits(1), targets())
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.kd_terms, expected.kd_terms, rtol=1e-12, atol=0)


def test_matched_curvature_follows_the_parameter():
    moving = get_loss(
        "skew_forward_kl",
        match_curvature=True,
        schedules={"alpha": Linear(start=0.0, end=0.5)},
    )
    moving.advance(1.0)
    fixed = get_loss("skew_forward_kl:alpha=0.5", match_curvature=True)
    values = [loss(logits(0), logits(1), targets()) for loss in (moving, fixed)]
    torch.testing.assert_close(*values, rtol=1e-12, atol=0)


def test_a_curvature_that_ends_amid_the_training_cannot_be_matched():
    """alpha_beta has one where alpha + beta is 1, which the first value fulfils."""
    rises = {"alpha": Linear(start=0.5, end=0.9)}
    get_loss("alpha_beta", schedules=rises)
    with pytest.raises(LossSpecError, match=r"match_curvature: alpha_beta .* no curvature"):
        get_loss("alpha_beta", match_curvature=True, schedules=rises)
    falls = {"beta": Linear(start=0.5, end=0.1)}
    get_loss("alpha_beta", match_curvature=True, schedules=rises | falls)


@pytest.mark.parametrize(
    ("spec", "key", "schedule", "message"),
    [
        ("forward_kl", "alpha", Constant(value=1), "no loss has a parameter 'alpha'"),
        ("skew_forward_kl", "alpha", Linear(start=0, end=2), "alpha reaches 2: .*less than 1"),
        (
            "generalized_jsd",
            "normalize",
            Constant(value=1),
            "cannot be scheduled, because it is not a number",
        ),
        ("forward_kl", "temperature", Linear(start=1, end=0), "temperature: must be a positive"),
        (
            "skew_forward_kl+skew_reverse_kl",
            "alpha",
            Constant(value=0.1),
            r"several losses; write skew_forward_kl\.alpha or skew_reverse_kl\.alpha",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:generalized_jsd")
def test_refused_schedules(spec, key, schedule, message):
    with pytest.raises(LossSpecError, match=message):
        get_loss(spec, schedules={key: schedule})


def test_a_value_amid_the_bounds_may_be_excluded():
    class Holed(ForwardKL):
        alpha: float = Field(2.0, gt=0, description="anything above 0 but 1")

        @field_validator("alpha")
        @classmethod
        def _not_one(cls, value):
            if abs(value - 1) < 1e-3:
                raise ValueError("1 is excluded")
            return value

    TokenLoss(Holed(), schedules={"alpha": Linear(start=1.5, end=2)})
    with pytest.raises(ValueError, match=r"alpha reaches (0\.999\d*|1): .*1 is excluded"):
        TokenLoss(Holed(), schedules={"alpha": Linear(start=0.5, end=2)})


def test_values_on_the_way_warn_of_nothing():
    """A fixed 0.01 would: it is close to an end, where the value vanishes."""
    with pytest.warns(UserWarning, match="beta"):
        get_loss("generalized_jsd:beta=0.01")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_loss("generalized_jsd", schedules={"beta": Linear(start=0.0, end=0.5)})


def test_a_ratio_that_leaves_its_bounds():
    with pytest.raises(ValueError, match=r"kd_ratio: must be in \[0, 1\], got 1.5"):
        KDObjective(get_loss("forward_kl"), Linear(start=0, end=1.5))


@pytest.mark.parametrize("progress", [-0.1, 1.1])
def test_progress_outside_the_training(progress):
    with pytest.raises(ValueError, match="progress"):
        get_loss("forward_kl").advance(progress)


def test_the_state_dict_brings_schedules_back_through_json():
    def make():
        loss = get_loss("taid", schedules={"temperature": Linear(start=1, end=2)})
        return KDObjective(loss, Cosine(start=0.2, end=0.8))

    first, second = make(), make()
    for step, value in enumerate((2.0, 1.5, 1.4), start=1):
        first.advance(step / 10, [value])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.moving_values == first.moving_values
    assert second.loss.moving_values["t"] > 0.4
    with pytest.raises(ValueError, match="saved with the loss taid, but this loss is forward_kl"):
        KDObjective(get_loss("forward_kl")).load_state_dict(first.state_dict())


# TAID.


def test_taid_moves_as_its_formula_says():
    """Three steps by hand: m after the second is .01 (2 - 1.5) / 2, after the third more."""
    loss = get_loss("taid")
    loss.advance(0.1, [2.0])
    assert loss.moving_values == {"t": 0.4, "momentum": 0.0, "previous": 2.0}
    loss.advance(0.0, [1.5])
    assert loss.moving_values["momentum"] == pytest.approx(0.0025)
    t = 0.4 + 5e-4 * 0.6 * 0.500624999674
    assert loss.moving_values["t"] == pytest.approx(t, abs=1e-12)
    loss.advance(0.5, [3.0])  # the line 0.4 + 0.6 * 0.5 is above the step
    assert loss.moving_values["momentum"] == pytest.approx(0.99 * 0.0025 - 0.01)
    assert loss.moving_values["t"] == pytest.approx(0.7)
    loss.advance(1.0, [3.0])
    assert loss.moving_values["t"] == 1.0
    expected = get_loss("forward_kl")(logits(0), logits(1), targets())
    torch.testing.assert_close(loss(logits(0), logits(1), targets()), expected, rtol=1e-12, atol=0)


def test_taid_starts_at_its_start_and_keeps_below_its_end():
    loss = get_loss("taid:t_start=0.9,t_end=0.9")
    for value in (2.0, 1.0, 0.5):
        loss.advance(1.0, [value])
    assert loss.moving_values["t"] == 0.9
    with pytest.raises(LossSpecError, match="must not exceed t_end"):
        get_loss("taid:t_start=0.9,t_end=0.5")


def test_a_state_needs_the_values_of_its_step():
    loss = get_loss("forward_kl+taid")
    with pytest.raises(ValueError, match="term_values"):
        loss.advance(0.1)
    with pytest.raises(ValueError, match="expected 2 values, got 1"):
        loss.advance(0.1, [1.0])
    KDObjective(loss, 0.0).advance(0.1)  # a step without a teacher has none
    assert loss.moving_values["taid.t"] == 0.4


# The compiled tile.


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:generalized_jsd")
@pytest.mark.parametrize("name", [name for name in NAMES if name != "total_variation"])
def test_moving_values_share_one_graph(name):
    from torch._dynamo.utils import counters

    fields = [
        (field, bounds)
        for field, bounds in {
            "alpha": (0.2, 0.9), "beta": (0.1, 0.6), "mass": (0.3, 0.7),
            "forward_weight": (0.2, 1.0), "t_start": (0.1, 0.5),
        }.items()
        if field in type(get_loss(name).loss).model_fields
    ]  # fmt: skip
    schedules = {field: Linear(start=a, end=b) for field, (a, b) in fields}
    schedules["temperature"] = Linear(start=1.0, end=2.0)
    before = counters["stats"]["unique_graphs"]
    losses = [
        get_loss(f"{name}_chunked", chunk_size=3, compiled=compiled, schedules=schedules)
        for compiled in (True, False)
    ]
    for progress in (0.0, 0.3, 0.7, 1.0):
        found = []
        for loss in losses:
            loss.advance(progress, [1.0 - progress / 2])
            leaf = logits(0).float().requires_grad_()
            value = loss(leaf, logits(1).float(), targets())
            found.append((value.detach(), *torch.autograd.grad(value, leaf)))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=3e-6, atol=1e-7)
    assert counters["stats"]["unique_graphs"] - before == 1


def test_taid_after_a_loss_that_was_almost_0():
    """The relative change is then about -1e15, and the sigmoid of the momentum is 0."""
    loss = get_loss("taid:t_start=0")
    for progress, value in ((0.1, 1e-15), (0.2, 1.0)):
        loss.advance(progress, [value])
    assert loss.moving_values["momentum"] == pytest.approx(-1e13)
    assert loss.moving_values["t"] == pytest.approx(0.2)


def test_a_state_follows_the_scheduled_parameters_of_its_loss():
    """t_start moves from 0.2 to 0.6: t begins with 0.2, and its line ends at 1 from wherever."""
    loss = get_loss("taid", schedules={"t_start": Linear(start=0.2, end=0.6)})
    assert loss.moving_values["t"] == 0.2
    loss.advance(0.0, [1.0])
    loss.advance(0.5, [1.0])
    assert loss.moving_values["t"] == pytest.approx(0.4 + (1 - 0.4) * 0.5)
