"""The measured process: one implementation at one size, run one step at a time.

It communicates over a pipe and blocks between steps, so that the timed implementation has the
machine to itself, and memory of one implementation does not affect another.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrun.bench import memory
from kdrun.bench.cases import CHUNKED, FLOOR, PLAIN, Case
from kdrun.bench.peers import PEERS
from kdrun.bench.plan import respell

if TYPE_CHECKING:
    from torch import Tensor

    from kdlosses import KDOutput
    from kdrun.bench.exact import GradientErrors
    from kdrun.bench.inputs import Inputs

LOG = "log.txt"
TIME, PEAK, ERROR = "time", "peak", "error"
"""A request to a worker: the time, the peak memory or the gradient's error of a step."""

_M_MMAP_THRESHOLD, _BLOCK_HANDED_BACK = -3, 64 * 2**10
_SAMPLE_SECONDS = 0.002
_ROWS_TRIED = 64


@dataclass(frozen=True)
class Ready:
    """The worker has warmed up.

    Attributes:
        first_call_s: seconds of the first step, which compiles with an empty cache.
        loss: value of the step.
        hidden_grad_norm: L2 norm of the gradient of the hidden states.
        weight_grad_norm: L2 norm of the gradient of the head.
        chunk_size: rows per chunk of the chunked evaluation.
        threads: threads of torch.
        device: name of the accelerator; None on a CPU.
        warnings: first lines of the library's warnings.
    """

    first_call_s: float
    loss: float
    hidden_grad_norm: float
    weight_grad_norm: float
    chunk_size: int | None
    threads: int
    device: str | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Refused:
    """The step would not fit into memory."""

    reason: str


@dataclass(frozen=True)
class Broken:
    """The worker raised an exception."""

    reason: str


def serve(connection: Connection, case: Case, folder: Path) -> None:
    """Run the process: warm up, then run one step for each request.

    Args:
        connection: sends :class:`Ready`, then an answer to each request; or :class:`Refused` or
            :class:`Broken`, after which the process ends.
        case: the case to measure.
        folder: folder of this process, for compiler caches and output.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    _isolate(folder)
    try:
        memory.prefer_as_victim()
        reason = memory.lacking(memory.inputs_and_gradients(case), case.settings.device)
        if reason is None:
            bench = _Bench(case)
            reason = bench.lacking()
        if reason is not None:
            connection.send(Refused(reason))
            return
        connection.send(bench.warm_up())
        while True:
            answers = {TIME: bench.seconds, PEAK: bench.peak, ERROR: bench.gradient_errors}
            connection.send(answers[connection.recv()]())
    except EOFError:
        return  # the parent closed the pipe
    except Exception as error:
        text = " ".join(str(error).split("\n\n", 1)[0].split())
        connection.send(Broken(f"{type(error).__name__}: {text}"))


def _isolate(folder: Path) -> None:
    """Use an empty compiler cache, and redirect the output of libraries."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)


class _Bench:
    """The step of a case and its measurement."""

    def __init__(self, case: Case) -> None:
        import torch

        from kdrun.bench.inputs import make_inputs

        settings = case.settings
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self._case = case
        self._cuda = settings.device == "cuda"
        self._inputs = make_inputs(settings, case.point)
        self._chunk_size = _chunk_size(case)
        # Warnings for the report: about parameters here, about the compiler in the first step.
        with warnings.catch_warnings(record=True) as self._caught:
            warnings.simplefilter("default")
            self._step = _make_step(case, self._inputs, self._chunk_size)

    def lacking(self) -> str | None:
        """Why a step that keeps the logits of all rows does not fit; None if it fits.

        The number of logit-sized tensors that autograd keeps depends on the loss (12 to 50), so it
        is measured on a few rows. Other implementations need little memory and are not checked.
        """
        peer = PEERS.get(self._case.implementation)
        stores_logits = self._case.implementation == PLAIN or (peer and peer.stores_logits)
        rows = self._case.point.supervised
        if not stores_logits or rows <= 4 * _ROWS_TRIED:
            return None
        few = self._inputs.last(_ROWS_TRIED)
        peak = self._peak_of(_make_step(self._case, few, self._chunk_size))
        if peak is None:
            return None
        gradient = memory.head_gradient(self._case)
        needed = gradient + (peak - gradient) * rows / _ROWS_TRIED
        return memory.lacking(needed, self._case.settings.device)

    def warm_up(self) -> Ready:
        """Run the first step, which compiles, and a second one for the results."""
        import torch

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            first = self.seconds()
        value = float(self._step())
        hidden, weight = (
            _norm(tensor.grad) / _loss_scale(self._case)
            for tensor in (self._inputs.hidden, self._inputs.weight)
        )
        self._clear()
        ours = self._case.implementation in (PLAIN, CHUNKED)
        heard = [*self._caught, *caught]
        return Ready(
            first_call_s=first,
            loss=value,
            hidden_grad_norm=hidden,
            weight_grad_norm=weight,
            chunk_size=self._chunk_size,
            threads=torch.get_num_threads(),
            device=torch.cuda.get_device_name() if self._cuda else None,
            warnings=tuple(dict.fromkeys(map(_first_line, heard))) if ours else (),
        )

    def seconds(self) -> float:
        """Time of one step."""
        self._clear()
        if not self._cuda:
            start = time.perf_counter()
            self._step()
            return time.perf_counter() - start
        import torch

        begin: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        begin.record()
        self._step()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    def peak(self) -> float | None:
        """Peak memory of a step beyond the memory before it, in MiB; None if unknown."""
        if not self._cuda:
            _return_freed_memory()
        peak = self._peak_of(self._step)
        return None if peak is None else peak / 2**20

    def gradient_errors(self) -> GradientErrors | None:
        """Errors of the gradients of a step against float64; None if that does not fit."""
        from kdrun.bench.exact import bytes_needed, gradient_errors

        self._clear()
        if memory.lacking(bytes_needed(self._case), self._case.settings.device) is not None:
            return None
        self._step()
        hidden, weight = self._inputs.hidden.grad, self._inputs.weight.grad
        assert hidden is not None, "a step has gradients"
        assert weight is not None, "a step has gradients"
        self._clear()
        scale = _loss_scale(self._case)
        return gradient_errors(self._case, self._inputs, hidden / scale, weight / scale)

    def _peak_of(self, step: Callable[[], Tensor]) -> int | None:
        """Peak memory of a step beyond the memory before it, in bytes."""
        self._clear()
        if not self._cuda:
            return _resident_peak(step)
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - base

    def _clear(self) -> None:
        self._inputs.hidden.grad = self._inputs.weight.grad = None
        gc.collect()


