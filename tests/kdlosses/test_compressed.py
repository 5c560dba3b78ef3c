"""Teachers of which only some tokens are kept: top-k with a tail bucket, and samples."""

import math

import numpy as np
import oracles
import pytest
import torch
from draws import Draws, generator
from oracles import NAMES

from kdlosses import (
    KDObjective,
    Linear,
    Logits,
    Projected,
    Sampled,
    TopK,
    available_losses,
    get_loss,
    measure,
)
from kdlosses.divergence import Divergence, RowLoss

ROWS, VOCAB = 6, 12
REGISTERED = sorted({ref.name for ref in available_losses()})


def make(name, how, **options):
    if how == "plain":
        return get_loss(name, **options)
    head, colon, tail = name.partition(":")
    return get_loss(f"{head}_chunked{colon}{tail}", chunk_size=4, compiled=False, **options)


def kinds(wanted):
    return [name for name in REGISTERED if wanted(get_loss(name).loss)]


BUCKETED = kinds(lambda loss: isinstance(loss, Divergence) or loss.supports_top_k)
MONOTONE = kinds(lambda loss: loss.coarse_graining_monotone)
LINEAR = kinds(
    lambda loss: isinstance(loss, Divergence) and loss.linear_finish and loss.reduction == "sum"
)


def problem(dtype=torch.float64):
    student = Projected(
        torch.randn(ROWS, 5, dtype=dtype).requires_grad_(),
        torch.randn(VOCAB, 5, dtype=dtype).requires_grad_(),
    )
    labels = torch.arange(ROWS)
    labels[2] = -100
    return student, 2 * torch.randn(ROWS, VOCAB, dtype=dtype), labels


def values_and_gradients(loss, student, teacher, labels):
    values = loss(student, teacher, labels, reduction="none")
    return values.detach(), *torch.autograd.grad(values.sum(), student.tensors)


def test_which_losses_work_with_which_teacher():
    assert set(LINEAR) < set(BUCKETED)
    assert {"forward_kl", "alpha_beta", "generalized_jsd", "hellinger"} <= set(LINEAR)
    # The plugin need not be installed.
    assert {"taid", "renyi"} & {"taid", *REGISTERED} <= set(BUCKETED)
    assert "adaptive_kl" not in BUCKETED


@pytest.mark.parametrize("how", ["plain", "chunked"])
@pytest.mark.parametrize("name", BUCKETED)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_tokens_kept_is_the_full_loss(name, how, temperature):
    student, teacher, labels = problem()
    loss = make(name, how, temperature=temperature)
    full = values_and_gradients(loss, student, Logits(teacher), labels)
    kept = TopK.from_logits(teacher, VOCAB, temperature)
    for a, b in zip(values_and_gradients(loss, student, kept, labels), full, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("how", ["plain", "chunked"])
@pytest.mark.parametrize("name", MONOTONE)
def test_more_tokens_never_lower_the_value(name, how):
    student, teacher, labels = problem()
    loss = make(name, how)
    values = [
        values_and_gradients(loss, student, TopK.from_logits(teacher, k), labels)[0]
        for k in range(1, VOCAB + 1)
    ]
    full = values_and_gradients(loss, student, Logits(teacher), labels)[0]
    steps = torch.stack(values).diff(dim=0)
    assert (steps >= -1e-12).all()
    assert (steps.sum(0)[labels >= 0] > 0).all()
    assert (values[0] >= 0).all()
    torch.testing.assert_close(values[-1], full, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "generalized_jsd", "total_variation"])
