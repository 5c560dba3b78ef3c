"""A resume amid an epoch sees the windows of that epoch."""

from pathlib import Path

import torch
import transformers
from bare import bare_arguments

from kdrun import DistillTrainer
from kdrun.data.collate import Collator
from kdrun.data.windows import TextWindows


def trainer(folder: Path, steps: int) -> DistillTrainer:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        attention_dropout=0.1,
    )
    tokens = torch.randint(0, 31, (8 * 9,), generator=torch.Generator().manual_seed(0)).tolist()
    return DistillTrainer(
        model=transformers.LlamaForCausalLM(config),
        teacher=transformers.LlamaForCausalLM(config),
        loss="forward_kl",
        args=bare_arguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=2,
            save_steps=5,
            lr_scheduler_type="constant",
            learning_rate=1e-2,
        ),
        data_collator=Collator(0),
        train_dataset=TextWindows(tokens, 8, seed=3),
    )


def test_resuming_amid_an_epoch_gives_the_same_weights_bit_for_bit(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", 9)
    assert len(whole.get_train_dataloader()) == 4  # step 5 lies amid the second epoch
    whole.train()
    trainer(tmp_path / "parts", 5).train()
    resumed = trainer(tmp_path / "parts", 9)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-5"))
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
