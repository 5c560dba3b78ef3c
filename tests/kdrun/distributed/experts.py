"""Two steps of a student with experts, whose load-balancing loss is a mean over micro-batches.

One process that accumulates two micro-batches sees what two processes see. Run as ``experts.py
FOLDER ddp|fsdp``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import transformers
import worker
from bare import bare_arguments
from safetensors.torch import save_file

import kdlosses
from kdrun.data.collate import Collator
from kdrun.models.shard import shard

PROCESSES = 2


def make(folder: Path) -> None:
    torch.manual_seed(1)
    config = transformers.MixtralConfig(
        vocab_size=worker.VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=1.0,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(folder)


def main(base: Path, kind: str) -> None:
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = bare_arguments(
        base / "unused",
        max_steps=worker.STEPS,
        per_device_train_batch_size=worker.ROWS // PROCESSES,
        gradient_accumulation_steps=PROCESSES // world,
        learning_rate=1.0,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
    )
    load = transformers.MixtralForCausalLM.from_pretrained
    student, teacher = (load(base / "experts", dtype=torch.float32) for _ in range(2))
    with torch.no_grad():
        teacher.lm_head.weight.neg_()
    if kind == "fsdp" and world > 1:
        shard(student)
        shard(teacher)
    trainer = worker.InOrder(
        model=student,
        teacher=teacher,
        loss=kdlosses.get_loss("forward_kl_chunked", chunk_size=5, compiled=False),
        args=arguments,
        data_collator=Collator(0),
        train_dataset=worker.rows(),
    )
    trainer.train()
    weights = {}
    for name, value in trainer.model.named_parameters():
        full = value.full_tensor() if hasattr(value, "full_tensor") else value
        weights[name] = full.detach().clone()
    if int(os.environ.get("RANK", "0")) == 0:
        save_file(weights, base / f"{kind}-{world}.safetensors")
        lines = [x for x in trainer.state.log_history if "aux_loss" in x]
        (base / f"{kind}-{world}.json").write_text(
            json.dumps([[x["loss"], x["aux_loss"]] for x in lines]), encoding="utf-8"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
