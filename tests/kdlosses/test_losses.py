"""Values and gradients of the built-in losses against float64 and against known numbers."""

import math
import warnings

import numpy as np
import oracles
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from oracles import EXTREMES, NAMES, NOT_ZERO, POWERS, Q_ZERO, SPECS, P, Q, logits_of, spec

from kdlosses import LossSpecError, available_losses, get_loss

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
    "hellinger": 1 - math.sqrt(0.14) - math.sqrt(0.06) - math.sqrt(0.05),
    "alpha_beta": 4 * (1 - math.sqrt(0.14) - math.sqrt(0.06) - math.sqrt(0.05)),
    # The head is {0}; the gaps are .5 there and .1 + .4 in the tail.
    "adaptive_kl": 0.655352,
    # Label 0: (.7, .3) against (.2, .8), and (2/3, 1/3) against (3/8, 5/8).
    "decoupled_kd": 0.7 * math.log(3.5) + 0.3 * math.log(0.375)
    + 2 / 3 * math.log(16 / 9) + 1 / 3 * math.log(8 / 15),
    # p_t = (.389350, .300862, .309788), in proportion to p^.4 q^.6.
    "taid": 0.111931,
    # Each term is (p - q) ln(p / q).
    "todi": 0.5 * math.log(3.5) - 0.1 * math.log(2 / 3) - 0.4 * math.log(0.2),
    # H(p) is .801819, just above the threshold of .8: both directions.
    "entropy_aware_kl": 1.310703,
    # Pairs (0, 1), (0, 2), (1, 2) both ways: q_x q_y times squares of ln 5.25, ln 17.5, ln(10/3).
    "concrete_score": 2 * (
        0.06 * math.log(5.25) ** 2 + 0.1 * math.log(17.5) ** 2 + 0.15 * math.log(10 / 3) ** 2
    ),
    # r = (.445746, .279329, .274925), in proportion to (p^(1/4) + q^(1/4))^4.
    "amid": 0.147985,
    # The teacher is right about label 0.
    "mft": 0.7 * math.log(3.5) + 0.2 * math.log(2 / 3) + 0.1 * math.log(0.2),
    # Pairs in the teacher's order 0, 1, 2: odds 3.5, 7, 2 against 2/3, 2/5, 3/5; in the student's
    # order 2, 1, 0: odds 5/3, 5/2, 3/2 of the student against 1/2, 1/7, 2/7.
    "bild": 0.28 * math.log(0.7) + 0.56 * math.log(7 / 3) + 0.16 * math.log(4 / 9)
    + 7 / 13 * math.log(119 / 65) + 2 / 13 * math.log(34 / 97.5) + 4 / 13 * math.log(68 / 58.5),
}  # fmt: skip


