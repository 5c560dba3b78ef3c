"""Weighted sums: one pass, each term's own factor, the value of the parts added up."""

import pytest
import torch

from kdlosses import KDObjective, Projected, get_loss, measure

ROWS, VOCAB = 9, 13
# A power of 1, an infinite term nowhere, a row loss that reads the label.
PARTS = {"total_variation": 0.7, "generalized_jsd:beta=0.3": 2.0, "decoupled_kd": 0.25}


def with_suffix(name):
    head, colon, tail = name.partition(":")
    return f"{head}_chunked{colon}{tail}"


def spec(chunked):
    return " + ".join(
        f"{weight}*{with_suffix(name) if chunked else name}" for name, weight in PARTS.items()
    )


def build(text, **options):
    chunked = "_chunked" in text
    return get_loss(text, **({"chunk_size": 4, "compiled": False} if chunked else {}), **options)


def problem(dtype=torch.float64):
    student = Projected(
        torch.randn(ROWS, 5, dtype=dtype).requires_grad_(),
        torch.randn(VOCAB, 5, dtype=dtype).requires_grad_(),
    )
    labels = torch.randint(0, VOCAB, (ROWS,))
    labels[[0, 4]] = -100
    return student, torch.randn(ROWS, VOCAB, dtype=dtype), labels


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_sum_is_its_parts_added_up(chunked, temperature):
    student, teacher, labels = problem()
    weights = torch.rand(ROWS, dtype=torch.float64)
    parts = [build(name, temperature=temperature) for name in PARTS]
    whole = build(spec(chunked), temperature=temperature)
    for options in ({}, {"num_tokens": 20}, {"token_weights": weights}, {"reduction": "none"}):
        singles = [part(student, teacher, labels, **options) for part in parts]
        expected = sum(w * x for w, x in zip(PARTS.values(), singles, strict=True))
        found = whole(student, teacher, labels, **options)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
        gradients = [torch.autograd.grad(x.sum(), student.tensors) for x in (found, expected)]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("chunked", [False, True])
def test_each_term_is_reported_before_its_weight(chunked):
    student, teacher, labels = problem()
    out = KDObjective(build(spec(chunked), temperature=2.0), 0.6)(student, teacher, labels)
    singles = [build(name, temperature=2.0)(student, teacher, labels).detach() for name in PARTS]
    torch.testing.assert_close(out.kd_terms, torch.stack(singles), rtol=1e-12, atol=0)
    total = sum(w * x for w, x in zip(PARTS.values(), singles, strict=True))
    torch.testing.assert_close(out.kd_loss, total, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        out.loss.detach(), 0.4 * out.class_loss + 0.6 * total, rtol=1e-12, atol=0
    )


def test_measures_of_a_sum():
    student, teacher, labels = problem()
    found = measure(build(spec(True), temperature=2.0), student, teacher, labels)
    each = [measure(build(name, temperature=2.0), student, teacher, labels).kd for name in PARTS]
    torch.testing.assert_close(found.kd_terms, torch.stack(each), rtol=1e-12, atol=0)
    total = sum(w * x for w, x in zip(PARTS.values(), each, strict=True))
    torch.testing.assert_close(found.kd, total, rtol=1e-12, atol=0)


def test_curvatures_are_matched_term_by_term():
    student, teacher, labels = problem()
    whole = build("hellinger+skew_forward_kl:alpha=0.1", match_curvature=True)
    expected = build("hellinger")(student, teacher, labels) / 0.25
    expected = expected + build("skew_forward_kl")(student, teacher, labels) / 0.81
    torch.testing.assert_close(whole(student, teacher, labels), expected, rtol=1e-12, atol=0)


def test_one_infinite_term_makes_the_sum_infinite_and_leaves_the_others():
    student = torch.tensor([[0.0, 0.0, -torch.inf]])
    teacher = torch.zeros(1, 3)
    for suffix in ("", "_chunked"):
        loss = build(f"forward_kl{suffix}+reverse_kl{suffix}")
        out = KDObjective(loss, 1.0)(student, teacher, torch.tensor([0]))
        assert out.kd_loss == torch.inf
        assert out.kd_terms[0] == torch.inf
        assert out.kd_terms[1].item() == pytest.approx(0.405465, abs=1e-6)  # ln(3/2)


def test_a_sum_is_projected_and_evaluated_once(monkeypatch):
    from kdlosses.engine import gather

    made = []
    real = gather.project

    def counted(hidden, *rest):
        made.append(len(hidden))
        return real(hidden, *rest)

    monkeypatch.setattr(gather, "project", counted)
    student, _, labels = problem()
    teacher = Projected(torch.randn(ROWS, 3).double(), torch.randn(VOCAB, 3).double())
    build(spec(True))(student, teacher, labels).backward()
    assert sum(made) == 2 * 7  # the supervised rows of each side, whatever the number of terms