def test_the_tail_is_one_event(name):
    """Against the closed form on the merged distributions, gradients by differences."""
    student, teacher, labels = problem()
    logits = (student.hidden @ student.weight.T).detach().cpu().numpy()

    def oracle(x):
        merged = []
        for z in (teacher.cpu().numpy(), x):
            p = np.exp(oracles.log_softmax(z))
            order = np.argsort(-teacher.cpu().numpy(), axis=-1)
            top = np.take_along_axis(p, order[:, :3], -1)
            rest = np.take_along_axis(p, order[:, 3:], -1).sum(-1, keepdims=True)
            merged.append(np.log(np.concatenate([top, rest], -1)))
        keep = labels.cpu().numpy() != -100
        return oracles.ORACLES[name](*merged)[keep].sum()

    leaf = torch.tensor(logits, requires_grad=True)
    value = make(name, "chunked")(
        leaf, TopK.from_logits(teacher, 3), labels, reduction="none"
    ).sum()
    assert value.item() == pytest.approx(oracle(logits), rel=1e-12)
    (gradient,) = torch.autograd.grad(value, leaf)
    expected = torch.tensor(oracles.central_differences(oracle, logits))
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", BUCKETED)
def test_impossible_tokens_and_small_tails_stay_finite(name):
    student = torch.randn(4, VOCAB).requires_grad_()
    teacher = torch.randn(4, VOCAB)
    teacher[0] *= 200  # nothing is left for the tail in float32
    teacher[1, 5:] = -math.inf  # k reaches beyond the possible tokens
    for k in (1, 7, VOCAB):
        for how in ("plain", "chunked"):
            value = make(name, how)(student, TopK.from_logits(teacher, k), torch.arange(4))
            assert not value.isnan()
            assert torch.autograd.grad(value, student)[0].isfinite().all()


@pytest.mark.parametrize("how", ["plain", "chunked"])
@pytest.mark.parametrize("name", LINEAR)
def test_the_expected_estimate_is_the_full_loss(name, how):
    """By enumeration: one draw, every token with its probability; no Monte-Carlo error."""
    student, teacher, labels = problem()
    loss = make(name, how)
    full = values_and_gradients(loss, student, Logits(teacher), labels)
    log_probs = teacher.log_softmax(-1)
    expected = [torch.zeros_like(x) for x in full]
    for token in range(VOCAB):
        drawn = Sampled(log_probs[:, [token]], torch.full((ROWS, 1), token), VOCAB)
        weights = log_probs[:, token].exp()
        values = loss(student, drawn, labels, reduction="none") * weights
        found = (values.detach(), *torch.autograd.grad(values.sum(), student.tensors))
        for total, part in zip(expected, found, strict=True):
            total += part
    for a, b in zip(expected, full, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "generalized_jsd"])
def test_draws_from_the_teacher_meet_the_full_loss_within_their_error(name):
    draw = generator(1)
    student, teacher = Draws(1).normal(2, 1, VOCAB).double()
    leaf = student.requires_grad_()
    repeats, draws = 4000, 8
    drawn = Sampled.from_logits(teacher.expand(repeats, -1), draws, generator=draw)
    labels = torch.zeros(repeats, dtype=torch.int64)
    wide = leaf.expand(repeats, -1).contiguous()
    values = make(name, "chunked")(wide, drawn, labels, reduction="none")
    per_row = torch.autograd.grad(values.sum(), wide)[0]
    full = make(name, "plain")(leaf, teacher, labels[:1])
    exact = torch.autograd.grad(full, leaf)[0][0]
    for found, target in ((values.detach()[:, None], full.detach()[None]), (per_row, exact)):
        error = found.std(0) / math.sqrt(repeats)
        assert (error > 0).all()
        assert ((found.mean(0) - target).abs() < 4.5 * error).all()


def test_draws_are_independent_of_the_number_kept_together():
    """The variance of a mean of n draws is that of one draw divided by n."""
    draw = generator(2)
    student, teacher = Draws(2).normal(2, 1, VOCAB).double()
    loss, spread = make("forward_kl", "plain"), {}
    for draws in (1, 16):
        drawn = Sampled.from_logits(teacher.expand(6000, -1), draws, generator=draw)
        labels = torch.zeros(6000, dtype=torch.int64)
        values = loss(student.expand(6000, -1), drawn, labels, reduction="none")
        spread[draws] = values.var().item()
    assert spread[1] / spread[16] == pytest.approx(16, rel=0.15)


# Refusals.


def test_another_temperature_is_refused():
    student, teacher, labels = problem()
    for source in (TopK.from_logits(teacher, 3), Sampled.from_logits(teacher, 3)):
        with pytest.raises(ValueError, match="stored at temperature 1, but the loss uses 2"):
            make("forward_kl", "chunked", temperature=2.0)(student, source, labels)
    moving = get_loss("forward_kl", schedules={"temperature": Linear(start=1, end=2)})
    moving(student, TopK.from_logits(teacher, 3), labels)
    moving.advance(0.5)
    with pytest.raises(ValueError, match=r"the loss uses 1\.5"):
        moving(student, TopK.from_logits(teacher, 3), labels)


