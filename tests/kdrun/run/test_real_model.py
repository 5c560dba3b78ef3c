"""A real pretrained teacher teaches a layer subset of itself on real instructions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bare import bare_arguments
from commands import kdrun
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

VOCAB = 49152


def done(*arguments: object) -> str:
    finished = kdrun(*arguments)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def student_folder(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student") / "init"
    done("init-student", smollm2_folder, "--keep-layers", 4, "--output", folder)
    return folder


def test_the_command_distils_a_gguf_teacher_on_alpaca(
    smollm2_gguf: Path, student_folder: Path, shared_data: Path, tmp_path: Path
) -> None:
    run, held_out = tmp_path / "run", tmp_path / "held-out.json"
    rows = json.loads((shared_data / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    held_out.write_text(json.dumps(rows[-12:]), encoding="utf-8")
    done(
        *("--teacher", smollm2_gguf, "--student", student_folder),
        *("--data", shared_data / "alpaca_en_demo.json", "--eval-data", held_out),
        *("--max-length", 64),
        *("--loss", "forward_kl_chunked", "--kd-ratio", 0.5, "--lr", "1e-3"),
        *("--max-steps", 12, "--batch-size", 4, "--set", "training.eval_steps=6"),
        *("--output", run),
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if "eval_ce" in line]
    assert [line["step"] for line in evaluations] == [0, 6, 12]
    for key in ("eval_ce", "eval_forward_kl"):
        values = [line[key] for line in evaluations]
        assert values == sorted(values, reverse=True), (key, values)
        assert values[-1] < 0.75 * values[0]
    assert done("generate", run, "--prompt", "Name a colour.", "--max-new-tokens", 5)


class Watch(TorchDispatchMode):
    """Remembers the tensors whose last axis is the vocabulary, parameters left out."""

    def __init__(self, parameters: set[int]) -> None:
        super().__init__()
        self.parameters = parameters
        self.widest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_flatten(result)[0]:
            if (
                isinstance(value, torch.Tensor)
                and value.ndim
                and value.shape[-1] == VOCAB
                and value.untyped_storage().data_ptr() not in self.parameters
            ):
                self.widest = max(self.widest, value.numel() // VOCAB)
        return result


@pytest.mark.parametrize(("loss", "wide"), [("forward_kl_chunked", False), ("forward_kl", True)])
def test_no_tensor_of_supervised_rows_by_vocabulary_is_made(
    loss: str, wide: bool, smollm2_folder: Path, student_folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    import kdlosses
    from kdrun import DistillTrainer
    from kdrun.data.collate import Collator

    student = AutoModelForCausalLM.from_pretrained(student_folder)
    teacher = AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, VOCAB, (4, 33), generator=generator).tolist()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    supervised = 4 * 32
    options = {"chunk_size": 16, "compiled": False} if loss.endswith("_chunked") else {}
    trainer = DistillTrainer(
        model=student,
        teacher=teacher,
        loss=kdlosses.get_loss(loss, **options),
        args=bare_arguments(
            tmp_path,
            max_steps=1,
            per_device_train_batch_size=4,
        ),
        data_collator=Collator(2),
        train_dataset=rows,
        eval_dataset=rows,
    )
    parameters = {
        parameter.untyped_storage().data_ptr()
        for model in (student, teacher)
        for parameter in model.parameters()
    }
    with Watch(parameters) as training:
        trainer.train()
    assert (training.widest >= supervised) == wide
    assert training.widest >= 16  # the chunks were seen
    if not wide:
        with Watch(parameters) as evaluating:
            trainer.evaluate()
        assert 16 <= evaluating.widest < supervised
