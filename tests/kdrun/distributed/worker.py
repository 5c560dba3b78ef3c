"""Two steps of each case, by as many processes as torchrun starts; one process is the oracle.

Run as ``python -m torch.distributed.run --nproc-per-node N worker.py FOLDER``. The rows of a step
are dealt out in order, so that row i goes to rank i // (rows / N); the last rank may have no
supervised token. SGD without clipping: the weights tell the gradients. The second step sees what
the first one left, which a head with stale weights would not.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import SequentialSampler

sys.path.insert(0, str(Path(__file__).parents[1]))
from bare import bare_arguments

import kdlosses
from kdrun import DistillTrainer
from kdrun.data.collate import Collator
from kdrun.data.origins import Numbered
from kdrun.errors import TrainingError
from kdrun.models.heads import causal_lm
from kdrun.models.shard import shard
from kdrun.training.guard import LossGuard

VOCAB, ROWS, STEPS = 37, 8, 2


@dataclass(frozen=True)
class Case:
    name: str
    loss: str = "forward_kl_chunked"
    tied: bool = True
    fsdp: bool = False
    lora: bool = False
    accumulation: int = 1
    token_weight: str | None = None
    features: str | None = None


CASES = (
    Case("ddp_chunked_tied"),
    Case("ddp_plain_untied", loss="generalized_jsd", tied=False),
    Case("ddp_lora", loss="reverse_kl_chunked", lora=True),
    Case("ddp_accumulated", accumulation=2, token_weight="top_entropy"),
    Case("fsdp_chunked_tied", fsdp=True),
    Case("fsdp_chunked_untied", loss="skew_reverse_kl_chunked", tied=False, fsdp=True),
    Case("fsdp_plain_tied", loss="forward_kl", fsdp=True),
    Case("fsdp_lora", fsdp=True, lora=True),
    Case("fsdp_accumulated", loss="taid_chunked", fsdp=True, accumulation=2),
    Case("ddp_features", accumulation=2, features="hidden_cosine:weight=0.3"),
    Case("ddp_relation", features="token_relation:layers=last,tokens=all"),
    Case("fsdp_features", fsdp=True, features="hidden_mse:scale=teacher,layers=1-2,weight=0.1"),
    Case("fsdp_lora_features", fsdp=True, lora=True, features="hidden_cosine:layers=2-1"),
)


def make(folder: Path, tied: bool, seed: int, width: int = 16) -> None:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)


def rows() -> list[dict[str, list[int]]]:
    """Rows of uneven length; the last half of the second half has nothing to learn from."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for number in range(ROWS):
        length = 5 + 3 * number
        ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
        silent = number >= ROWS - ROWS // 4
        found.append({"input_ids": ids, "labels": [-100] * length if silent else ids})
    return found


class InOrder(DistillTrainer):
    """Rows in their order, so that it is known which rank has which."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset)


def step(case: Case, base: Path) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Weights after the steps, gathered, and what was logged."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    heads = "tied" if case.tied else "untied"
    load = transformers.LlamaForCausalLM.from_pretrained
    arguments = bare_arguments(
        base / "unused",
        max_steps=STEPS,
        per_device_train_batch_size=ROWS // world // case.accumulation,
        gradient_accumulation_steps=case.accumulation,
        per_device_eval_batch_size=2,
        learning_rate=1.0,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
    )
    # After the arguments, which start the process group.
    student = load(base / f"student-{heads}", dtype=torch.float32)
    teacher = load(base / ("wide" if case.features else "teacher"), dtype=torch.float32)
    if case.lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        student = get_peft_model(student, LoraConfig(r=2, target_modules="all-linear"))
    if case.fsdp and world > 1:
        shard(causal_lm(student))
        shard(teacher)
    chunked = case.loss.endswith("_chunked")
    more = {"chunk_size": 5, "compiled": False} if chunked else {}
    weighting = None
    if case.token_weight is not None:
        weight = kdlosses.get_weight(case.token_weight)
        weighting = kdlosses.TokenWeighting(weight, "both", "running")
    trainer = InOrder(
        model=student,
        teacher=teacher,
        loss=kdlosses.get_loss(case.loss, **more),
        kd_ratio=0.7,
        token_weight=weighting,
        args=arguments,
        data_collator=Collator(0),
        train_dataset=rows(),
        eval_dataset=rows()[:5],
        features=None if case.features is None else projecting(case.features),
    )
    trainer.evaluate()  # as a run does before it trains
    trainer.train()
    if world > 1:
        wrapped = isinstance(causal_lm(trainer.model), FSDPModule)
        assert wrapped == case.fsdp, f"{case.name}: FSDPModule is {wrapped}"
    logged = {key: value for key, value in trainer.state.log_history[0].items() if "loss" in key}
    logged |= {
        k: v for k, v in trainer.evaluate().items() if "runtime" not in k and "per_" not in k
    }
    weights = {}
    for name, value in trainer.model.named_parameters():
        full = value.full_tensor() if hasattr(value, "full_tensor") else value
        if value.requires_grad:
            weights[name] = full.detach().clone()
    if trainer.features is not None:
        for number, projector in enumerate(trainer.features.projectors):
            weights[f"projector {number}"] = projector.detach().clone()
    return weights, logged


def projecting(spec: str) -> kdlosses.FeatureTerm:
    """The term between the wide teacher and a student."""
    return kdlosses.get_features(spec, kdlosses.Hidden(2, 24), kdlosses.Hidden(2, 16), chunk_size=4)


def guarded(base: Path, fsdp: bool) -> dict[str, Any]:
    """What one process sees of a step that is bad on the first one only: left out, then final.

    The first process, and it alone, has a row whose hidden states are NaN.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    load = transformers.LlamaForCausalLM.from_pretrained
    data = rows()
    data[0] = {"input_ids": [1, 4, 5, 6], "labels": [-100, 4, 5, 6]}
    found: dict[str, Any] = {}
    for skip in (True, False):
        arguments = bare_arguments(
            base / "unused", max_steps=1, per_device_train_batch_size=ROWS // world
        )
        student = load(base / "student-untied", dtype=torch.float32)
        student.model.embed_tokens.weight.data[1] = float("nan")  # no other row has it
        before = student.lm_head.weight.detach().clone()
        if fsdp and world > 1:
            shard(student)
        trainer = InOrder(
            model=student,
            teacher=None,
            kd_ratio=0.0,
            loss=kdlosses.get_loss("forward_kl_chunked", compiled=False),
            args=arguments,
            data_collator=Collator(0),
            train_dataset=Numbered(data),
        )
        trainer.guard = LossGuard(skip=skip)
        try:
            trainer.train()
        except TrainingError as error:
            found["said"] = str(error)
            continue
        found["skipped"] = trainer.guard.skipped
        head = trainer.model.lm_head.weight
        after = head.full_tensor() if hasattr(head, "full_tensor") else head
        found["untouched"] = torch.equal(after.detach(), before)
    return found


def main(base: Path) -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    for case in CASES:
        weights, logged = step(case, base)
        if int(os.environ.get("RANK", "0")) == 0:
            save_file(weights, base / f"{case.name}-{world}.safetensors")
            (base / f"{case.name}-{world}.json").write_text(json.dumps(logged), encoding="utf-8")
    rank = os.environ.get("RANK", "0")
    for kind in ("ddp", "fsdp"):
        told = json.dumps(guarded(base, kind == "fsdp"))
        (base / f"guard-{kind}-{world}-{rank}.json").write_text(told, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