@pytest.mark.parametrize("name", ["adaptive_kl", "decoupled_kd", "forward_kl+adaptive_kl"])
def test_losses_of_the_whole_row_are_refused(name):
    student, teacher, labels = problem()
    with pytest.raises(ValueError, match="needs the teacher's full distribution"):
        get_loss(name)(student, TopK.from_logits(teacher, 3), labels)


@pytest.mark.parametrize("name", sorted(set(REGISTERED) - set(LINEAR)))
def test_biased_estimates_are_refused(name):
    student, teacher, labels = problem()
    with pytest.raises(ValueError, match="would be biased"):
        get_loss(name)(student, Sampled.from_logits(teacher, 3), labels)


def test_a_compressed_teacher_over_more_tokens_than_are_shared_is_refused():
    student, teacher, labels = problem()
    with pytest.raises(
        ValueError, match="compressed over 12 tokens, but the shared vocabulary has 10"
    ):
        get_loss("forward_kl", vocab_size=10)(student, TopK.from_logits(teacher, 3), labels)
    # A student with a padded head is cut to the teacher's vocabulary.
    kept = TopK.from_logits(teacher[:, :10], 3)
    cut = Projected(student.hidden, student.weight[:10])
    for how in ("plain", "chunked"):
        loss = make("forward_kl", how)
        torch.testing.assert_close(loss(student, kept, labels), loss(cut, kept, labels))


def test_measures_need_a_distribution():
    student, teacher, labels = problem()
    with pytest.raises(ValueError, match="need its distribution, got Sampled"):
        measure(get_loss("forward_kl"), student, Sampled.from_logits(teacher, 3), labels)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("how", ["plain", "chunked"])
def test_measures_of_most_likely_tokens_are_over_these_and_the_rest(how, temperature):
    student, teacher, labels = problem()
    loss = make("reverse_kl", how, temperature=temperature)
    found = measure(loss, student, TopK.from_logits(teacher, 3, temperature), labels)
    assert found.forward_kl is found.reverse_kl is found.top1_agreement is None
    logits = student.hidden.double() @ student.weight.double().T
    p = (teacher.double() / temperature).softmax(-1)
    q = (logits[..., : p.shape[-1]] / temperature).softmax(-1)
    kept = p.topk(3, -1).indices
    p, q = (
        torch.cat([x.gather(-1, kept), 1 - x.gather(-1, kept).sum(-1, keepdim=True)], -1)
        for x in (p, q)
    )
    supervised = labels != -100
    expected = (p * (p / q).log()).sum(-1)[supervised].sum()
    torch.testing.assert_close(found.events_forward_kl.double(), expected, rtol=1e-4, atol=1e-5)
    reverse = (q * (q / p).log()).sum(-1)[supervised].sum() * temperature**2
    torch.testing.assert_close(found.kd.double(), reverse, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make_source", "error", "message"),
    [
        (lambda: TopK.from_logits(torch.zeros(2, 4), 5), ValueError, r"k: must be in \[1, 4\]"),
        (lambda: Sampled.from_logits(torch.zeros(2, 4), 0), ValueError, "draws"),
        (lambda: TopK.from_logits(torch.zeros(2, 4), 2, 0.0), ValueError, "temperature"),
        (
            lambda: Sampled(torch.zeros(2, 3), torch.zeros(2, 2, dtype=torch.int64), 4),
            ValueError,
            "the same shape",
        ),
        (lambda: Sampled(torch.zeros(2, 3), torch.full((2, 3), 4), 4), ValueError, "outside the"),
        (lambda: Sampled(torch.zeros(2, 3), torch.zeros(2, 3), 4), TypeError, "expected int64"),
        (
            lambda: TopK(
                torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3), 4
            ),
            ValueError,
            "tail_log_prob",
        ),
    ],
)
def test_malformed_sources(make_source, error, message):
    with pytest.raises(error, match=message):
        make_source()


def test_in_the_objective_with_batches_of_two_axes():
    student = torch.randn(2, 3, VOCAB).requires_grad_()
    teacher = torch.randn(2, 3, VOCAB)
    labels = torch.tensor([[0, -100, 2], [3, 4, -100]])
    for source in (TopK.from_logits(teacher, 4), Sampled.from_logits(teacher, 4)):
        found = []
        for how in ("plain", "chunked"):
            out = KDObjective(make("forward_kl", how), 0.5)(student, source, labels)
            found.append((out.loss.detach(), *torch.autograd.grad(out.loss, student)))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["top_k", "sampled"])