def _norm(gradient: Tensor | None) -> float:
    import torch

    if gradient is None:
        return 0.0
    # Squares of small 16-bit values would underflow.
    return float(torch.linalg.vector_norm(gradient, dtype=torch.float32))


def _loss_scale(case: Case) -> float:
    """The loss scale; float16 gradients of a mean underflow and are scaled as in training."""
    return float(case.point.supervised) if case.settings.dtype == "float16" else 1.0


def _chunk_size(case: Case) -> int | None:
    """Rows per chunk of the chunked evaluation, given or chosen as in training."""
    if case.implementation != CHUNKED:
        return None
    import torch

    from kdlosses import automatic_chunk_size

    settings = case.settings
    return settings.chunk_size or automatic_chunk_size(
        case.point.vocab, settings.student_width, torch.device(settings.device)
    )


def _make_step(case: Case, inputs: Inputs, chunk_size: int | None) -> Callable[[], Tensor]:
    """Create the forward and backward step of a case, which returns the loss."""
    if case.implementation == FLOOR:
        return _floor(inputs)
    if case.implementation in PEERS:
        forward = PEERS[case.implementation].make(case.beta, case.settings.kd_ratio)
    else:
        forward = _ours(case, chunk_size)
    scale = _loss_scale(case)

    def step() -> Tensor:
        loss = forward(inputs)
        (loss if scale == 1 else loss * scale).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    return step


def _ours(case: Case, chunk_size: int | None) -> Callable[[Inputs], Tensor]:
    from kdlosses import KDObjective, Projected, get_loss

    spec = respell(case.loss, chunked=case.implementation == CHUNKED)
    objective = KDObjective(get_loss(spec, chunk_size=chunk_size), case.settings.kd_ratio)

    def forward(inputs: Inputs) -> Tensor:
        output: KDOutput = objective(
            Projected(inputs.hidden, inputs.weight),
            Projected(inputs.teacher_hidden, inputs.teacher_weight),
            inputs.labels,
        )
        return output.loss

    return forward


def _floor(inputs: Inputs) -> Callable[[], Tensor]:
    """Compute only both projections and both gradients on the supervised rows."""
    import torch

    from kdrun.bench.inputs import IGNORED

    def step() -> Tensor:
        kept = inputs.labels != IGNORED
        hidden, weight = inputs.hidden.detach()[kept], inputs.weight.detach()
        logits = hidden @ weight.t()
        inputs.teacher_hidden[kept] @ inputs.teacher_weight.t()
        inputs.hidden.grad = torch.zeros_like(inputs.hidden)
        inputs.hidden.grad[kept] = logits @ weight
        inputs.weight.grad = logits.t() @ hidden
        return logits.new_zeros(())

    return step


def _resident_peak(step: Callable[[], Any]) -> int | None:
    """Peak resident memory of a step beyond the memory before it, sampled by a thread."""
    base = memory.resident()
    if base is None:
        return None
    highest = base
    done = threading.Event()

    def sample() -> None:
        nonlocal highest
        while not done.wait(_SAMPLE_SECONDS):
            highest = max(highest, memory.resident() or 0)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        step()
    finally:
        done.set()
        sampler.join()
    return max(highest, memory.resident() or 0) - base


def _return_freed_memory() -> None:
    """Return freed memory to the system, now and from here on.

    Freed memory that glibc keeps would hide some memory of the next step, and its gaps would count
    as used (61 instead of 46 times the logits for a plain alpha_beta).
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):  # only glibc has it
        library.mallopt(_M_MMAP_THRESHOLD, _BLOCK_HANDED_BACK)
        library.malloc_trim(0)


def _first_line(warning: warnings.WarningMessage) -> str:
    return str(warning.message).strip().partition("\n")[0]
