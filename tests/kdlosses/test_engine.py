"""The evaluation around a loss: every path, form, shape and dtype gives one value and gradient.

The reference is float64: oracles for values, and autograd through logits that the tests make.
Everything here runs with compiled=False; test_compiled.py compares compiled with eager.
"""

import math
import subprocess
import sys
import weakref

import numpy as np
import oracles
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import NAMES, POWERS, SPECS, spec
from torch.utils._python_dispatch import TorchDispatchMode

from kdlosses import KDObjective, Logits, Projected, TokenLoss, get_loss, measure

FORMS = ["plain", "chunked"]


def loss_of(name, how="chunked", chunk_size=3, **options):
    """A loss on one of the two paths; ``name`` may hold parameters."""
    if how == "plain":
        return get_loss(name, **options)
    head, colon, tail = name.partition(":")
    text = f"{head}_chunked{colon}{tail}"
    return get_loss(text, chunk_size=chunk_size, compiled=False, **options)


def projected(rows, vocab, width, *, dtype=torch.float32, bias=False, grad=True, **post):
    """A random source; its leaves need gradients."""
    rows = (rows,) if isinstance(rows, int) else rows
    hidden = torch.randn(*rows, width).to(dtype).requires_grad_(grad)
    weight = (torch.randn(vocab, width) / width**0.5).to(dtype).requires_grad_(grad)
    offset = torch.randn(vocab).to(dtype).requires_grad_(grad) if bias else None
    return Projected(hidden, weight, offset, **post)


def doubled(source):
    """Float64 leaves with the same values, and the logits that they make, by autograd."""
    leaves = [x.detach().double().requires_grad_() for x in source.tensors]
    if isinstance(source, Logits):
        return leaves, leaves[0]
    logits = leaves[0] @ leaves[1].T
    if source.bias is not None:
        logits = logits + leaves[2]
    logits = logits * source.logit_scale
    if source.softcap is not None:
        logits = source.softcap * torch.tanh(logits / source.softcap)
    return leaves, logits


def gradients(loss, source):
    return torch.autograd.grad(loss, [x for x in source.tensors if x.requires_grad])


def reference(objective, student, teacher, labels, num_tokens=None, **more):
    """Value and gradients of the plain objective in float64 on explicit logits."""
    leaves, logits = doubled(student)
    teacher_logits = doubled(teacher)[1].detach()
    width = min(logits.shape[-1], teacher_logits.shape[-1])
    plain = TokenLoss(
        objective.loss.loss,
        temperature=objective.loss.temperature,
        temperature_scaling=objective.loss.temperature_scaling,
    )
    out = KDObjective(plain, objective.kd_ratio)(
        logits[..., :width], teacher_logits[..., :width], labels, num_tokens, **more
    )
    return out, torch.autograd.grad(out.loss, leaves)


def assert_near(actual, expected, rtol=1e-5, atol=1e-6, floor=0.0):
    """Equal up to rtol, plus atol of the largest expected entry, plus floor."""
    scale = max(expected.abs().max().item(), 1e-30) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=rtol, atol=atol * scale + floor, check_dtype=False
    )


def assert_matches(objective, student, teacher, labels, num_tokens=None, **tolerance):
    out = objective(student, teacher, labels, num_tokens)
    expected, expected_gradients = reference(objective, student, teacher, labels, num_tokens)
    for name in ("loss", "class_loss", "kd_loss"):
        assert_near(getattr(out, name), getattr(expected, name), **tolerance)
    for a, b in zip(gradients(out.loss, student), expected_gradients, strict=True):
        assert_near(a, b, **tolerance)


# Chunked equals plain.


