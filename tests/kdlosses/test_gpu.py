"""What makes sense on a GPU only: memory of compiled tiles, 16-bit gradients, scaler, streams."""

import oracles
import pytest
import torch
from oracles import NAMES

from kdlosses import KDObjective, Projected, get_loss

pytestmark = pytest.mark.gpu

VOCAB, WIDTH = 32768, 256


def problem(rows, dtype=torch.float32, vocab=VOCAB):
    """A student whose hidden states and head need gradients, a teacher, labels."""
    student = Projected(
        torch.randn(rows, WIDTH, dtype=dtype).requires_grad_(),
        torch.randn(vocab, WIDTH, dtype=dtype).mul_(WIDTH**-0.5).requires_grad_(),
    )
    teacher = Projected(
        torch.randn(rows, 2 * WIDTH, dtype=dtype),
        torch.randn(vocab, 2 * WIDTH, dtype=dtype).mul_((2 * WIDTH) ** -0.5),
    )
    return student, teacher, torch.randint(vocab, (rows,))


def peak_bytes(objective, rows):
    """Memory that a step takes beyond its inputs and the gradient of the hidden states."""
    student, teacher, labels = problem(rows, torch.bfloat16)
    for _ in range(2):  # the first one compiles
        student.hidden.grad = student.weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        objective(student, teacher, labels).loss.backward()
    torch.cuda.synchronize()
    gradient = student.hidden.numel() * student.hidden.element_size()
    return torch.cuda.max_memory_allocated() - before - gradient


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forward_kl", "generalized_jsd", "adaptive_kl"])
def test_memory_of_compiled_tiles_is_flat_in_tokens(name):
    objective = KDObjective(get_loss(f"{name}_chunked", chunk_size=512, compiled=True))
    few, many = peak_bytes(objective, 2048), peak_bytes(objective, 8192)
    logits = 512 * VOCAB * 4
    assert many - few < 0.05 * logits  # 6,144 more rows have 12 chunks of logits more


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_16_bit_gradients_are_right_to_their_rounding(name, dtype):
    student, teacher, labels = problem(96, dtype, vocab=2048)
    objective = KDObjective(get_loss(f"{name}_chunked", chunk_size=32), 0.5)
    # As in training, the loss is scaled in float16, where its gradients would underflow.
    scale = 96.0 if dtype == torch.float16 else 1.0
    found = torch.autograd.grad(objective(student, teacher, labels).loss * scale, student.tensors)
    exact = [x.detach().double().requires_grad_() for x in student.tensors]
    plain = KDObjective(get_loss(name), 0.5)
    loss = plain(Projected(*exact), Projected(*(x.double() for x in teacher.tensors)), labels).loss
    logits = [
        (x.hidden.detach().double() @ x.weight.detach().double().T) for x in (teacher, student)
    ]
    assert loss.item() == pytest.approx(
        oracles.objective(name, *logits, labels, kd_ratio=0.5), rel=1e-9
    )
    for gradient, target in zip(found, torch.autograd.grad(loss, exact), strict=True):
        error = (gradient.double() / scale - target).norm() / target.norm()
        assert error < 4 * torch.finfo(dtype).eps


def test_autocast_and_the_scaler_give_the_gradients_without_them():
    layer = torch.nn.Linear(WIDTH, WIDTH)
    head = torch.randn(VOCAB, WIDTH).mul_(WIDTH**-0.5).requires_grad_()
    inputs, teacher = torch.randn(64, WIDTH), torch.randn(64, VOCAB)
    labels = torch.randint(VOCAB, (64,))
    objective = KDObjective(get_loss("reverse_kl_chunked"), 0.5)
    parameters = [layer.weight, head]

    def gradients(enabled):
        scaler = torch.amp.GradScaler("cuda", enabled=enabled)
        optimizer = torch.optim.SGD(parameters, lr=0.0)
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16, enabled=enabled):
            hidden = layer(inputs)
            assert hidden.dtype == (torch.float16 if enabled else torch.float32)
            loss = objective(Projected(hidden, head), teacher, labels).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        return [parameter.grad.clone() for parameter in parameters]

    for scaled, plain in zip(gradients(True), gradients(False), strict=True):
        assert scaled.isfinite().all()
        assert (scaled - plain).norm() < 1e-2 * plain.norm()


def test_a_step_on_another_stream_gives_the_same():
    student, teacher, labels = problem(1024)
    objective = KDObjective(get_loss("forward_kl_chunked", chunk_size=128), 0.5)

    def step():
        loss = objective(student, teacher, labels).loss
        return torch.stack([loss.detach()]), *torch.autograd.grad(loss, student.tensors)

    expected = step()
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    found = []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found.append(step())
    for stream, results in zip(streams, found, strict=True):
        torch.cuda.current_stream().wait_stream(stream)
        for ours, target in zip(results, expected, strict=True):
            torch.testing.assert_close(ours, target, rtol=1e-5, atol=1e-7)
