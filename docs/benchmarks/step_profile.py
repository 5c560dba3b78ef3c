"""What one training step spends its time on.

    python docs/benchmarks/step_profile.py --teacher DIR --student DIR --data FILE [kdrun's options]

Trains a few steps as ``kdrun`` does, then counts the operations of one, profiles it, and compares
both with the rate of a bare matrix product on this machine. Prints a table.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from kdrun import DistillTrainer
from kdrun.cli import main

WARM_UP, TIMED = 3, 4
PARTS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmm_"),
    "attention": ("aten::_scaled_dot_product",),
    "loss between the products (compiled)": ("Torch-Compiled Region", "## Call CompiledFxGraph"),
    "optimiser and clipping": ("Optimizer.step", "aten::_foreach", "aten::_fused_adam"),
}


def product_rate() -> float:
    """Floating-point operations a second of a large matrix product, the best of ten."""
    a, b = torch.randn(1024, 2048), torch.randn(2048, 2048)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * 1024 * 2048 * 2048 / best


class Watch(TrainerCallback):
    """Times some steps, counts the operations of the next and profiles the one after."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.tokens: list[int] = []
        self.counter = FlopCounterMode(display=False)
        self.profile = profile(activities=[ProfilerActivity.CPU])
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Opens what the coming step is for."""
        if state.global_step == WARM_UP + TIMED:
            torch.compiler.set_stance("force_eager")  # the counter sees no compiled operations
            self.counter.__enter__()
        elif state.global_step == WARM_UP + TIMED + 1:
            self.profile.__enter__()
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes it; the number of the step has moved on."""
        seconds = time.perf_counter() - self._start
        if WARM_UP < state.global_step <= WARM_UP + TIMED:
            self.times.append(seconds)
        elif state.global_step == WARM_UP + TIMED + 1:
            self.counter.__exit__(None, None, None)
            torch.compiler.set_stance("default")
        elif state.global_step == WARM_UP + TIMED + 2:
            self.profile.__exit__(None, None, None)


def part_of(name: str) -> str:
    """The part of a step that an event belongs to."""
    for part, prefixes in PARTS.items():
        if name.startswith(prefixes):
            return part
    return "all else (norms, activations, embeddings, copies, Python)"


def report(watch: Watch, rate: float) -> None:
    """Prints the table."""
    spent = Counter[str]()
    for event in watch.profile.key_averages():
        spent[part_of(event.key)] += event.self_cpu_time_total / 1e6
    operations = watch.counter.get_total_flops()
    step = sorted(watch.times)[len(watch.times) // 2]
    profiled = sum(spent.values())
    print(f"\n{torch.get_num_threads()} threads, product rate {rate / 1e9:.0f} GFLOP/s")
    print(f"a step: {step:.2f} s (median of {len(watch.times)}), {operations / 1e9:.0f} GFLOP")
    print(f"at the product rate: {operations / rate:.2f} s, {operations / rate / step:.0%} of it")
    for part, seconds in spent.most_common():
        print(f"  {part:58s} {seconds / profiled:5.1%}")


if __name__ == "__main__":
    watch = Watch()
    build = DistillTrainer.__init__

    def build_watched(self: Any, *arguments: Any, **options: Any) -> None:
        """The trainer with one more callback."""
        build(self, *arguments, **options)
        self.add_callback(watch)

    DistillTrainer.__init__ = build_watched  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        steps = str(WARM_UP + TIMED + 2)
        sys.argv[1:] += ["--max-steps", steps, "--output", f"{folder}/run"]
        try:
            main()
        except SystemExit as stop:
            if stop.code:
                raise
    report(watch, product_rate())
