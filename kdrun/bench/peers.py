"""The same step with other tools, called as in their own trainers and recipes."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from kdrun.bench.inputs import Inputs

    Step = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Peer:
    """Another tool.

    Attributes:
        module: module to import.
        distribution: distribution to install.
        make: creates, from beta and kd_ratio, a function of the inputs that returns the loss.
        mixtures: whether it has the generalised JSD besides the two KL divergences.
        stores_logits: whether it stores the logits of all tokens.
    """

    module: str
    distribution: str
    make: Callable[[float, float], Step]
    mixtures: bool = True
    stores_logits: bool = False

    def offers(self, beta: float) -> bool:
        """Whether the tool has this divergence."""
        return self.mixtures or beta in (0.0, 1.0)


def is_installed(name: str) -> bool:
    """Whether a peer is installed, without importing it."""
    return importlib.util.find_spec(PEERS[name].module) is not None


def _torchtune(beta: float, kd_ratio: float) -> Step:
    """torchtune's recipe: hidden states in eight chunks, their logits, two chunked losses."""
    pieces = 8
    kd_losses = _torchtune_module("kd_losses")
    ce_losses = _torchtune_module("ce_chunked_output_loss")
    names = {0.0: "ForwardKLWithChunkedOutputLoss", 1.0: "ReverseKLWithChunkedOutputLoss"}
    kd = getattr(kd_losses, names[beta])(num_output_chunks=pieces)
    ce = ce_losses.CEWithChunkedOutputLoss(num_output_chunks=pieces)

    def step(inputs: Inputs) -> Tensor:
        import torch

        labels = inputs.labels.unsqueeze(0)
        student = [part.unsqueeze(0) @ inputs.weight.t() for part in inputs.hidden.chunk(pieces)]
        with torch.no_grad():
            teacher = [
                part.unsqueeze(0) @ inputs.teacher_weight.t()
                for part in inputs.teacher_hidden.chunk(pieces)
            ]
        total: Tensor = kd_ratio * kd(student, teacher, labels)
        return total if kd_ratio == 1 else total + (1 - kd_ratio) * ce(student, labels)

    return step


def _torchtune_module(name: str) -> Any:
    """Load a single file of torchtune, whose package needs torchao, unlike its losses."""
    package = importlib.util.find_spec("torchtune")
    if package is None or package.origin is None:
        raise ImportError("torchtune is not installed")
    path = Path(package.origin).parent / "modules" / "loss" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"torchtune_{name}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _liger(beta: float, kd_ratio: float) -> Step:
    """Liger's fused linear JSD with its defaults: compiled, chunks of 1024 rows."""
    liger = importlib.import_module("liger_kernel.chunked_loss")
    loss = liger.LigerFusedLinearJSDLoss(
        weight_hard_loss=1 - kd_ratio, weight_soft_loss=kd_ratio, beta=beta
    )

    def step(inputs: Inputs) -> Tensor:
        total: Tensor = loss(
            inputs.hidden,
            inputs.weight,
            inputs.teacher_hidden,
            inputs.teacher_weight,
            inputs.labels,
        )
        return total

    return step


def _trl(beta: float, kd_ratio: float) -> Step:
    """The functions of TRL's trainers: the divergence, and the log-probability for cross-entropy.

    As in its trainer, masked rows are skipped on CUDA but computed on a CPU.
    """
    divergence = importlib.import_module("trl.kernels.chunked_divergence")
    logprob = importlib.import_module("trl.kernels")

    def step(inputs: Inputs) -> Tensor:
        hidden, teacher_hidden, labels = inputs.hidden, inputs.teacher_hidden, inputs.labels
        kept = labels != -100
        count = kept.sum()
        if hidden.is_cuda:
            hidden, teacher_hidden, labels = hidden[kept], teacher_hidden[kept], labels[kept]
            kept = kept[kept]
        rows, _ = divergence.ChunkedDivergenceFunction.apply(
            hidden, inputs.weight, None, teacher_hidden, inputs.teacher_weight, None, beta
        )
        total: Tensor = kd_ratio * rows.masked_fill(~kept, 0).sum()
        if kd_ratio < 1:
            values, *_ = logprob.ChunkedLogProbFunction.apply(
                hidden,
                inputs.weight,
                None,
                labels.clamp_min(0),
                1.0,  # temperature
                divergence.VOCAB_CHUNK_SIZE,
                None,  # soft cap
                1.0,  # logit scale
                (),  # no further outputs
            )
            total = total - (1 - kd_ratio) * values.masked_fill(~kept, 0).sum()
        return total / count

    return step


PEERS = {
    "torchtune": Peer("torchtune", "torchtune", _torchtune, mixtures=False, stores_logits=True),
    "liger": Peer("liger_kernel", "liger-kernel", _liger),
    "trl": Peer("trl", "trl", _trl),
}
