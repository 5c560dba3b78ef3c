"""Token weights: their values, their place in the objective, state, and refusals."""

import math
from itertools import pairwise

import numpy as np
import oracles
import pytest
import torch
from pydantic import Field

import kdlosses
from kdlosses import (
    KDObjective,
    Projected,
    TokenWeight,
    TokenWeighting,
    TopK,
    get_loss,
    get_weight,
    testing,
)

P, Q = oracles.P, oracles.Q  # 0.7, 0.2, 0.1 and 0.2, 0.3, 0.5
H_P = 0.7 * math.log(1 / 0.7) + 0.2 * math.log(5) + 0.1 * math.log(10)
H_Q = 0.2 * math.log(5) + 0.3 * math.log(1 / 0.3) + 0.5 * math.log(2)
OVERLAP = math.sqrt(0.14) + math.sqrt(0.06) + math.sqrt(0.05)
BY_HAND = {
    "entropy": H_Q / math.log(3),
    "entropy:of=teacher,power=2": (H_P / math.log(3)) ** 2,
    "entropy:of=teacher,direction=falling": 1 - H_P / math.log(3),
    "top_entropy": 1.0,
    "confidence": 0.2,
    "confidence:power=2": 0.04,
    "disagreement": math.sqrt(1 - OVERLAP),
    "disagreement:power=2": 1 - OVERLAP,
    "advantage_gap": math.log(0.3 / 0.2) / 2,
    "advantage_gap:limit=0.1": 1.0,
    "position": 1.0,
}
CHUNKED = {"chunk_size": 4, "compiled": False}


def batch(dtype=torch.float64, width=9):
    """Logits ``[3, 6, width]`` of teacher and student, and labels with gaps."""
    generator = torch.Generator().manual_seed(7)
    teacher, student = torch.randn(
        2, 3, 6, width, generator=generator, dtype=torch.float64
    ).unbind()
    labels = torch.randint(0, width, (3, 6), generator=generator)
    labels[0, :2] = -100
    labels[1, 3] = -100
    return teacher.to(dtype), student.to(dtype), labels


class First(TokenWeight):
    """A weight that only the first token of an answer has, w = 1 if i = 0."""

    uses_position = True

    def weigh(self, teacher_log_probs, student_log_probs, labels):
        return (self.position == 0).to(student_log_probs.dtype)


@pytest.mark.parametrize("spec", BY_HAND)
def test_values_by_hand(spec):
    teacher, student = (torch.tensor(side).log()[None] for side in (P, Q))
    out = KDObjective(get_loss("forward_kl"), 1.0, get_weight(spec))(
        student, teacher, torch.tensor([1])
    )
    assert out.weight_sums.tolist() == pytest.approx([BY_HAND[spec], 1, 1])
    assert out.loss.item() == pytest.approx(BY_HAND[spec] * oracles.kl(np.log(P), np.log(Q)))


@pytest.mark.parametrize("name", sorted(ref.name for ref in kdlosses.available_weights()))
def test_built_in_weights_conform(name):
    testing.check_weight(name)


def test_position_halves_and_starts_again_in_each_answer():
    teacher, student, labels = batch()
    weight = get_weight("position:half_life=2,floor=0.2")
    out = KDObjective(get_loss("forward_kl"), 1.0, weight)(student, teacher, labels)
    runs = [4, 3, 2, 6]  # supervised tokens side by side; row 1 has a gap
    places = [place for length in runs for place in range(length)]
    expected = sum(0.2 + 0.8 * 0.5 ** (place / 2) for place in places)
    assert out.weight_sums.tolist() == pytest.approx([expected, 15, 15])


