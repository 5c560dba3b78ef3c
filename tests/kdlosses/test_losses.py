"""Values and gradients of the built-in losses against float64 and against known numbers."""

import math
import warnings

import numpy as np
import oracles
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from oracles import NAMES, Q_ZERO, SPECS, P, Q, logits_of, spec

from kdlosses import LossSpecError, available_losses, get_loss

LABEL = torch.zeros(1, dtype=torch.int64)
# The values of the built-in losses on P and Q, from the definitions with a pocket calculator.
KNOWN = {
    "forward_kl": 0.7 * math.log(3.5) + 0.2 * math.log(2 / 3) + 0.1 * math.log(0.2),
    "reverse_kl": 0.2 * math.log(2 / 7) + 0.3 * math.log(1.5) + 0.5 * math.log(5),
    "symmetric_kl": 0.655352,
    "skew_forward_kl": 0.7 * math.log(0.7 / 0.25) + 0.2 * math.log(0.2 / 0.29)
    + 0.1 * math.log(0.1 / 0.46),
    "skew_reverse_kl": 0.2 * math.log(0.2 / 0.65) + 0.3 * math.log(0.3 / 0.21)
    + 0.5 * math.log(0.5 / 0.14),
    "generalized_jsd": 0.151358,
    "total_variation": 0.5,
}  # fmt: skip


def value(text, teacher, student, **options):
    """One row's loss; probabilities may be given."""
    student, teacher = (
        x if isinstance(x, torch.Tensor) else logits_of(x) for x in (student, teacher)
    )
    return get_loss(text, **options)(student[None], teacher[None], LABEL)


def gradient(text, teacher, student, **options):
    """One row's gradient with respect to the student's logits."""
    student = logits_of(student).requires_grad_()
    (result,) = torch.autograd.grad(value(text, teacher, student, **options), student)
    return result


def test_every_built_in_loss_has_an_oracle():
    built_in = {ref.name for ref in available_losses() if ref.distribution == "kdlosses"}
    assert built_in == set(NAMES)


def test_the_oracles_agree_with_the_known_numbers():
    for name, known in KNOWN.items():
        assert oracles.ORACLES[name](oracles.log(P), oracles.log(Q)) == pytest.approx(
            known, abs=1e-6
        ), name


@pytest.mark.parametrize("name", NAMES)
def test_known_values(name):
    assert value(name, P, Q).item() == pytest.approx(KNOWN[name], abs=1e-6)