def value(text, teacher, student, **options):
    """One row's loss; probabilities may be given."""
    student, teacher = (
        x if isinstance(x, torch.Tensor) else logits_of(x) for x in (student, teacher)
    )
    return get_loss(text, **options)(
        student[None], teacher[None], torch.zeros(1, dtype=torch.int64)
    )


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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("alpha_beta:alpha=1,beta=0", KNOWN["forward_kl"]),
        ("alpha_beta:alpha=0,beta=1", KNOWN["reverse_kl"]),
        # Half the sum of squares of ln 3.5, ln(2/3), ln(1/5).
        ("alpha_beta:alpha=0,beta=0", 2.162054),
        # a = -b = 1: sum of ln(q/p) + p/q - 1, with p/q = 3.5, 2/3, 1/5.
        ("alpha_beta:alpha=1,beta=-1", 3.5 + 2 / 3 + 0.2 - 3 - math.log(3.5 * 2 / 3 * 0.2)),
        # a = b = 1: half the squared Euclidean distance.
        ("alpha_beta:alpha=1,beta=1", (0.25 + 0.01 + 0.16) / 2),
        # a = -1, b = 2: half of Neyman's chi square, sum (p - q)^2 / p.
        ("alpha_beta:alpha=-1,beta=2", (0.25 / 0.7 + 0.01 / 0.2 + 0.16 / 0.1) / 2),
        # The head is {0, 1} with a gap of .6, the tail has .4.
        ("adaptive_kl:mass=0.95", 0.6 * KNOWN["forward_kl"] + 0.4 * KNOWN["reverse_kl"]),
        ("entropy_aware_kl:threshold=0.81", KNOWN["reverse_kl"]),
        # u = p, v = q: p_x q_y + q_x p_y of the pairs is .25, .37, .13.
        (
            "concrete_score:u=teacher",
            0.25 * math.log(5.25) ** 2 + 0.37 * math.log(17.5) ** 2 + 0.13 * math.log(10 / 3) ** 2,
        ),
        # Both uniform: 2/9 of the squares.
        (
            "concrete_score:u=uniform,v=uniform",
            2 / 9 * (math.log(5.25) ** 2 + math.log(17.5) ** 2 + math.log(10 / 3) ** 2),
        ),
        ("amid:alpha=-1,share=0.1", KNOWN["skew_forward_kl"]),
        ("amid:alpha=-1,share=0.9,order=qr", KNOWN["skew_reverse_kl"]),
        # r in proportion to the roots of .14, .06 and .05, whose sum is 1 minus Hellinger:
        # half of KL(p || q) plus the logarithm of the sum.
        ("amid:alpha=1", KNOWN["forward_kl"] / 2 + math.log(1 - KNOWN["hellinger"])),
        # The label's .7 becomes .9, and the others keep their proportion.
        (
            "mft:everywhere=true",
            0.9 * math.log(4.5) + 0.2 / 3 * math.log(2 / 9) + 0.1 / 3 * math.log(1 / 15),
        ),
        # Pairs of two tokens: one pair, whose softmax is 1.
        ("bild:k=2", 0.0),
        ("decoupled_kd:alpha=1,beta=0", 0.7 * math.log(3.5) + 0.3 * math.log(0.375)),
        ("decoupled_kd:alpha=0,beta=2", 4 / 3 * math.log(16 / 9) + 2 / 3 * math.log(8 / 15)),
    ],
)
def test_known_values_with_parameters(text, expected):
    assert value(text, P, Q).item() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize(("name", "parameters"), SPECS + EXTREMES)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_values_against_float64(name, parameters, temperature):
    teacher, student = 3 * torch.randn(2, 6, 40, dtype=torch.float64)
    labels = torch.arange(6)
    expected = oracles.rows(name, teacher, student, temperature, labels, **parameters)
    loss = get_loss(spec(name, parameters), temperature=temperature, temperature_scaling=False)
    exact = loss(student, teacher, labels, reduction="none")
    beyond = expected > 1e12  # reads as infinite
    expected[beyond] = math.inf
    np.testing.assert_allclose(exact.cpu().numpy(), expected, rtol=1e-11, atol=1e-13)
    teacher, student = teacher.float(), student.float()
    single = loss(student, teacher, labels, reduction="none")
    expected = oracles.rows(name, teacher, student, temperature, labels, **parameters)
    expected[beyond] = math.inf
    # Near its limits alpha_beta divides by a small number.
    rtol = 1e-4 if (name, parameters) in EXTREMES else 3e-6
    np.testing.assert_allclose(single.cpu().numpy(), expected, rtol=rtol, atol=3e-7)


@pytest.mark.parametrize(("name", "power"), POWERS.items())
def test_the_temperature_multiplies_the_value(name, power):
    teacher, student = torch.randn(2, 30)
    plain = value(name, teacher, student, temperature=3.0, temperature_scaling=False)
    expected = oracles.rows(name, teacher, student, 3.0)
    assert plain.item() == pytest.approx(expected, rel=1e-5)
    assert value(name, teacher, student, temperature=3.0).item() == pytest.approx(
        3.0**power * expected, rel=1e-5
    )