@pytest.mark.parametrize("on", ["kd", "both"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("how", ["plain", "chunked", "fused", "compiled"])
def test_the_objective_is_the_weighted_sum_at_temperature_1(how, temperature, on):
    teacher, student, labels = batch(torch.float32 if how == "compiled" else torch.float64)
    kept = labels != -100
    given = (teacher[kept].double().numpy(), student[kept].double().numpy())
    p, q = (oracles.log_softmax(side) for side in given)
    y = labels[kept].numpy()
    weights = np.minimum(np.abs(np.take_along_axis(p - q, y[:, None], 1)[:, 0]) / 2, 1)
    soft = [oracles.log_softmax(side, temperature) for side in given]
    kd = (weights * oracles.kl(*soft)).sum() * temperature**2 / len(y)
    ce = -np.take_along_axis(q, y[:, None], 1)[:, 0]
    ce = (ce * (weights if on == "both" else 1)).sum() / len(y)
    loss = get_loss(
        "forward_kl" if how == "plain" else "forward_kl_chunked",
        temperature=temperature,
        **({} if how == "plain" else CHUNKED | {"compiled": how == "compiled"}),
    )
    objective = KDObjective(loss, 0.3, TokenWeighting(get_weight("advantage_gap"), on))
    if how == "fused":
        eye = torch.eye(student.shape[-1], dtype=student.dtype)
        student = Projected(student, eye)
    out = objective(student, teacher, labels)
    rel = 1e-4 if how == "compiled" else 1e-9
    assert out.kd_loss.item() == pytest.approx(kd, rel=rel)
    assert out.class_loss.item() == pytest.approx(ce, rel=rel)
    assert out.loss.item() == pytest.approx(0.7 * ce + 0.3 * kd, rel=rel)
    assert out.weight_sums.tolist() == pytest.approx([weights.sum(), len(y), len(y)], rel=rel)


@pytest.mark.parametrize("name", ["reverse_kl", "reverse_kl_chunked"])
def test_no_gradient_flows_through_the_weight(name):
    teacher, student, labels = batch()
    more = CHUNKED if "chunked" in name else {}
    objective = KDObjective(
        get_loss(name, **more), 0.5, TokenWeighting(get_weight("disagreement"), "both")
    )

    def frozen(logits, weights):
        """The loss with the weights of the unperturbed logits, by finite differences."""
        p, q = oracles.log_softmax(teacher), oracles.log_softmax(logits)
        total = 0.0
        for place in np.argwhere(labels.numpy() != -100):
            i, j = place
            value = oracles.kl(q[i, j], p[i, j]) - q[i, j, labels[i, j]]
            total += 0.5 * weights[i, j] * value
        return total / 15

    p, q = (np.exp(oracles.log_softmax(side)) for side in (teacher, student))
    weights = np.sqrt(1 - np.sqrt(p * q).sum(-1))
    leaf = student.clone().requires_grad_()
    objective(leaf, teacher, labels).loss.backward()
    for place in ((0, 3, 2), (1, 0, 8), (2, 5, 0)):
        high, low = student.clone(), student.clone()
        high[place] += 1e-5
        low[place] -= 1e-5
        slope = (frozen(high, weights) - frozen(low, weights)) / 2e-5
        assert leaf.grad[place].item() == pytest.approx(slope, rel=1e-6)


def test_weights_of_the_caller_multiply():
    teacher, student, labels = batch()
    given = torch.rand(3, 6, generator=torch.Generator().manual_seed(1)).double()
    only = torch.where(torch.arange(6) < 3, given, 0.0)
    objective = KDObjective(get_loss("forward_kl"), 1.0, First())
    value = objective(student, teacher, labels, token_weights=only).loss
    rows = get_loss("forward_kl")(student, teacher, labels, reduction="none")
    # First tokens: place 2 of row 0, place 0 of row 1 (place 4 has weight 0), place 0 of row 2.
    expected = sum(rows[i, j] * given[i, j] for i, j in ((0, 2), (1, 0), (2, 0))) / 15
    assert value.item() == pytest.approx(expected.item())


def test_a_weight_of_0_removes_an_infinite_loss():
    teacher = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    student = torch.tensor([[0.0, 0.0], [0.0, -math.inf]])
    labels = torch.tensor([0, 1])
    for name in ("forward_kl", "forward_kl_chunked"):
        leaf = student.clone().requires_grad_()
        weighting = TokenWeighting(First(), "both")
        out = KDObjective(get_loss(name), 0.5, weighting)(leaf, teacher, labels)
        assert out.loss.item() == pytest.approx(math.log(2) / 4)
        out.loss.backward()
        assert leaf.grad.isfinite().all()
        infinite = KDObjective(get_loss(name), 0.5)(student, teacher, labels)
        assert infinite.loss.item() == math.inf


def test_ratio_0_weights_nothing_and_asks_no_teacher():
    _, student, labels = batch()
    weighting = TokenWeighting(get_weight("entropy"), "both")
    out = KDObjective(get_loss("forward_kl"), 0.0, weighting)(student, None, labels)
    assert out.weight_sums is None
    q = oracles.log_softmax(student)
    ce = -np.take_along_axis(q, labels.clamp_min(0).numpy()[..., None], -1)[..., 0]
    assert out.loss.item() == pytest.approx(ce[labels.numpy() != -100].mean())


def test_the_running_mean_divides_from_the_second_step_on():
    teacher, student, labels = batch()
    plain = KDObjective(get_loss("forward_kl"), 1.0, get_weight("confidence"))
    running = KDObjective(
        get_loss("forward_kl"), 1.0, TokenWeighting(get_weight("confidence"), normalize="running")
    )
    first = running(student, teacher, labels)
    unweighted = plain(student, teacher, labels).loss.item()
    assert first.loss.item() == pytest.approx(unweighted)
    means = []
    for step, mean in enumerate((0.5, 0.1, 0.3)):
        means.append(mean)
        running.advance(step / 3, None, [mean * 20, 20, 20])
        expected = unweighted / np.mean(means)
        out = running(student, teacher, labels)
        assert out.loss.item() == pytest.approx(expected)
        assert out.kd_loss.item() == pytest.approx(expected)
        assert torch.equal(out.weight_sums, first.weight_sums)
    assert running.moving_values["weight.running_mean"] == pytest.approx(0.3)


def test_a_vanishing_mean_does_not_explode():
    weighting = TokenWeighting(get_weight("confidence"), normalize="running")
    weighting.advance(0.1, 0.0, 0.0)
    assert weighting.factor == 100


def test_the_threshold_finds_the_wanted_share():
    generator = torch.Generator().manual_seed(2)
    scale = torch.rand(400, 1, generator=generator).double() * 4
    logits = torch.randn(400, 30, generator=generator).double() * scale
    labels = torch.zeros(400, dtype=torch.int64)
    objective = KDObjective(get_loss("forward_kl"), 1.0, get_weight("top_entropy:share=0.2"))
    for step in range(200):
        out = objective(logits, logits.flip(0), labels)
        objective.advance(step / 200, None, out.weight_sums.tolist())
    entropies = np.sort([-(np.exp(x) * x).sum() for x in oracles.log_softmax(logits)])
    low, high = entropies[round(0.75 * 400)], entropies[round(0.85 * 400)]
    assert low < objective.moving_values["weight.threshold"] < high
    assert out.weight_sums[1].item() == pytest.approx(80, abs=15)


def test_state_survives_a_checkpoint_and_belongs_to_its_weight():
    def make(spec):
        return KDObjective(
            get_loss("forward_kl"), 1.0, TokenWeighting(get_weight(spec), normalize="running")
        )

    before = make("top_entropy")
    for _ in range(3):
        before.advance(0.5, None, [3.0, 6.0, 10.0])
    after = make("top_entropy")
    after.load_state_dict(before.state_dict())
    assert after.moving_values == before.moving_values
    for each in (before, after):
        each.advance(0.6, None, [1.0, 1.0, 10.0])
    assert after.moving_values == before.moving_values
    with pytest.raises(ValueError, match="was saved with the token weight TopEntropy"):
        make("entropy").load_state_dict(before.state_dict())
    with pytest.raises(ValueError, match="weight_sums: this token weight needs its sums"):
        before.advance(0.7)


@pytest.mark.parametrize("spec", ["entropy:of=teacher", "top_entropy", "disagreement", "position"])
def test_top_k_of_all_tokens_but_one_is_the_whole_distribution(spec):
    teacher, student, labels = batch()
    for name in ("forward_kl", "forward_kl_chunked"):
        objective = KDObjective(get_loss(name), 1.0, get_weight(spec))
        whole = objective(student, teacher, labels)
        events = objective(student, TopK.from_logits(teacher, 8), labels)
        assert events.loss.item() == pytest.approx(whole.loss.item())
        assert torch.allclose(events.weight_sums, whole.weight_sums)


def test_compressed_teachers_are_refused_where_a_weight_cannot_use_them():
    teacher, student, labels = batch()

    def refused(spec, source, words, temperature=1.0):
        loss = get_loss("forward_kl", temperature=temperature)
        with pytest.raises(ValueError, match=words):
            KDObjective(loss, 1.0, get_weight(spec))(student, source, labels)

    kept = TopK.from_logits(teacher, 3)
    refused("confidence", kept, "Confidence needs the teacher's full distribution")
    softened = TopK.from_logits(teacher, 3, 2.0)
    refused("entropy", softened, "use temperature 1", temperature=2.0)
    drawn = kdlosses.Sampled.from_logits(teacher, 3, generator=torch.Generator().manual_seed(0))
    refused("entropy", drawn, "not draws from it")


def test_unknown_names_and_parameters():
    with pytest.raises(kdlosses.WeightSpecError, match="did you mean 'entropy'"):
        get_weight("entrpy")
    with pytest.raises(kdlosses.WeightSpecError, match="did you mean 'power'"):
        get_weight("entropy:powr=2")
    with pytest.raises(kdlosses.WeightSpecError, match="power='-1'"):
        get_weight("entropy:power=-1")
    for spec in ("0.5*entropy", "entropy+position", "entropy_chunked", "entropy:power"):
        with pytest.raises(kdlosses.WeightSpecError, match="expected"):
            get_weight(spec)
    with pytest.raises(ValueError, match="on: expected 'kd' or 'both'"):
        TokenWeighting(get_weight("entropy"), "ce")
    with pytest.raises(AttributeError, match="set uses_position = True"):
        _ = get_weight("entropy").position


class Negative(TokenWeight):
    """The log-ratio of the label, w = log p_y - log q_y.

    Reference: none.
    """

    def weigh(self, teacher_log_probs, student_log_probs, labels):
        at = labels.unsqueeze(-1)
        return (teacher_log_probs.gather(-1, at) - student_log_probs.gather(-1, at)).squeeze(-1)


class OfTheTile(TokenWeight):
    """The confidence relative to the tile, w = p_y / max p_y.

    Reference: none.
    """

    def weigh(self, teacher_log_probs, student_log_probs, labels):
        found = teacher_log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1).exp()
        return found / found.max().clamp_min(1e-9)


class Unbounded(TokenWeight):
    """A negative power of the confidence, w = p_y^-power.

    Reference: none.
    """

    power: float = Field(1.0, ge=0)

    def weigh(self, teacher_log_probs, student_log_probs, labels):
        return (-self.power * teacher_log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)).exp()