@pytest.mark.parametrize(("name", "parameters"), SPECS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("how", FORMS)
def test_every_loss_on_projected_and_on_logits(name, parameters, temperature, how):
    objective = KDObjective(loss_of(spec(name, parameters), how, temperature=temperature), 0.3)
    labels = torch.tensor([4, -100, 0, 10, 7, 7, -100])
    student, teacher = projected(7, 11, 5, bias=True), projected(7, 11, 3)
    assert_matches(objective, student, teacher, labels)
    student, teacher = (Logits(2 * torch.randn(7, 11)) for _ in range(2))
    student.values.requires_grad_()
    assert_matches(objective, student, teacher, labels)


@pytest.mark.parametrize("chunk_size", [*range(1, 9), 100, None])
@pytest.mark.parametrize("masked", [False, True])
def test_the_chunk_size_changes_nothing(chunk_size, masked):
    labels = torch.arange(8)
    if masked:
        labels[[0, 3, 4]] = -100
    student, teacher = projected(8, 9, 4, bias=True), projected(8, 9, 6)
    objective = KDObjective(loss_of("generalized_jsd:beta=0.3", chunk_size=chunk_size), 0.6)
    assert_matches(objective, student, teacher, labels)


@pytest.mark.parametrize(
    "post",
    [
        {"logit_scale": 0.0625},
        {"softcap": 3.0},
        {"logit_scale": 2.0, "softcap": 5.0},
    ],
)
@pytest.mark.parametrize("how", FORMS)
def test_scale_and_soft_cap(post, how):
    labels = torch.randint(0, 13, (6,))
    student = projected(6, 13, 4, bias=True, **post)
    teacher = projected(6, 13, 8, logit_scale=0.5, softcap=4.0, grad=False)
    objective = KDObjective(loss_of("forward_kl", how, temperature=1.5), 0.5)
    assert_matches(objective, student, teacher, labels)


@pytest.mark.parametrize("how", FORMS)
@pytest.mark.parametrize(("student_vocab", "teacher_vocab"), [(11, 14), (14, 11)])
@pytest.mark.parametrize("form", ["logits", "projected"])
def test_padded_heads_are_cut(how, student_vocab, teacher_vocab, form):
    labels = torch.tensor([1, 10, -100, 4, 0])
    if form == "projected":
        student = projected(5, student_vocab, 4, bias=True)
        teacher = projected(5, teacher_vocab, 3, bias=True)
    else:
        student = Logits(torch.randn(5, student_vocab, requires_grad=True))
        teacher = Logits(torch.randn(5, teacher_vocab))
    for kd_ratio in (0.5, 1.0):
        assert_matches(KDObjective(loss_of("forward_kl", how), kd_ratio), student, teacher, labels)
    # Cross-entropy keeps its cut when the weight of the teacher falls to 0.
    expected = KDObjective(loss_of("forward_kl", how), 0.5)(student, teacher, labels).class_loss
    out = KDObjective(loss_of("forward_kl", how), 0.0)(student, teacher, labels)
    assert torch.equal(out.loss, expected)


@pytest.mark.parametrize("how", FORMS)
def test_d1_the_cut_is_before_the_softmax(how):
    teacher, student = torch.tensor([[1.0, 0, -1, 3, 3]]), torch.tensor([[0.5, 0.5, 0]])
    labels = torch.zeros(1, dtype=torch.int64)
    assert loss_of("forward_kl", how)(student, teacher, labels).item() == pytest.approx(
        0.170640, abs=1e-6
    )
    wide = torch.cat([student, torch.full((1, 4), 9.0)], dim=1).requires_grad_()
    loss = loss_of("forward_kl", how, vocab_size=3)(wide, teacher, labels)
    assert loss.item() == pytest.approx(0.170640, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, wide)
    assert (gradient[:, 3:] == 0).all()
    assert (gradient[:, :3] != 0).all()


@pytest.mark.parametrize("how", FORMS)
def test_a_tied_head(how):
    labels = torch.tensor([3, 1, 4])
    ids = torch.tensor([0, 5, 2])
    weight = torch.randn(8, 4, requires_grad=True)
    teacher = torch.randn(3, 8)
    out = loss_of("reverse_kl", how)(Projected(weight[ids].tanh(), weight), teacher, labels)
    (actual,) = torch.autograd.grad(out, weight)
    double = weight.detach().double().requires_grad_()
    logits = double[ids].tanh() @ double.T
    expected = get_loss("reverse_kl")(logits, teacher.double(), labels)
    assert_near(actual, torch.autograd.grad(expected, double)[0])


@pytest.mark.parametrize("how", FORMS)
@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_what_needs_a_gradient_gets_one(how, trained):
    student = projected(5, 7, 3, bias=True, grad=False)
    for i in trained:
        student.tensors[i].requires_grad_()
    teacher = projected(5, 7, 4)
    labels = torch.randint(0, 7, (5,))
    objective = KDObjective(loss_of("forward_kl", how), 0.5)
    out = objective(student, teacher, labels)
    out.loss.backward()
    _, expected = reference(objective, student, teacher, labels)
    for i, tensor in enumerate(student.tensors):
        if i in trained:
            assert_near(tensor.grad, expected[i])
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("how", FORMS)
@pytest.mark.parametrize("form", ["logits", "projected"])
def test_the_teacher_receives_no_gradient(how, form):
    labels = torch.randint(0, 7, (5,))
    student = projected(5, 7, 3)
    teacher = projected(5, 7, 4, bias=True)
    if form == "logits":
        teacher = Logits(torch.randn(5, 7, requires_grad=True))
    KDObjective(loss_of("generalized_jsd", how), 0.7)(student, teacher, labels).loss.backward()
    assert all(x.grad is None for x in teacher.tensors)
    assert student.hidden.grad.abs().sum() > 0


@pytest.mark.parametrize("how", FORMS)
def test_a_teacher_under_inference_mode(how):
    labels = torch.randint(0, 7, (5,))
    student = projected(5, 7, 3)
    weight = torch.randn(7, 4)
    with torch.inference_mode():
        hidden = torch.randn(5, 4) * 2
        logits = hidden @ weight.T
    for teacher in (Projected(hidden, weight), logits):
        loss = loss_of("generalized_jsd", how, temperature=2.0)(student, teacher, labels)
        assert all(x.isfinite().all() for x in gradients(loss, student))
    with torch.inference_mode():
        assert not loss_of("generalized_jsd", how)(student, logits, labels).requires_grad


def test_mixed_dtypes_of_teacher_and_student():
    labels = torch.randint(0, 7, (5,))
    for student_dtype in (torch.float32, torch.float64):
        for teacher_dtype in (torch.bfloat16, torch.float32, torch.float64):
            student = projected(5, 7, 3, dtype=student_dtype)
            teacher = Logits(torch.randn(5, 7).to(teacher_dtype))
            for how in FORMS:
                assert_matches(KDObjective(loss_of("forward_kl", how)), student, teacher, labels)


# Low precision.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
# The value of bild jumps where rounding changes the order of two tokens.
@pytest.mark.parametrize("name", sorted(set(NAMES) - {"bild"}))
def test_low_precision_is_no_worse_than_naive(dtype, name):
    labels = torch.randint(0, 300, (64,))
    student = projected(64, 300, 32, dtype=dtype, bias=True)
    teacher = projected(64, 300, 16, dtype=dtype, grad=False)
    objective = KDObjective(loss_of(name, chunk_size=10, temperature=2.0), 0.5)
    expected, expected_gradients = reference(objective, student, teacher, labels)

    def errors(out):
        value = abs(out.loss.item() - expected.loss.item())
        pairs = zip(gradients(out.loss, student), expected_gradients, strict=True)
        return value, [(a.double() - b).norm().item() for a, b in pairs]

    # The naive path: logits and their gradient in the low precision, everything else in float32.
    naive = KDObjective(get_loss(name, temperature=2.0), 0.5)(
        torch.nn.functional.linear(*student.tensors),
        torch.nn.functional.linear(*teacher.tensors),
        labels,
    )
    value, errors_of_gradients = errors(objective(student, teacher, labels))
    naive_value, naive_errors = errors(naive)
    eps = torch.finfo(dtype).eps
    assert value <= naive_value + 0.02 * eps * expected.loss.item()
    # The head's gradient is rounded once more: each chunk's product, then their float32 sum.
    for error, naive_error, exact, slack in zip(
        errors_of_gradients, naive_errors, expected_gradients, (1.02, 1.35, 1.02), strict=True
    ):
        assert error <= slack * naive_error
        assert error <= eps * exact.norm().item()


@pytest.mark.parametrize("form", ["logits", "projected"])
def test_float16_gradients_survive_a_large_denominator(form):
    labels = torch.randint(0, 500, (20,))
    student = projected(20, 500, 16, dtype=torch.float16)
    if form == "logits":
        student = Logits((student.hidden @ student.weight.T).detach().requires_grad_())
    teacher = projected(20, 500, 16, dtype=torch.float16)
    objective = KDObjective(loss_of("forward_kl"), 0.5)
    loss = objective(student, teacher, labels, num_tokens=10**6).loss
    scaled = gradients(loss * 2.0**16, student)
    _, expected = reference(objective, student, teacher, labels, 10**6)
    for a, b in zip(scaled, expected, strict=True):
        assert (a.double() - b * 2**16).norm() < 2e-3 * (b * 2**16).norm()


@pytest.mark.parametrize("how", FORMS)
def test_the_head_accumulates_in_float32(how):
    rows, repeats = 8, 400
    hidden = torch.ones(rows * repeats, 1, dtype=torch.bfloat16)
    weight = torch.tensor([[0.0], [1.0]], dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(rows * repeats, dtype=torch.int64)
    loss = loss_of("forward_kl", how, chunk_size=rows)(
        Projected(hidden, weight), torch.zeros(rows * repeats, 2), labels
    )
    (gradient,) = torch.autograd.grad(loss, weight)
    expected = torch.tensor([-1.0, 1.0]) * (1 / (1 + math.exp(-1)) - 0.5)
    torch.testing.assert_close(gradient[:, 0].float(), expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("how", FORMS)
@pytest.mark.parametrize("form", ["logits", "projected"])
def test_autocast_changes_nothing(how, form):
    labels = torch.randint(0, 50, (9,))
    student, teacher = projected(9, 50, 8, bias=True), projected(9, 50, 4)
    if form == "logits":
        student = Logits(torch.randn(9, 50, requires_grad=True))
    objective = KDObjective(loss_of("generalized_jsd", how, temperature=2.0))
    expected = objective(student, teacher, labels).loss
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        actual = objective(student, teacher, labels).loss
    actual_gradients = gradients(actual, student)
    assert torch.equal(actual, expected)
    for a, b in zip(actual_gradients, gradients(expected, student), strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_hidden_states_from_autocast_with_a_float32_head():
    labels = torch.randint(0, 50, (9,))
    hidden = torch.randn(9, 8).bfloat16().requires_grad_()
    student = Projected(hidden, torch.randn(50, 8, requires_grad=True))
    teacher = projected(9, 50, 4)
    assert_matches(
        KDObjective(loss_of("forward_kl")), student, teacher, labels, rtol=3e-2, atol=2e-2
    )
    loss = loss_of("forward_kl")(student, teacher, labels)
    assert [x.dtype for x in gradients(loss, student)] == [torch.bfloat16, torch.float32]


# Relations.


@pytest.mark.parametrize("how", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_row_order_and_batch_shape_change_nothing(how, name):
    labels = torch.randint(0, 10, (12,))
    labels[[2, 5]] = -100
    student, teacher = torch.randn(2, 12, 10)
    student.requires_grad_()
    loss = loss_of(name, how)
    expected = loss(student, teacher, labels)
    (expected_gradient,) = torch.autograd.grad(expected, student)
    order = torch.randperm(12)
    leaf = student.detach()[order].requires_grad_()
    actual = loss(leaf, teacher[order], labels[order])
    assert_near(actual, expected, rtol=1e-6)
    assert_near(torch.autograd.grad(actual, leaf)[0], expected_gradient[order], rtol=1e-6)
    for shape in [(3, 4), (12, 1), (1, 12), (2, 3, 2)]:
        leaf = student.detach().reshape(*shape, 10).requires_grad_()
        actual = loss(leaf, teacher.reshape(*shape, 10), labels.reshape(shape))
        assert torch.equal(actual, expected)
        (gradient,) = torch.autograd.grad(actual, leaf)
        assert torch.equal(gradient, expected_gradient.reshape(*shape, 10))


@pytest.mark.parametrize("how", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_masking_equals_dropping(how, name):
    labels = torch.randint(0, 10, (8,))
    kept = torch.tensor([0, 3, 4, 7])
    masked = torch.full_like(labels, -100)
    masked[kept] = labels[kept]
    hidden, weight = torch.randn(8, 4), torch.randn(10, 4)
    hidden[1] = math.nan  # what is masked is not looked at, whatever it holds
    hidden.requires_grad_()
    teacher = torch.randn(8, 10)
    teacher[2] = math.inf
    for make in (
        lambda rows: Projected(hidden[rows], weight),
        lambda rows: hidden[rows] @ weight.T,
    ):
        objective = KDObjective(loss_of(name, how), 0.5)
        all_rows = torch.arange(8)
        actual = objective(make(all_rows), teacher, masked)
        expected = objective(make(kept), teacher[kept], labels[kept])
        assert actual.num_tokens == expected.num_tokens == 4
        assert_near(actual.loss, expected.loss, rtol=1e-6)
        if isinstance(make(kept), Projected):
            (a,), (b,) = (torch.autograd.grad(x.loss, hidden) for x in (actual, expected))
            assert_near(a, b, rtol=1e-6)
            assert (a[[1, 2, 5, 6]] == 0).all()


@pytest.mark.parametrize("how", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_shifting_the_logits_changes_nothing(how, name):
    student, teacher = torch.randn(2, 5, 10)
    labels = torch.randint(0, 10, (5,))
    loss = loss_of(name, how, temperature=1.3)
    expected = loss(student, teacher, labels)
    actual = loss(student + torch.randn(5, 1), teacher - 3, labels)
    assert_near(actual, expected, rtol=3e-6)


@pytest.mark.parametrize("how", FORMS)
def test_another_ignore_index(how):
    student, teacher = torch.randn(2, 4, 5)
    labels = torch.tensor([1, 0, 2, 0])
    expected = loss_of("forward_kl", how)(student[[0, 2]], teacher[[0, 2]], labels[[0, 2]])
    actual = loss_of("forward_kl", how, ignore_index=0)(student, teacher, labels)
    assert_near(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("how", FORMS)
def test_inputs_need_not_be_contiguous(how):
    labels = torch.randint(0, 10, (3, 4))
    teacher = torch.randn(3, 4, 10)
    base = torch.randn(3, 4, 10)
    objective = KDObjective(loss_of("forward_kl", how))
    expected = None
    for layout in (
        base,
        base.transpose(0, 1).contiguous().transpose(0, 1),
        base.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        torch.stack([base, base], dim=2)[:, :, 0],
    ):
        leaf = layout.detach().requires_grad_()
        out = objective(leaf, teacher, labels)
        pair = out.loss, torch.autograd.grad(out.loss, leaf)[0]
        expected = expected or pair
        assert_near(pair[0], expected[0], rtol=1e-6)
        assert_near(pair[1], expected[1], rtol=1e-6)


@pytest.mark.parametrize("how", FORMS)
def test_inputs_are_not_written_to(how):
    labels = torch.randint(0, 10, (6,))
    student, teacher = projected(6, 10, 4, bias=True), projected(6, 10, 4, bias=True)
    logits = Logits(torch.randn(6, 10, requires_grad=True))
    before = [x.detach().clone() for s in (student, teacher, logits) for x in s.tensors]
    for source in (student, logits):
        KDObjective(loss_of("forward_kl", how))(source, teacher, labels).loss.backward()
        KDObjective(loss_of("forward_kl", how))(source, logits, labels).loss.backward()
    after = [x.detach() for s in (student, teacher, logits) for x in s.tensors]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# Backward.


@pytest.mark.parametrize("how", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_grad_output_scales(how, dtype):
    labels = torch.randint(0, 10, (6,))
    student, teacher = projected(6, 10, 4, dtype=dtype, bias=True), projected(6, 10, 4)
    loss = loss_of("forward_kl", how)
    once = gradients(loss(student, teacher, labels), student)
    thrice = gradients(3 * loss(student, teacher, labels), student)
    for a, b in zip(thrice, once, strict=True):
        assert_near(a, 3 * b, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("how", FORMS)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_micro_batches_add_up_to_the_whole(how, as_tensor):
    labels = torch.randint(0, 10, (9,))
    labels[[1, 8]] = -100
    student, teacher = projected(9, 10, 4), projected(9, 10, 4)
    objective = KDObjective(loss_of("skew_forward_kl", how), 0.3)
    whole = objective(student, teacher, labels)
    expected = gradients(whole.loss, student)
    total = torch.tensor(7) if as_tensor else 7
    parts = []
    for span in (slice(0, 1), slice(1, 2), slice(2, 8), slice(8, 9)):
        part = Projected(student.hidden[span], student.weight)
        out = objective(part, Projected(teacher.hidden[span], teacher.weight), labels[span], total)
        out.loss.backward()
        parts.append(out)
    assert_near(sum(x.loss for x in parts), whole.loss, rtol=1e-6)
    assert_near(sum(x.kd_loss for x in parts), whole.kd_loss, rtol=1e-6)
    assert_near(sum(x.class_loss for x in parts), whole.class_loss, rtol=1e-6)
    assert sum(x.num_tokens for x in parts) == 7
    for tensor, gradient in zip(student.tensors, expected, strict=True):
        assert_near(tensor.grad, gradient, rtol=1e-5)


@pytest.mark.parametrize("how", FORMS)
@pytest.mark.parametrize("form", ["logits", "projected"])
@pytest.mark.parametrize("rows", [4, 0])
def test_a_batch_without_supervised_tokens(how, form, rows):
    student = projected(rows, 6, 3, bias=True)
    if form == "logits":
        student = Logits(torch.randn(rows, 6, requires_grad=True))
    teacher = torch.randn(rows, 6)
    labels = torch.full((rows,), -100)
    for num_tokens in (None, 0, 5, torch.tensor(0)):
        out = KDObjective(loss_of("forward_kl", how), 0.5)(student, teacher, labels, num_tokens)
        assert out.loss.requires_grad
        assert (out.loss, out.class_loss, out.kd_loss, out.num_tokens) == (0, 0, 0, 0)
        assert all((x == 0).all() for x in gradients(out.loss, student))
    values = loss_of("forward_kl", how)(student, teacher, labels, reduction="none")
    assert torch.equal(values, torch.zeros(rows))
    assert all((x == 0).all() for x in gradients(values.sum(), student))


def test_a_double_backward_names_the_unchunked_loss():
    labels = torch.randint(0, 6, (4,))
    student, teacher = projected(4, 6, 3), torch.randn(4, 6)
    for reduction in ("mean", "none"):
        loss = loss_of("forward_kl")(student, teacher, labels, reduction=reduction).sum()
        with pytest.raises(RuntimeError, match=r"second derivative.*without '_chunked'"):
            torch.autograd.grad(loss, student.hidden, create_graph=True)
    plain = get_loss("forward_kl")(student, teacher, labels)
    (first,) = torch.autograd.grad(plain, student.hidden, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), student.hidden)
    assert second.isfinite().all()


def test_a_second_backward_is_an_error_not_a_wrong_gradient():
    labels = torch.randint(0, 6, (4,))
    student, teacher = projected(4, 6, 3), torch.randn(4, 6)
    loss = loss_of("forward_kl")(student, teacher, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"call backward once.*without '_chunked'"):
        loss.backward()


@pytest.mark.parametrize("how", FORMS)
def test_a_graph_is_made_only_where_it_is_wanted(how):
    labels = torch.randint(0, 6, (4,))
    student, teacher = projected(4, 6, 3), torch.randn(4, 6)
    objective = KDObjective(loss_of("forward_kl", how))
    with torch.no_grad():
        out = objective(student, teacher, labels)
    assert not out.loss.requires_grad
    out = objective(student, teacher, labels)
    assert out.loss.requires_grad
    assert not out.class_loss.requires_grad
    assert not out.kd_loss.requires_grad


# Weights and unreduced values.


@pytest.mark.parametrize("how", FORMS)
@pytest.mark.parametrize("form", ["logits", "projected"])
@pytest.mark.parametrize("name", NAMES)
def test_unreduced_values(how, form, name):
    labels = torch.tensor([[1, -100, 3, 0], [5, 5, -100, 2]])
    student = projected((2, 4), 6, 3, bias=True)
    if form == "logits":
        student = Logits(torch.randn(2, 4, 6, requires_grad=True))
    teacher = torch.randn(2, 4, 6)
    upstream = torch.randn(2, 4)
    power = POWERS[name]
    loss = loss_of(name, how, temperature=2.0)
    values = loss(student, teacher, labels, reduction="none")
    leaves, logits = doubled(student)
    expected = oracles.rows(name, teacher, logits.detach(), 2.0, labels.clamp_min(0)) * 2**power
    expected[labels.cpu().numpy() == -100] = 0
    assert_near(values, torch.tensor(expected))
    double = get_loss(name, temperature=2.0)(logits, teacher.double(), labels, reduction="none")
    expected_gradients = torch.autograd.grad((double * upstream).sum(), leaves)
    actual = gradients((values * upstream).sum(), student)
    for a, b in zip(actual, expected_gradients, strict=True):
        assert_near(a, b)


def test_unreduced_values_may_be_differentiated_twice_over():
    labels = torch.randint(0, 6, (4,))
    student, teacher = projected(4, 6, 3), torch.randn(4, 6)
    values = loss_of("forward_kl")(student, teacher, labels, reduction="none")
    first = torch.autograd.grad(values[0], student.hidden, retain_graph=True)[0]
    second = torch.autograd.grad(values[1], student.hidden)[0]
    assert (first[1:] == 0).all()
    assert (first[0] != 0).all()
    assert (second[[0, 2, 3]] == 0).all()


@pytest.mark.parametrize("how", FORMS)
@pytest.mark.parametrize("form", ["logits", "projected"])
def test_token_weights(how, form):
    labels = torch.tensor([1, -100, 3, 0, 5])
    student = projected(5, 6, 3, bias=True)
    if form == "logits":
        student = Logits(torch.randn(5, 6, requires_grad=True))
    teacher = torch.randn(5, 6)
    weights = torch.tensor([0.5, 3.0, 0.0, -1.0, 2.0], requires_grad=True)
    loss = loss_of("forward_kl", how, temperature=2.0)
    keep = labels != -100
    kd = 4 * torch.tensor(oracles.rows("forward_kl", teacher, doubled(student)[1].detach(), 2.0))
    kd = torch.where(keep, kd, 0)
    value = loss(student, teacher, labels, token_weights=weights)
    assert_near(value, (kd * weights).sum() / 4)
    value.backward()
    assert_near(weights.grad, kd / 4)
    leaves, logits = doubled(student)
    double = get_loss("forward_kl", temperature=2.0)
    per_token = double(logits, teacher.double(), labels, reduction="none")
    expected = torch.autograd.grad((per_token * weights.detach()).sum() / 4, leaves)
    for tensor, gradient in zip(student.tensors, expected, strict=True):
        assert_near(tensor.grad, gradient)
    weights.grad = None
    unreduced = loss(student, teacher, labels, token_weights=weights, reduction="none")
    assert_near(unreduced, kd * weights)
    unreduced.sum().backward()
    assert_near(weights.grad, kd)


@pytest.mark.parametrize("how", FORMS)
def test_token_weights_of_the_objective(how):
    labels = torch.tensor([1, -100, 3, 0, 5])
    student, teacher = projected(5, 6, 3), projected(5, 6, 3)
    weights = torch.tensor([0.5, 3.0, 0.0, -1.0, 2.0], requires_grad=True)
    objective = KDObjective(loss_of("reverse_kl", how), 0.3)
    out = objective(student, teacher, labels, token_weights=weights)
    logits, teacher_logits = doubled(student)[1].detach(), doubled(teacher)[1].detach()
    kd = torch.tensor(oracles.rows("reverse_kl", teacher_logits, logits))
    ce = torch.tensor(oracles.cross_entropy(logits, labels.clamp_min(0)))
    keep = labels != -100
    row = torch.where(keep, 0.3 * kd + 0.7 * ce, 0)
    assert_near(out.loss, (row * weights).sum() / 4)
    assert_near(out.kd_loss, torch.where(keep, kd * weights, 0).sum() / 4)
    assert_near(out.class_loss, torch.where(keep, ce * weights, 0).sum() / 4)
    out.loss.backward()
    assert_near(weights.grad, row / 4)


@pytest.mark.parametrize("how", FORMS)
def test_a_weight_of_zero_silences_an_infinite_row(how):
    student = torch.tensor([[-math.inf, 0.0, 1.0], [0.0, 1.0, 2.0]], requires_grad=True)
    teacher = torch.zeros(2, 3)
    labels = torch.tensor([0, 1])
    weights = torch.tensor([0.0, 1.0], requires_grad=True)
    loss = loss_of("forward_kl", how)
    expected = loss(student[1:], teacher[1:], labels[1:]).item() / 2
    values = loss(student, teacher, labels, token_weights=weights, reduction="none")
    assert values.tolist() == [0.0, pytest.approx(2 * expected)]
    assert loss(student, teacher, labels, token_weights=weights).item() == pytest.approx(expected)
    for kd_ratio in (0.0, 0.5, 1.0):
        out = KDObjective(loss, kd_ratio)(student, teacher, labels, token_weights=weights)
        assert out.loss.isfinite()
        assert out.class_loss.isfinite()
        for gradient in torch.autograd.grad(out.loss, (student, weights)):
            assert not gradient.isnan().any()


# The objective.


@pytest.mark.parametrize("how", FORMS)
def test_kd_ratio_one_reports_cross_entropy_without_using_it(how):
    student = torch.tensor([[-math.inf, 0.0, 1.0], [0.0, 1.0, 2.0]], requires_grad=True)
    teacher = torch.tensor([[-math.inf, 0.5, 0.2], [0.0, 1.0, 0.0]])
    labels = torch.tensor([0, 1])  # the first label is impossible: CE is infinite
    out = KDObjective(loss_of("forward_kl", how), 1.0)(student, teacher, labels)
    expected = oracles.objective("forward_kl", teacher, student.detach(), labels)
    assert out.loss.item() == pytest.approx(expected, rel=1e-5)
    assert out.kd_loss.item() == pytest.approx(expected, rel=1e-5)
    assert out.class_loss.item() == math.inf
    (gradient,) = torch.autograd.grad(out.loss, student)
    assert gradient.isfinite().all()
    assert gradient[0, 1] != 0


@pytest.mark.parametrize("how", FORMS)
def test_kd_ratio_zero_never_looks_at_the_teacher(how):
    student = projected(4, 6, 3)
    labels = torch.randint(0, 6, (4,))
    objective = KDObjective(loss_of("forward_kl", how), 0.0)
    expected = oracles.cross_entropy(doubled(student)[1].detach(), labels).mean()
    for teacher in (None, torch.full((4, 6), math.nan)):
        out = objective(student, teacher, labels)
        assert out.kd_loss is None
        assert out.loss.item() == pytest.approx(expected, rel=1e-6)
        assert out.class_loss.item() == out.loss.item()
        assert all(x.isfinite().all() for x in gradients(out.loss, student))


def test_kd_ratio_is_checked_and_may_change():
    loss = loss_of("forward_kl")
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="kd_ratio"):
            KDObjective(loss, wrong)
    objective = KDObjective(loss, 0.0)
    student, teacher, labels = torch.randn(3, 5), torch.randn(3, 5), torch.tensor([0, 1, 2])
    assert objective(student, teacher, labels).kd_loss is None
    objective.kd_ratio = 0.25
    out = objective(student, teacher, labels)
    assert out.loss.item() == pytest.approx((0.75 * out.class_loss + 0.25 * out.kd_loss).item())
    with pytest.raises(ValueError, match="teacher"):
        objective(student, None, labels)


def test_measures_are_sums_at_temperature_one():
    labels = torch.tensor([1, -100, 3, 0, 5])
    keep = [0, 2, 3, 4]
    student, teacher = projected(5, 6, 3), projected(5, 6, 3)
    p, q = doubled(teacher)[1].detach()[keep], doubled(student)[1].detach()[keep]
    for how in FORMS:
        loss = loss_of("total_variation", how, temperature=2.0)
        with torch.no_grad():
            result = measure(loss, student, teacher, labels, compiled=False)
        assert result.num_tokens == 4
        assert result.cross_entropy.item() == pytest.approx(
            oracles.cross_entropy(q, labels[keep]).sum(), rel=1e-6
        )
        expected = 2 * oracles.rows("total_variation", p, q, 2.0).sum()
        assert result.kd.item() == pytest.approx(expected, rel=1e-6)
        for name in ("forward_kl", "reverse_kl"):
            expected = oracles.rows(name, p, q).sum()
            assert getattr(result, name).item() == pytest.approx(expected, rel=1e-5)
        assert result.top1_agreement.item() == (p.argmax(-1) == q.argmax(-1)).sum()
        alone = measure(loss, student, None, labels, compiled=False)
        assert alone.cross_entropy == result.cross_entropy
        assert torch.equal(alone.calibration, result.calibration)
        assert alone.kd is None
        assert alone.forward_kl is None
    empty = measure(loss, student, teacher, torch.full((5,), -100), compiled=False)
    assert (empty.num_tokens, empty.cross_entropy, empty.kd) == (0, 0, 0)


# Memory.


class Watch(TorchDispatchMode):
    """Notes every tensor that is made, and the peak of the bytes alive at once."""

    def __init__(self, *known):
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.made = []
        self.alive = self.peak = 0
        self._live = {}

    def _drop(self, key, size):
        self.alive -= size
        self._live.pop(key, None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if not isinstance(x, torch.Tensor):
                continue
            storage = x.untyped_storage()
            if storage.data_ptr() in self.known or storage._cdata in self._live:
                continue
            self.made.append(x.shape)
            size = storage.nbytes()
            self.alive += size
            self.peak = max(self.peak, self.alive)
            self._live[storage._cdata] = weakref.finalize(storage, self._drop, storage._cdata, size)
        return result


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_tensor_of_rows_by_vocabulary_is_made(frozen, reduction):
    rows, vocab, width, chunk = 120, 200, 16, 10
    student, teacher = projected(rows, vocab, width), projected(rows, vocab, width, grad=False)
    student.weight.requires_grad_(not frozen)
    labels = torch.randint(0, vocab, (rows,))
    labels[::5] = -100
    loss = loss_of("generalized_jsd", chunk_size=chunk, temperature=2.0)
    inputs = [*student.tensors, *teacher.tensors, labels]
    with Watch(*inputs) as watch:
        loss(student, teacher, labels, reduction=reduction).sum().backward()
    sizes = sorted(shape.numel() for shape in watch.made)
    assert watch.made
    assert sizes[-1] == max(chunk * vocab, 96 * width, 0 if frozen else vocab * width, 120 * width)
    heads = [shape for shape in watch.made if shape == (vocab, width)]
    assert bool(heads) != frozen
    assert student.hidden.grad is not None
    assert (student.weight.grad is None) == frozen
    with Watch(*inputs) as watch, torch.no_grad():
        measure(loss, student, teacher, labels, compiled=False)
    assert max(shape.numel() for shape in watch.made) <= chunk * vocab


def test_the_watch_sees_the_plain_evaluation():
    rows, vocab = 20, 30
    student, teacher = projected(rows, vocab, 4), projected(rows, vocab, 4)
    labels = torch.randint(0, vocab, (rows,))
    with Watch(*student.tensors, *teacher.tensors, labels) as watch:
        get_loss("forward_kl")(student, teacher, labels).backward()
    assert max(shape.numel() for shape in watch.made) >= rows * vocab


MEMORY = """
import resource, sys, torch
from kdlosses import KDObjective, Projected, get_loss
rows, vocab, width = int(sys.argv[2]), 8192, 16
make = lambda: Projected(torch.randn(rows, width, requires_grad=True), torch.randn(vocab, width))
student, teacher, labels = make(), make(), torch.zeros(rows, dtype=torch.int64)
plain = sys.argv[1] == "plain"
options = {} if plain else {"chunk_size": 64, "compiled": False}
objective = KDObjective(get_loss("forward_kl" + ("" if plain else "_chunked"), **options))
def run(n):
    cut = lambda s: Projected(s.hidden[:n], s.weight)
    objective(cut(student), cut(teacher), labels[:n]).loss.backward()
run(256)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(rows)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
def test_peak_memory_is_bounded_by_the_chunk():
    def growth(how, rows):
        result = subprocess.run(
            [sys.executable, "-c", MEMORY, how, str(rows)],
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
        return float(result.stdout)

    logits_mib = 2048 * 8192 * 4 / 2**20
    assert growth("plain", 2048) > 3 * logits_mib
    assert growth("chunked", 8192) < logits_mib  # four times the tokens


# Errors.


def test_wrong_inputs_are_named():
    labels = torch.tensor([0, 1, 2])
    logits = torch.randn(3, 5)
    for how in FORMS:
        loss = loss_of("forward_kl", how)
        with pytest.raises(ValueError, match=r"student.*\[2\].*\[3\]"):
            loss(logits[:2], logits, labels)
        with pytest.raises(ValueError, match=r"teacher.*\[2\].*\[3\]"):
            loss(logits, logits[:2], labels)
        with pytest.raises(ValueError, match="token 5 is outside the vocabulary of 5"):
            loss(logits, logits, torch.tensor([0, 5, 1]))
        with pytest.raises(ValueError, match="token -1 is outside"):
            loss(logits, logits, torch.tensor([0, -1, 1]))
        with pytest.raises(ValueError, match="token 4 is outside the vocabulary of 4"):
            loss(logits, logits[:, :4], torch.tensor([0, 4, 1]))
        with pytest.raises(TypeError, match=r"student.*list"):
            loss(logits.tolist(), logits, labels)
        with pytest.raises(TypeError, match=r"teacher.*NoneType"):
            loss(logits, None, labels)
        with pytest.raises(TypeError, match="floating-point"):
            loss(labels[:, None], logits, labels)
        with pytest.raises(ValueError, match="reduction"):
            loss(logits, logits, labels, reduction="sum")
        with pytest.raises(ValueError, match="num_tokens"):
            loss(logits, logits, labels, 3, reduction="none")
        with pytest.raises(ValueError, match="token_weights"):
            loss(logits, logits, labels, token_weights=torch.ones(2))


def test_a_projection_whose_shapes_do_not_fit():
    with pytest.raises(ValueError, match="hidden has width 3 but weight expects 4"):
        Projected(torch.randn(2, 3), torch.randn(5, 4))
    with pytest.raises(ValueError, match=r"bias.*\[4\].*\[5\]"):
        Projected(torch.randn(2, 3), torch.randn(5, 3), torch.randn(4))
    with pytest.raises(ValueError, match="expected hidden"):
        Projected(torch.randn(2, 3), torch.randn(3))
    with pytest.raises(TypeError, match="weight"):
        Projected(torch.randn(2, 3), torch.ones(5, 3, dtype=torch.int8))


# Properties.


@st.composite
def problems(draw):
    rows = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
    count = int(np.prod(rows))
    vocab = draw(st.integers(2, 12))
    post = st.fixed_dictionaries(
        {"logit_scale": st.sampled_from([1.0, 0.25]), "softcap": st.sampled_from([None, 3.0])}
    )
    return {
        "rows": tuple(rows),
        "labels": draw(
            st.lists(
                st.one_of(st.integers(0, vocab - 1), st.just(-100)), min_size=count, max_size=count
            )
        ),
        "vocab": (vocab, vocab + draw(st.integers(0, 3))),
        "swap": draw(st.booleans()),
        "widths": draw(st.tuples(st.integers(1, 5), st.integers(1, 5))),
        "posts": (draw(post), draw(post)),
        "biases": draw(st.tuples(st.booleans(), st.booleans())),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
        "which": draw(st.sampled_from(SPECS)),
        "how": draw(st.sampled_from(FORMS)),
        "chunk_size": draw(st.one_of(st.none(), st.integers(1, count + 1))),
        "temperature": draw(st.sampled_from([0.5, 1.0, 2.0, 4.0])),
        "scaling": draw(st.booleans()),
        "kd_ratio": draw(st.sampled_from([0.1, 0.5, 1.0])),
        "num_tokens": draw(st.sampled_from([None, 1, 100])),
        "seed": draw(st.integers(0, 2**16)),
    }


@given(problems())
def test_any_problem_matches_the_oracle(problem):
    torch.manual_seed(problem["seed"])
    labels = torch.tensor(problem["labels"], dtype=torch.int64).reshape(problem["rows"])
    vocabs = problem["vocab"][::-1] if problem["swap"] else problem["vocab"]
    student, teacher = (
        projected(
            problem["rows"],
            vocabs[i],
            problem["widths"][i],
            dtype=problem["dtype"],
            bias=problem["biases"][i],
            **problem["posts"][i],
        )
        for i in range(2)
    )
    name, parameters = problem["which"]
    loss = loss_of(
        spec(name, parameters),
        problem["how"],
        problem["chunk_size"],
        temperature=problem["temperature"],
        temperature_scaling=problem["scaling"],
    )
    objective = KDObjective(loss, problem["kd_ratio"])
    # Equal distributions may come up, where float32 can only be right in absolute terms.
    double = problem["dtype"] == torch.float64
    tolerance = {"rtol": 1e-10, "atol": 1e-10, "floor": 1e-13} if double else {"floor": 1e-6}
    assert_matches(objective, student, teacher, labels, problem["num_tokens"], **tolerance)
    power = POWERS[name] if problem["scaling"] else 0
    expected = oracles.objective(
        name,
        *(doubled(x)[1].detach()[..., : problem["vocab"][0]] for x in (teacher, student)),
        labels,
        kd_ratio=problem["kd_ratio"],
        temperature=problem["temperature"],
        power=power,
        divisor=problem["num_tokens"],
        **parameters,
    )
    actual = objective(student, teacher, labels, problem["num_tokens"]).loss.item()
    assert actual == pytest.approx(expected, rel=1e-5, abs=1e-6)
