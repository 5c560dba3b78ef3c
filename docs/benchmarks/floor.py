"""Time of a loss as a ratio to its four bare matrix products, interleaved in one process.

    python docs/benchmarks/floor.py LOSS [LOSS ...] [--rounds 5] [--tokens 2048] [--threads 2]
           [--vocabulary 49152] [--student-width 576] [--teacher-width 960]

A quarter of the tokens is masked. The floor is what no implementation can avoid: student and
teacher projection, and the gradients of hidden states and head, on the supervised tokens.
Prints, as CSV, the median over rounds of seconds, and of the ratio to the floor of the same round.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import kdlosses

parser = argparse.ArgumentParser()
parser.add_argument("losses", nargs="+")
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--tokens", type=int, default=2048)
parser.add_argument("--vocabulary", type=int, default=49152)
parser.add_argument("--student-width", type=int, default=576)
parser.add_argument("--teacher-width", type=int, default=960)
parser.add_argument("--threads", type=int, default=2)
options = parser.parse_args()
torch.manual_seed(0)
torch.set_num_threads(options.threads)


def head(width: int) -> torch.Tensor:
    """A random output projection."""
    return torch.randn(options.vocabulary, width) * width**-0.5


hidden = torch.randn(options.tokens, options.student_width).requires_grad_()
weight = head(options.student_width).requires_grad_()
teacher_hidden = torch.randn(options.tokens, options.teacher_width)
teacher_weight = head(options.teacher_width)
labels = torch.randint(0, options.vocabulary, (options.tokens,))
labels[: options.tokens // 4] = -100


def floor() -> None:
    """The four products on the supervised rows."""
    kept = labels != -100
    states, projection = hidden.detach()[kept], weight.detach()
    student_logits = states @ projection.t()
    teacher_hidden[kept] @ teacher_weight.t()
    hidden.grad = torch.zeros_like(hidden)
    hidden.grad[kept] = student_logits @ projection
    weight.grad = student_logits.t() @ states


def evaluate(spec: str) -> Callable[[], None]:
    """One step of a loss, forward and backward."""
    objective = kdlosses.KDObjective(kdlosses.get_loss(spec), kd_ratio=0.5)

    def step() -> None:
        student = kdlosses.Projected(hidden, weight)
        teacher = kdlosses.Projected(teacher_hidden, teacher_weight)
        objective(student, teacher, labels).loss.backward()

    return step


def seconds(step: Callable[[], None]) -> float:
    """Wall-clock time of a step."""
    hidden.grad = weight.grad = None
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


steps = {spec: evaluate(spec) for spec in options.losses}
first = {spec: seconds(step) for spec, step in steps.items()}  # compiles
floors: list[float] = []
taken: dict[str, list[float]] = {spec: [] for spec in steps}
for _ in range(options.rounds):
    floors.append(seconds(floor))
    for spec, step in steps.items():
        taken[spec].append(seconds(step))
print("loss,first_call_s,median_s,ratio_to_floor")
print(f"floor,,{statistics.median(floors):.3f},1.00")
for spec, values in taken.items():
    ratios = [value / base for value, base in zip(values, floors, strict=True)]
    print(
        f'"{spec}",{first[spec]:.1f},{statistics.median(values):.3f},{statistics.median(ratios):.2f}'
    )