@pytest.mark.parametrize(("name", "parameters"), SPECS + EXTREMES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradients_against_finite_differences(name, parameters, temperature):
    teacher, student = 2 * torch.randn(2, 4, 7, dtype=torch.float64)
    labels = torch.arange(4)
    power = POWERS[name]
    student.requires_grad_()
    loss = get_loss(spec(name, parameters), temperature=temperature)
    (exact,) = torch.autograd.grad(loss(student, teacher, labels), student)
    start = student.detach()
    held = oracles.detached(name, loss.loss.detached, teacher, start, temperature, **parameters)
    expected = oracles.central_differences(
        lambda x: oracles.objective(
            name, teacher, x, labels, temperature=temperature, power=power, **parameters, **held
        ),
        student.detach().cpu().numpy(),
        step=1e-4,
    )
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(exact.cpu().numpy(), expected, rtol=1e-8, atol=1e-10 * scale)
    single = student.detach().float().requires_grad_()
    (rounded,) = torch.autograd.grad(loss(single, teacher.float(), labels), single)
    numbers = [x for x in parameters.values() if not isinstance(x, str)]
    near_a_limit = any(0 < abs(x) < 0.05 for x in (*numbers, sum(numbers)))
    atol = (1e-4 if near_a_limit else 1e-6) * scale
    np.testing.assert_allclose(rounded.cpu().numpy(), expected, rtol=1e-5, atol=atol)


def test_the_gradient_of_forward_kl_is_q_minus_p():
    np.testing.assert_allclose(gradient("forward_kl", P, Q).cpu().numpy(), Q - P, atol=1e-7)


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
        ("hellinger", 1 - math.sqrt(0.08) - math.sqrt(0.06)),
        ("alpha_beta", 4 - 4 * math.sqrt(0.08) - 4 * math.sqrt(0.06)),
        ("alpha_beta:alpha=1,beta=0", math.inf),
        ("alpha_beta:alpha=0,beta=1", 1.352),
        ("alpha_beta:alpha=0,beta=0", math.inf),
        ("alpha_beta:alpha=1,beta=-1", math.inf),
        ("alpha_beta:alpha=-1,beta=1", math.inf),
        ("alpha_beta:alpha=2,beta=-1", math.inf),
        ("alpha_beta:alpha=-1,beta=2", (0.7 + 0.04 / 0.2 + 0.25 / 0.1) / 2),
        ("alpha_beta:alpha=-1,beta=-1", math.inf),
        ("adaptive_kl", math.inf),
        ("decoupled_kd", math.inf),
        ("decoupled_kd:alpha=0", 2 / 3 * math.log(5 / 3) + 1 / 3 * math.log(5 / 9)),
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


@pytest.mark.parametrize(("name", "parameters"), SPECS + EXTREMES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_impossible_tokens_on_either_side_against_float64(name, parameters, temperature):
    teacher = torch.tensor([1.0, 0.5, -math.inf, 0.2, -math.inf, 2.0])
    student = torch.tensor([0.3, -math.inf, -math.inf, 1.0, 0.7, -1.0])
    flat = torch.linspace(0, 0.1, 6) if name == "bild" else torch.zeros(6)  # it ranks the tokens
    for p, q in [(teacher, student), (teacher, teacher), (teacher, flat)]:
        expected = oracles.rows(name, p, q, temperature, **parameters)
        text = spec(name, parameters)
        power = POWERS[name]
        single = value(text, p, q, temperature=temperature).item()
        rel = 1e-4 if (name, parameters) in EXTREMES else 1e-5
        assert single == pytest.approx(expected * temperature**power, rel=rel, abs=1e-6)
        leaf = q.clone().requires_grad_()
        (result,) = torch.autograd.grad(value(text, p, leaf, temperature=temperature), leaf)
        assert result.isfinite().all()
        assert (result[q == -math.inf] == 0).all()


def test_decoupled_kd_where_one_side_is_sure_of_the_label():
    sure, unsure = torch.tensor([0.0, -math.inf, -math.inf]), logits_of(P)
    for teacher, student, expected in [
        (sure, sure, 0.0),
        (sure, unsure, -math.log(0.7)),  # the rest has no mass: nothing to match within it
        (unsure, sure, math.inf),
        (torch.tensor([90.0, 1, 0]), torch.tensor([90.0, 0, 1]), math.tanh(0.5)),
    ]:
        leaf = student.clone().requires_grad_()
        result = value("decoupled_kd", teacher, leaf)
        assert result.item() == pytest.approx(expected, rel=1e-5)
        (gradient_of_it,) = torch.autograd.grad(result, leaf)
        assert gradient_of_it.isfinite().all()


@pytest.mark.parametrize(("name", "parameters"), SPECS + EXTREMES)
def test_extreme_logits_give_neither_nan_nor_a_negative_value(name, parameters):
    rows = torch.tensor(
        [[0.0, 1, 2, 3], [0, -40, -90, 5], [1e4, 0, -1e4, 30], [-math.inf, 0, 1e5, -math.inf],
         [0, -math.inf, -5, -200], [0, 0, 0, 0], [-1e30, 0, -60, -100]]
    )  # fmt: skip
    teacher, student = rows.repeat(len(rows), 1), rows.repeat_interleave(len(rows), 0)
    student.requires_grad_()
    for label in range(4):
        labels = torch.full((len(student),), label)
        values = get_loss(spec(name, parameters))(student, teacher, labels, reduction="none")
        assert (values >= 0).all()
        (result,) = torch.autograd.grad(values.sum(), student)
        assert result.isfinite().all()


def test_todi_has_the_value_of_both_divergences_and_another_gradient():
    teacher, student = torch.randn(2, 30, dtype=torch.float64)
    both = value("symmetric_kl", teacher, student).item() * 2
    assert value("todi", teacher, student).item() == pytest.approx(both)
    student.requires_grad_()
    gradients = [
        torch.autograd.grad(value(name, teacher, student), student)[0]
        for name in ("todi", "symmetric_kl")
    ]
    assert (gradients[0] - 2 * gradients[1]).abs().max() > 1e-3
    # Near equality the strength is 3/2 of KL's.
    near = (teacher + 1e-5 * torch.randn(30)).requires_grad_()
    found, kl = (
        torch.autograd.grad(value(name, teacher, near), near)[0] for name in ("todi", "forward_kl")
    )
    torch.testing.assert_close(found, 1.5 * kl, rtol=1e-3, atol=1e-12)


def test_mft_raises_the_label_above_the_token_that_was_most_likely():
    teacher, student = logits_of(P)[None], logits_of(Q)[None]
    # Label 1: m = (.5 + .2) / 1.5, and the target (.373333, .573333, .053333).
    measured = get_loss("mft")(student, teacher, torch.tensor([1])).item()
    assert measured == pytest.approx(
        28 / 75 * math.log(28 / 15) + 43 / 75 * math.log(43 / 22.5) + 4 / 75 * math.log(8 / 75),
        rel=2e-6,
    )
    student = student.requires_grad_()
    (found,) = torch.autograd.grad(get_loss("mft")(student, teacher, torch.tensor([1])), student)
    expected = torch.tensor(Q) - torch.tensor([28, 43, 4]) / 75
    torch.testing.assert_close(found[0].double(), expected.double(), rtol=0, atol=1e-7)


def test_bild_ignores_the_tail_and_counts_both_choices():
    teacher = torch.tensor([5.0, 4.0, 3.0, 0.0, -1.0, -2.0])
    assert value("bild:k=3", teacher, teacher - torch.tensor([0.0, 0, 0, 1, 1, 1])).item() == 0
    student = torch.tensor([5.0, 2.0, 0.0, 3.0, -1.0, -2.0])
    one, other = value("bild:k=3", teacher, student), value("bild:k=3", student, teacher)
    assert one.item() > 0.1
    assert other.item() != pytest.approx(one.item())


def test_adaptive_kl_finds_the_head_of_a_sort():
    loss = get_loss("adaptive_kl").loss
    teacher = torch.randn(50, 3000, dtype=torch.float64) * torch.linspace(0.1, 9, 50)[:, None]
    teacher[1] = 0.0  # all equal: all in the head
    teacher[2, :10] = 50.0
    log_p, log_q = (x.log_softmax(-1) for x in (teacher, torch.randn(50, 3000).double()))
    for mass in (0.01, 0.5, 0.9, 0.999):
        actual = type(loss)(mass=mass)._forward_weight(log_p, log_q)
        expected = oracles.adaptive_weights(log_p.cpu().numpy(), log_q.cpu().numpy(), mass)
        np.testing.assert_allclose(actual.cpu().numpy(), expected, rtol=0, atol=1e-6)


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
        gradient(name, P, Q_ZERO)[1:].cpu().numpy(), expected[0], rtol=1e-5, atol=1e-6
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


@pytest.mark.parametrize(("name", "parameters"), SPECS + EXTREMES)
@pytest.mark.parametrize("scale", [0, 1e-6, 1e-4, 1e-2])
def test_near_equality_nothing_is_negative(name, parameters, scale):
    rows, spread = (2, 1) if (name, parameters) in EXTREMES else (4, 4)
    teacher = spread * torch.randn(rows, 49152)
    student = teacher + scale * torch.randn(rows, 49152)
    loss = get_loss(spec(name, parameters))
    measured = loss(student, teacher, torch.zeros(rows, dtype=torch.int64), reduction="none")
    assert (measured >= 0).all()
    expected = oracles.rows(name, teacher, student, **parameters)
    # Log-probabilities carry an error of about 1e-7, which enters total variation linearly.
    atol = 1e-7 if name == "total_variation" else 2e-10
    if (name, parameters) in EXTREMES:  # terms weigh p^(alpha + beta), also where p is tiny
        log_p = oracles.log_softmax(teacher)
        atol += 4e-12 * np.exp(sum(parameters.values()) * log_p).sum(axis=-1).max()
    np.testing.assert_allclose(measured.cpu().numpy(), expected, rtol=1e-2, atol=atol)
    assert scale or name in NOT_ZERO or (measured < atol).all()


@pytest.mark.parametrize(
    ("name", "parameters"), [*SPECS, *EXTREMES, ("alpha_beta", {"alpha": 0.9, "beta": 0.1})]
)
def test_curvature_is_the_second_order_of_the_value(name, parameters):
    loss = get_loss(spec(name, parameters)).loss
    if loss.curvature() is None:
        assert name in {
            *("total_variation", "decoupled_kd", "alpha_beta", "taid", "todi", "entropy_aware_kl"),
            *("concrete_score", "amid", "mft", "bild"),
        }
        assert name != "alpha_beta" or sum(parameters.values()) != 1
        assert name != "concrete_score" or "uniform" in parameters.values()
        assert name != "amid" or "divergence" in parameters
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


@pytest.mark.parametrize("beta", [0.001, 0.01, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("scale", [0.05, 0.3, 1.0])
@pytest.mark.filterwarnings("ignore:generalized_jsd")
def test_both_sides_of_the_jsd_keep_their_digits(beta, scale):
    """Toward the ends one side lies much closer to the mixture than the other."""
    teacher = torch.randn(16, 2000) * 3
    student = teacher + scale * torch.randn(16, 2000)
    loss = get_loss(spec("generalized_jsd", {"beta": beta, "normalize": True}))
    measured = loss(student, teacher, torch.zeros(16, dtype=torch.int64), reduction="none")
    p, q = (x.double().softmax(-1) for x in (teacher, student))
    m = beta * p + (1 - beta) * q
    halves = beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)
    torch.testing.assert_close(measured.double(), halves / (beta * (1 - beta)), rtol=1e-5, atol=0)


def test_the_second_derivative_near_equality_is_that_of_the_formula():
    student = torch.randn(7, dtype=torch.float64)
    teacher = student + 1e-3 * torch.randn(7, dtype=torch.float64)
    hessian = torch.autograd.functional.hessian(
        lambda logits: value("forward_kl", teacher, logits), student
    )
    q = student.softmax(-1)
    torch.testing.assert_close(hessian, q.diag() - q.outer(q))


def test_normalized_jsd_is_continuous_at_both_ends():
    teacher, student = torch.randn(2, 30, dtype=torch.float64)
    for end, near, other in [(0, 1e-6, "forward_kl"), (1, 1 - 1e-6, "reverse_kl")]:
        with pytest.warns(UserWarning, match="too close to 0 or 1"):
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
    both = value("alpha_beta:alpha=0.2,beta=0.7", teacher, student).item()
    assert both == pytest.approx(value("alpha_beta:alpha=0.7,beta=0.2", student, teacher).item())
    decoupled = value("decoupled_kd", teacher, student).item()
    between, within = (
        value(f"decoupled_kd:alpha={weight},beta={1 - weight}", teacher, student).item()
        for weight in (1, 0)
    )
    assert decoupled == pytest.approx(between + within)
    rest = 1 - teacher.softmax(-1)[0].item()
    assert forward.item() == pytest.approx(between + rest * within)
    skew = value("skew_forward_kl:alpha=0.3", teacher, student).item()
    assert skew == pytest.approx(value("skew_reverse_kl:alpha=0.3", student, teacher).item())


def clear_cut(p, q, mass=0.5):
    """Whether float32 must find the head that float64 finds, and its share of the gap."""
    levels = np.unique(p)
    held = np.array([p[p >= level].sum() for level in levels])
    weight = oracles.adaptive_weights(oracles.log(p), oracles.log(q), mass)
    return (
        np.abs(held - mass).min() > 1e-5
        and (np.diff(oracles.log(levels)) > 1e-5).all()
        and np.abs(p - q).sum() > 0.1
        and 1e-3 < weight < 1 - 1e-3
    )


def well_ordered(logits):
    """Whether float32 must find the order of float64."""
    known = np.sort(logits[logits > -math.inf])
    return (np.diff(known) > 1e-4).all()


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
    # TAID's target has nowhere to be where the two have no token in common.
    assume(name != "taid" or np.isfinite(teacher + student).any())
    assume(parameters.get("alpha") != 1 or np.isfinite(teacher + student).any())
    assume(name != "bild" or (well_ordered(teacher) and well_ordered(student)))
    expected = oracles.rows(name, teacher, student, **parameters)
    p, q = np.exp(oracles.log_softmax(teacher)), np.exp(oracles.log_softmax(student))
    measured = value(spec(name, parameters), torch.tensor(teacher), torch.tensor(student)).item()
    if name == "adaptive_kl" and not clear_cut(p, q, **parameters):
        # Rounding may choose another weight, but no other two divergences.
        ends = [oracles.rows(x, teacher, student) for x in ("forward_kl", "reverse_kl")]
        assert min(ends) * (1 - 1e-5) - 2e-6 <= measured <= max(ends) * (1 + 1e-5) + 2e-6
    elif math.isinf(expected):
        # The weight of "log 0" is finite, so the tiniest mass on it is not seen.
        masses = [x.max(initial=0) for x in (p[q == 0], q[p == 0])]
        assert measured == math.inf or min(x for x in masses if x > 0) < 1e-17
    else:
        # Within the rest, log-probabilities of -160 and their rounding have the full weight.
        atol = 1e-4 if name == "decoupled_kd" else 2e-6
        assert measured == pytest.approx(expected, rel=1e-5, abs=atol)
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
        "alpha_beta:alpha=4.1",
        "alpha_beta:alpha=nan",
        "alpha_beta:beta=-4.1",
        "adaptive_kl:mass=0",
        "adaptive_kl:mass=1",
        "decoupled_kd:alpha=-0.1",
        "decoupled_kd:beta=-1",
        "entropy_aware_kl:threshold=-0.1",
        "concrete_score:u=nobody",
        "amid:alpha=1.1",
        "amid:share=0",
        "amid:share=1",
        "amid:order=pq",
        "amid:divergence=tv",
        "mft:threshold=1",
        "mft:threshold=-0.1",
        "bild:k=1",
        "bild:k=65",
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


@pytest.mark.parametrize(
    ("text", "warned"),
    [
        ("alpha=0.0005", ["alpha=0.0005"]),
        ("beta=-0.0005", ["beta=-0.0005"]),
        ("alpha=0.5,beta=-0.4995", ["alpha + beta=0.0005"]),
        ("alpha=0.001", []),
        ("alpha=0", []),
        ("beta=0", []),
        ("alpha=0.5,beta=-0.5", []),
        ("alpha=0,beta=0", []),
        ("alpha=4,beta=-4", []),
    ],
)
def test_alpha_beta_close_to_a_limit_warns(text, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        get_loss(f"alpha_beta:{text}")
    assert len(caught) == len(warned)
    for warning, part in zip(caught, warned, strict=True):
        assert str(warning.message).startswith(f"alpha_beta: {part} is too close to 0")


@pytest.mark.parametrize("at", [(0.7, 0), (0, 0.7), (0.5, -0.5), (0, 0)])
def test_alpha_beta_is_continuous_at_its_limits(at):
    teacher, student = torch.randn(2, 30, dtype=torch.float64)
    exact = value("alpha_beta:alpha={},beta={}".format(*at), teacher, student).item()
    with pytest.warns(UserWarning, match="too close to 0"):
        near = value(
            f"alpha_beta:alpha={at[0] + 1e-5},beta={at[1] + 2e-5}", teacher, student
        ).item()
    assert near == pytest.approx(exact, rel=2e-4)


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