@pytest.mark.parametrize(
    ("weight", "failed"),
    [
        (Negative, {"values"}),
        (OfTheTile, {"rows", "objective"}),
        (Unbounded, {"values", "docstring"}),
    ],
)
def test_the_kit_finds_faults(weight, failed):
    results = testing.run_weight_checks(weight)
    found = {result.name for result in results if result.verdict == "failed"}
    assert failed <= found
    with pytest.raises(testing.ConformanceError, match=weight.__name__):
        testing.check_weight(weight)


def test_positions_of_every_shape():
    from kdlosses.engine import supervised_rows

    generator = torch.Generator().manual_seed(0)
    for shape in ((12,), (3, 7), (2, 2, 5), (4, 1)):
        labels = torch.randint(0, 3, shape, generator=generator) - 1  # -1 is ignored
        found = supervised_rows(labels, -1, 3).positions.tolist()
        expected = []
        for line in labels.reshape(-1, shape[-1]).tolist():
            place = 0
            for label in line:
                if label >= 0:
                    expected.append(place)
                place = place + 1 if label >= 0 else 0
        assert found == expected
        assert all(b in (0, a + 1) for a, b in pairwise(found))
    assert supervised_rows(torch.full((2, 3), -1), -1, 3).positions.tolist() == []


SURPRISE = """
from kdlosses import TokenWeight
from pydantic import Field

class Surprise(TokenWeight):
    '''The surprise at the label, w = min(-log q_y, limit) / limit.

    Reference: none.
    '''

    limit: float = Field(5.0, gt=0, description="in nats")

    def weigh(self, teacher_log_probs, student_log_probs, labels):
        label = student_log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return (-label / self.limit).clamp(0, 1)
"""


def test_a_strangers_weight_works_by_name(install):
    install("surprising", {"surprise": "surprising:Surprise"}, "weights", surprising=SURPRISE)
    names = {(ref.name, ref.distribution) for ref in kdlosses.available_weights()}
    assert ("surprise", "surprising") in names
    testing.check_weight("surprise")
    teacher, student = (torch.tensor(side).log()[None] for side in (P, Q))
    for name in ("forward_kl", "forward_kl_chunked"):
        objective = KDObjective(get_loss(name), 1.0, get_weight("surprise:limit=2"))
        out = objective(student, teacher, torch.tensor([1]))
        assert out.weight_sums[0].item() == pytest.approx(-math.log(0.3) / 2)


def test_a_built_in_weight_is_not_replaced_and_a_broken_one_harms_no_other(install):
    install("odd", {"entropy": "no_such:Thing", "gone": "no_such:Thing"}, "weights")
    assert type(get_weight("entropy")).__name__ == "Entropy"
    with pytest.raises(kdlosses.BrokenWeightError, match="of distribution 'odd'"):
        get_weight("gone")