@pytest.mark.parametrize(("name", "parameters"), SPECS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_values_against_float64(name, parameters, temperature):
    teacher, student = 3 * torch.randn(2, 6, 40, dtype=torch.float64)
    expected = oracles.rows(name, teacher, student, temperature, **parameters)
    labels = torch.zeros(6, dtype=torch.int64)
    loss = get_loss(spec(name, parameters), temperature=temperature, temperature_scaling=False)
    exact = loss(student, teacher, labels, reduction="none")
    np.testing.assert_allclose(exact.numpy(), expected, rtol=1e-11, atol=1e-13)
    single = loss(student.float(), teacher.float(), labels, reduction="none")
    expected = oracles.rows(name, teacher.float(), student.float(), temperature, **parameters)
    np.testing.assert_allclose(single.numpy(), expected, rtol=3e-6, atol=3e-7)


@pytest.mark.parametrize(("name", "power"), [(name, 2) for name in NAMES[:-1]] + [(NAMES[-1], 1)])
def test_the_temperature_multiplies_the_value(name, power):
    teacher, student = torch.randn(2, 30)
    plain = value(name, teacher, student, temperature=3.0, temperature_scaling=False)
    expected = oracles.rows(name, teacher, student, 3.0)
    assert plain.item() == pytest.approx(expected, rel=1e-5)
    assert value(name, teacher, student, temperature=3.0).item() == pytest.approx(
        3.0**power * expected, rel=1e-5
    )


@pytest.mark.parametrize(("name", "parameters"), SPECS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradients_against_finite_differences(name, parameters, temperature):
    teacher, student = 2 * torch.randn(2, 4, 7, dtype=torch.float64)
    labels = torch.zeros(4, dtype=torch.int64)
    power = 1 if name == "total_variation" else 2
    student.requires_grad_()
    loss = get_loss(spec(name, parameters), temperature=temperature)
    (exact,) = torch.autograd.grad(loss(student, teacher, labels), student)
    expected = oracles.central_differences(
        lambda x: oracles.objective(
            name, teacher, x, labels, temperature=temperature, power=power, **parameters
        ),
        student.detach().numpy(),
        step=1e-4,
    )
    np.testing.assert_allclose(exact.numpy(), expected, rtol=1e-8, atol=1e-10)
    single = student.detach().float().requires_grad_()
    (rounded,) = torch.autograd.grad(loss(single, teacher.float(), labels), single)
    np.testing.assert_allclose(rounded.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_forward_kl_is_q_minus_p():
    np.testing.assert_allclose(gradient("forward_kl", P, Q).numpy(), Q - P, atol=1e-7)


# Impossible tokens.


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("forward_kl", math.inf),
        ("symmetric_kl", math.inf),
        ("symmetric_kl:forward_weight=0", 0.4 * math.log(2) + 0.6 * math.log(6)),
        ("reverse_kl", 1.352),
        ("skew_forward_kl", 1.313),
        ("skew_forward_kl:alpha=0", math.inf),
        ("generalized_jsd", 0.359),
        ("generalized_jsd:beta=0", math.inf),
        ("generalized_jsd:beta=1", 1.352),
        ("total_variation", 0.7),
    ],
)
@pytest.mark.parametrize("how", ["plain", "chunked"])
def test_a_student_that_rules_a_token_out(name, expected, how):
    options = {}
    if how == "chunked":
        head, _, tail = name.partition(":")
        name, options = f"{head}_chunked" + (f":{tail}" if tail else ""), {"compiled": False}
    assert value(name, P, Q_ZERO, **options).item() == pytest.approx(expected, abs=1e-3)
    result = gradient(name, P, Q_ZERO, **options)
    assert result.isfinite().all()
    assert result[0] == 0


@pytest.mark.parametrize(("name", "parameters"), SPECS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_impossible_tokens_on_either_side_against_float64(name, parameters, temperature):
    teacher = torch.tensor([1.0, 0.5, -math.inf, 0.2, -math.inf, 2.0])
    student = torch.tensor([0.3, -math.inf, -math.inf, 1.0, 0.7, -1.0])
    for p, q in [(teacher, student), (teacher, teacher), (teacher, torch.zeros(6))]:
        expected = oracles.rows(name, p, q, temperature, **parameters)
        text = spec(name, parameters)
        power = 1 if name == "total_variation" else 2
        single = value(text, p, q, temperature=temperature).item()
        assert single == pytest.approx(expected * temperature**power, rel=1e-5, abs=1e-6)
        leaf = q.clone().requires_grad_()
        (result,) = torch.autograd.grad(value(text, p, leaf, temperature=temperature), leaf)
        assert result.isfinite().all()
        assert (result[q == -math.inf] == 0).all()


@pytest.mark.parametrize("name", ["reverse_kl", "skew_forward_kl", "generalized_jsd"])
def test_the_gradient_beside_an_impossible_token_is_right(name):
    finite = np.array([[0.4, 0.6]])
    expected = oracles.central_differences(
        lambda x: oracles.ORACLES[name](
            oracles.log(P), np.append(-math.inf, oracles.log_softmax(x[0]))
        ),
        np.log(finite),
        step=1e-4,
    )
    np.testing.assert_allclose(
        gradient(name, P, Q_ZERO)[1:].numpy(), expected[0], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(("name", "parameters"), SPECS)
def test_a_low_temperature_keeps_its_values(name, parameters):
    teacher, student = 8 * torch.randn(2, 50)
    expected = oracles.rows(name, teacher, student, 0.05, **parameters)
    measured = value(
        spec(name, parameters), teacher, student, temperature=0.05, temperature_scaling=False
    )
    assert measured.item() == pytest.approx(expected, rel=2e-6, abs=1e-7)
    assert name != "forward_kl" or expected > 87  # beyond log(tiny): a clamp there would show


@pytest.mark.parametrize("name", ["skew_forward_kl:alpha=0", "skew_reverse_kl:alpha=0"])
def test_a_mixture_of_one_side_does_not_underflow(name):
    teacher, student = torch.tensor([[0.0, 400.0], [400.0, 0.0]])
    assert value(name, teacher, student).item() == pytest.approx(400)


# Near equality.


@pytest.mark.parametrize(("name", "parameters"), SPECS)
@pytest.mark.parametrize("scale", [0, 1e-6, 1e-4, 1e-2])
def test_near_equality_nothing_is_negative(name, parameters, scale):
    teacher = 4 * torch.randn(4, 49152)
    student = teacher + scale * torch.randn(4, 49152)
    loss = get_loss(spec(name, parameters))
    measured = loss(student, teacher, torch.zeros(4, dtype=torch.int64), reduction="none")
    assert (measured >= 0).all()
    expected = oracles.rows(name, teacher, student, **parameters)
    # Log-probabilities carry an error of about 1e-7, which enters total variation linearly.
    atol = 1e-7 if name == "total_variation" else 2e-10
    np.testing.assert_allclose(measured.numpy(), expected, rtol=1e-2, atol=atol)
    assert scale or (measured < 1e-10).all()


@pytest.mark.parametrize(("name", "parameters"), SPECS)
def test_curvature_is_the_second_order_of_the_value(name, parameters):
    loss = get_loss(spec(name, parameters)).loss
    if name == "total_variation":
        assert loss.curvature() is None
        return
    generator = np.random.default_rng(0)
    p = np.exp(oracles.log_softmax(generator.normal(size=20)))
    direction = p * generator.normal(size=20)
    direction -= p * direction.sum()
    measured = []
    for step in (1e-3, -1e-3):  # the mean of both signs cancels the third order
        q = p + step * direction
        second_order = ((p - q) ** 2 / p).sum() / 2
        measured.append(oracles.ORACLES[name](np.log(p), np.log(q), **parameters) / second_order)
    assert loss.curvature() == pytest.approx(np.mean(measured), rel=1e-4)


def test_normalized_jsd_is_continuous_at_both_ends():
    teacher, student = torch.randn(2, 30, dtype=torch.float64)
    for end, near, other in [(0, 1e-6, "forward_kl"), (1, 1 - 1e-6, "reverse_kl")]:
        with pytest.warns(UserWarning, match="too close to an end"):
            close = value(f"generalized_jsd:beta={near},normalize=true", teacher, student)
        exact = value(f"generalized_jsd:beta={end},normalize=true", teacher, student)
        assert exact.item() == value(other, teacher, student).item()
        assert close.item() == pytest.approx(exact.item(), rel=1e-4)


def test_symmetric_relations():
    teacher, student = torch.randn(2, 30)
    forward = value("forward_kl", teacher, student)
    reverse = value("reverse_kl", teacher, student)
    assert forward.item() == pytest.approx(value("reverse_kl", student, teacher).item())
    both = value("symmetric_kl:forward_weight=0.25", teacher, student).item()
    assert both == pytest.approx((forward / 4 + 3 * reverse / 4).item())
    assert value("symmetric_kl:forward_weight=1", teacher, student).item() == forward.item()
    jsd = value("generalized_jsd:beta=0.2", teacher, student).item()
    assert jsd == pytest.approx(value("generalized_jsd:beta=0.8", student, teacher).item())
    skew = value("skew_forward_kl:alpha=0.3", teacher, student).item()
    assert skew == pytest.approx(value("skew_reverse_kl:alpha=0.3", student, teacher).item())


@given(
    logits=st.lists(
        st.tuples(*[st.one_of(st.floats(-80, 80), st.just(-math.inf))] * 2), min_size=2, max_size=9
    ),
    which=st.sampled_from(SPECS),
)
def test_values_on_any_logits(logits, which):
    name, parameters = which
    teacher, student = np.array(logits, dtype=np.float32).T
    assume(teacher.max() > -math.inf and student.max() > -math.inf)
    expected = oracles.rows(name, teacher, student, **parameters)
    p, q = np.exp(oracles.log_softmax(teacher)), np.exp(oracles.log_softmax(student))
    measured = value(
        spec(name, parameters), torch.from_numpy(teacher.copy()), torch.from_numpy(student.copy())
    ).item()
    if math.isinf(expected):
        # The weight of "log 0" is finite, so the tiniest mass on it is not seen.
        masses = [x.max(initial=0) for x in (p[q == 0], q[p == 0])]
        assert measured == math.inf or min(x for x in masses if x > 0) < 1e-17
    else:
        assert measured == pytest.approx(expected, rel=1e-5, abs=2e-6)
        assert measured >= 0


# Parameters.


@pytest.mark.parametrize(
    "text",
    [
        "skew_forward_kl:alpha=1",
        "skew_forward_kl:alpha=-0.1",
        "skew_reverse_kl:alpha=1",
        "skew_reverse_kl:alpha=-0.1",
        "symmetric_kl:forward_weight=1.01",
        "symmetric_kl:forward_weight=-0.01",
        "symmetric_kl:forward_weight=nan",
        "generalized_jsd:beta=1.01",
        "generalized_jsd:beta=-0.01",
        "generalized_jsd:beta=x",
        "generalized_jsd:normalize=perhaps",
    ],
)
def test_parameters_out_of_bounds_are_refused(text):
    key, _, given_value = text.partition(":")[2].partition("=")
    with pytest.raises(LossSpecError, match=rf"{key}='{given_value}'"):
        get_loss(text)


@pytest.mark.parametrize(
    ("text", "warns"),
    [
        ("beta=0.01", True),
        ("beta=0.99", True),
        ("beta=0.02", False),
        ("beta=0.981", True),
        ("beta=0", False),
        ("beta=1", False),
        ("beta=0.01,normalize=true", False),
        ("beta=0.0005,normalize=true", True),
        ("beta=0.9995,normalize=true", True),
    ],
)
def test_beta_close_to_an_end_warns(text, warns):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_loss(f"generalized_jsd:{text}")
    assert len(caught) == warns
    assert all("generalized_jsd" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_is_a_frozen_value(name):
    one, other = get_loss(name).loss, get_loss(name + "_chunked").loss
    assert one == other
    assert hash(one) == hash(other)
    for field in type(one).model_fields:
        with pytest.raises(ValueError, match="frozen"):
            setattr(one, field, 0.2)
    assert type(one).__doc__


def test_the_temperature_must_be_positive():
    for wrong in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature"):
            get_loss("forward_kl", temperature=wrong)