def test_compiled_equals_eager_in_one_graph(kind):
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    losses = [
        get_loss("forward_kl_chunked", chunk_size=4, compiled=compiled)
        for compiled in (True, False)
    ]
    for rows in (11, 5, 1):
        student = torch.randn(rows, 40).requires_grad_()
        teacher = torch.randn(rows, 40)
        source = (
            TopK.from_logits(teacher, 6) if kind == "top_k" else Sampled.from_logits(teacher, 6)
        )
        found = []
        for loss in losses:
            value = loss(student, source, torch.arange(rows))
            found.append((value.detach(), *torch.autograd.grad(value, student)))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=3e-6, atol=1e-7)
    assert counters["stats"]["unique_graphs"] - before == 1


def test_every_built_in_is_covered():
    assert set(NAMES) <= set(REGISTERED)


# Rows of unequal length: an entry of -inf is no entry (axolotl PR #2700, Megatron-LM PR #5019).

LOG6, LOG3, LOG1, NONE = math.log(0.6), math.log(0.3), math.log(0.1), -math.inf
PADDED = {
    "short": ([LOG6, LOG3], [5, 2]),
    "own token again": ([LOG6, LOG3, NONE], [5, 2, 5]),
    "token 0 twice": ([LOG6, LOG3, NONE, NONE], [5, 2, 0, 0]),
    "in front": ([NONE, LOG3, LOG6], [0, 2, 5]),
}


def padded(log_probs, indices, tail=LOG1):
    return TopK(torch.tensor([log_probs]), torch.tensor([indices]), torch.tensor([tail]), 8)


@pytest.mark.parametrize("how", ["forward_kl", "forward_kl_chunked"])
@pytest.mark.parametrize("form", PADDED)
def test_p4_padding_of_top_k_rows_changes_nothing(how, form):
    student = torch.zeros(1, 8, requires_grad=True)
    loss = get_loss(how)(student, padded(*PADDED[form]), torch.tensor([3]))
    loss.backward()
    # .6 ln(.6 8) + .3 ln(.3 8) + .1 ln(.1 8 / 6)
    assert loss.item() == pytest.approx(1.0023198, abs=1e-6)
    # q - p: of the two tokens, and of each of the six others their share of the tail.
    expected = torch.full((8,), 1 / 8 - 0.1 / 6)
    expected[5], expected[2] = 1 / 8 - 0.6, 1 / 8 - 0.3
    torch.testing.assert_close(student.grad[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [ref.name for ref in available_losses()])
def test_p4_padding_changes_no_loss_and_no_gradient(name):
    if refuses_top_k(name):
        pytest.skip("takes no compressed teacher")
    found = []
    for form in PADDED.values():
        student = torch.linspace(-2, 2, 8).view(1, 8).requires_grad_()
        loss = get_loss(name)(student, padded(*form), torch.tensor([3]))
        loss.backward()
        found.append((loss.detach(), student.grad))
    for value, gradient in found[1:]:
        torch.testing.assert_close(value, found[0][0])
        torch.testing.assert_close(gradient, found[0][1])


def refuses_top_k(name):
    loss = get_loss(name).loss
    return isinstance(loss, RowLoss) and not loss.supports_top_k


@pytest.mark.parametrize("how", ["forward_kl", "reverse_kl_chunked"])
def test_p4_a_token_that_stands_twice_with_mass_is_named(how):
    teacher = padded([math.log(0.5), math.log(0.4)], [5, 5])
    with pytest.raises(ValueError, match="token 5 appears twice with mass in row 0"):
        get_loss(how)(torch.zeros(1, 8), teacher, torch.tensor([3]))
    # In a row that nothing looks at it does no harm.
    assert get_loss(how)(torch.zeros(1, 8), teacher, torch.tensor([-100])).item() == 0


def test_p4_a_row_without_an_entry_is_all_tail():
    student = torch.zeros(1, 8, requires_grad=True)
    loss = get_loss("forward_kl")(student, padded([NONE, NONE], [0, 1], 0.0), torch.tensor([3]))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-7)
    assert student.grad.abs().max() < 1e-7
