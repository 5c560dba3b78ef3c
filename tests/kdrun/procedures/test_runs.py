"""Procedures in whole runs of the tiny pair: what is learned from, logged, resumed and refused."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import kdlosses
from kdrun import DistillTrainer
from kdrun.data.collate import Collator
from kdrun.errors import InputError
from kdrun.procedures import Origin, Sampling, Session
from kdrun.procedures.base import ROLLOUT
from kdrun.procedures.gkd import GKD

Run = Callable[..., Path]
SHORT = {"procedure__max_new_tokens": 5}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


def equal(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return all(torch.equal(first[name], second[name]) for name in first)


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return found


def steps(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if "class_loss" in line]


def test_gkd_learns_from_the_students_answers_and_logs_what_it_wrote(
    distil: Run, tmp_path: Path
) -> None:
    folder = distil(
        tmp_path / "run",
        procedure__spec="gkd:lambda=1",
        training__gradient_accumulation_steps=2,
        **SHORT,
    )
    lines = steps(folder)
    assert [line["student_share"] for line in lines] == [1.0, 1.0]
    assert all(line["class_loss"] == 0 < line["kd_loss"] for line in lines)
    assert all(line["loss"] == pytest.approx(line["kd_loss"] / 2, rel=1e-4) for line in lines)
    assert 0 < lines[0]["generated_tokens"] < lines[1]["generated_tokens"] <= 2 * 8 * 5
    assert 0 < lines[0]["generation_seconds"] < lines[1]["generation_seconds"]
    found = summary(folder)["procedure"]
    assert found["generated_tokens"] == lines[1]["generated_tokens"]
    assert set(found) == {
        "generated_tokens",
        "generation_seconds",
        "student_share",
        "empty_generations",
    }


def test_at_lambda_0_gkd_is_the_plain_run(distil: Run, tmp_path: Path) -> None:
    plain = distil(tmp_path / "plain")
    assert equal(plain, distil(tmp_path / "gkd", procedure__spec="gkd:lambda=0", **SHORT))
    assert not equal(plain, distil(tmp_path / "one", procedure__spec="gkd:lambda=1", **SHORT))


@pytest.mark.parametrize(
    "spec",
    ["gkd:lambda=0.5", "distillm:margin=0,capacity=6,increase=1", "minillm:reuse=3", "distillm2"],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    distil: Run, tmp_path: Path, spec: str
) -> None:
    options = {
        "procedure__spec": spec,
        "training__max_steps": 6,
        "training__save_steps": 2,
        "training__save_total_limit": 5,
        "training__eval_steps": 1,
        # So high that the held-out loss rises, which distillm answers to.
        "optimizer__lr": 20.0 if spec.startswith("distillm:") else 1e-2,
        "data__cache_dir": "none",
        **SHORT,
    }
    whole = distil(tmp_path / "whole", **options)
    half = tmp_path / "half"
    shutil.copytree(whole, half)
    for name in ("checkpoints/checkpoint-4", "checkpoints/checkpoint-6", "student"):
        shutil.rmtree(half / name)
    (half / "summary.json").unlink()
    distil(half, resume=True, **options)
    assert equal(whole, half)
    for line, same in zip(steps(whole), steps(half), strict=True):
        for key in ("loss", "student_share", "generated_tokens", "phi", "buffer_rows"):
            assert line.get(key) == same.get(key), key
    if spec.startswith("distillm:"):
        assert steps(whole)[-1]["phi"] == 1.0
        assert steps(whole)[-1]["buffer_rows"] == 6


def test_the_loss_is_that_of_full_logits_over_the_tokens_of_the_step(
    distil: Run, still_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[tuple[bool, int, float, float]] = []
    original = DistillTrainer.compute_loss

    def record(self: Any, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        features = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            q, p = (
                net(**features).logits.double().log_softmax(-1)
                for net in (model, self.teacher.model)
            )
        labels = inputs["shift_labels"]
        kept = labels != -100
        kl = (p.exp() * (p - q)).sum(-1)[kept].sum()
        ce = -q[kept].gather(1, labels[kept].unsqueeze(1)).sum()
        parts.append((ROLLOUT in inputs, int(kept.sum()), float(kl), float(ce)))
        return original(self, model, inputs, *rest, **more)

    monkeypatch.setattr(DistillTrainer, "compute_loss", record)
    folder = distil(
        tmp_path / "run",
        procedure__spec="gkd:lambda=0.5",
        training__max_steps=1,
        training__gradient_accumulation_steps=4,
        loss__kd_ratio=0.3,
        model__student=str(still_student),
        **SHORT,
    )
    assert {written for written, *_ in parts} == {True, False}
    tokens = sum(count for _, count, _, _ in parts)
    total = sum(0.3 * kl + (0.0 if written else 0.7) * ce for written, _, kl, ce in parts) / tokens
    assert steps(folder)[0]["loss"] == pytest.approx(total, rel=1e-4)


def test_seqkd_has_the_teacher_answer_once(distil: Run, tiny_pair: Any, tmp_path: Path) -> None:
    said: list[list[str]] = [[], [], []]
    options = {"procedure__spec": "seqkd", "data__cache_dir": str(tmp_path / "cache"), **SHORT}
    first = distil(tmp_path / "first", said[0], **options)
    second = distil(tmp_path / "second", said[1], **options)
    assert equal(first, second)
    assert any("the teacher answers 38 prompts once" in line for line in said[0])
    (file,) = (tmp_path / "cache").glob("answers-*.json")
    assert any(f"38 answers of the teacher, from {file}" in line for line in said[1])
    assert summary(first)["procedure"]["generated_tokens"] > 0
    assert summary(second)["procedure"]["generated_tokens"] == 0
    other = distil(tmp_path / "other", said[2], **{**options, "procedure__max_new_tokens": 4})
    assert any("answers 38 prompts" in line for line in said[2])
    assert not equal(first, other)
    line = steps(first)[0]
    assert line["loss"] == pytest.approx(line["class_loss"], rel=1e-4)


@pytest.mark.parametrize(
    "content", ["[[", '{"a": 1}', json.dumps([[99999]] * 38), json.dumps(["abc"] * 38)]
)
def test_damaged_answers_are_written_again(distil: Run, tmp_path: Path, content: str) -> None:
    options = {"procedure__spec": "seqkd", "data__cache_dir": str(tmp_path / "cache"), **SHORT}
    first = distil(tmp_path / "first", **options)
    (file,) = (tmp_path / "cache").glob("answers-*.json")
    whole = file.read_text(encoding="utf-8")
    file.write_text(content, encoding="utf-8")
    assert equal(first, distil(tmp_path / "second", **options))
    assert file.read_text(encoding="utf-8") == whole


def test_seqkd_learns_exactly_what_the_teacher_says_greedily(
    tiny_pair: Any, tmp_path: Path
) -> None:
    trainer = make_trainer(tiny_pair, tmp_path, "seqkd", Sampling(6, 64, temperature=0))
    assert trainer.session is not None
    session = trainer.session
    rows = session.procedure.prepare(trainer.train_dataset, session)
    teacher = session.teacher
    assert teacher is not None
    for given, row in zip(trainer.train_dataset, rows, strict=True):
        first = next(i for i, label in enumerate(given["labels"]) if label != -100)
        prompt = given["input_ids"][:first]
        expected = teacher.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            generation_config=transformers.GenerationConfig(
                max_new_tokens=6,
                do_sample=False,
                eos_token_id=sorted(session.stops),
                pad_token_id=0,
            ),
        )[0].tolist()
        assert row["input_ids"] == expected
        assert row["labels"] == [-100] * len(prompt) + expected[len(prompt) :]


def test_answers_are_written_in_batches_of_their_own(tiny_pair: Any, tmp_path: Path) -> None:
    """And what is written does not depend on them."""
    texts = []
    for size in (3, 8):
        sampling = Sampling(6, 64, batch_size=size)
        trainer = make_trainer(tiny_pair, tmp_path / str(size), "seqkd", sampling)
        session = trainer.session
        assert session is not None
        assert session.teacher is not None
        seen: list[int] = []
        hook = session.teacher.register_forward_pre_hook(
            lambda _, given, named, seen=seen: seen.append(len(named["input_ids"])),
            with_kwargs=True,
        )
        texts.append(session.procedure.prepare(trainer.train_dataset, session))
        hook.remove()
        assert max(seen) == size
    assert [row["input_ids"] for row in texts[0]] == [row["input_ids"] for row in texts[1]]


def test_minillm_learns_plain_text_beside_its_samples(
    distil: Run, still_student: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    lines = (f"question {n} of the user gets an answer\n\n" for n in range(60))
    text.write_text("".join(lines), encoding="utf-8")
    said: list[str] = []
    options = {
        "procedure__spec": "minillm",
        "loss__kd_ratio": 0.5,
        "model__student": str(still_student),
        **SHORT,
    }
    with_text = distil(tmp_path / "text", said, procedure__text=str(text), **options)
    assert any(line.startswith("procedure.text: 60 documents") for line in said)
    without = distil(tmp_path / "rows", **options)
    first, second = (steps(folder)[0] for folder in (with_text, without))
    assert first["kd_loss"] == pytest.approx(second["kd_loss"], rel=1e-3)
    assert first["class_loss"] != pytest.approx(second["class_loss"], rel=1e-3)
    assert first["student_share"] == 0.5
    assert first["loss"] == pytest.approx(
        0.5 * first["class_loss"] + 0.5 * first["kd_loss"], rel=1e-4
    )


def test_distillm2_takes_one_loss_on_each_text(tiny_pair: Any, tmp_path: Path) -> None:
    trainer = make_trainer(
        tiny_pair,
        tmp_path,
        "distillm2:student_weight=0.25,student_loss=skew_reverse_kl:alpha=0.2",
        Sampling(6, 64),
        loss="skew_forward_kl",
        kd_ratio=1.0,
    )
    session = trainer.session
    assert session is not None
    rows = session.procedure.prepare(trainer.train_dataset, session)
    (batch,) = session.micro_batches([Collator(0)(rows[:4])])
    assert batch[ROLLOUT]["origins"] == (Origin.TEACHER,) * 4 + (Origin.STUDENT,) * 4
    trainer._origin_tokens = counts = tokens(batch)
    trainer.model.eval()
    found = trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts.sum())
    features = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        q = session.student(**features).logits.double().softmax(-1)
        p = session.teacher(**features).logits.double().softmax(-1)  # type: ignore[misc]
    kept = batch["shift_labels"] != -100
    forward = 0.1 * p + 0.9 * q
    backward = 0.8 * p + 0.2 * q
    on_teacher = (p * (p / forward).log()).sum(-1)[:4][kept[:4]].mean()
    on_student = (q * (q / backward).log()).sum(-1)[4:][kept[4:]].mean()
    assert found.item() == pytest.approx((0.75 * on_teacher + 0.25 * on_student).item(), rel=1e-4)


def test_plain_text_is_continued_from_the_first_half_of_its_windows(
    distil: Run, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    lines = (f"the user asks the assistant question {n} and gets an answer\n\n" for n in range(80))
    text.write_text("".join(lines), encoding="utf-8")
    said: list[str] = []
    folder = distil(
        tmp_path / "run",
        said,
        procedure__spec="gkd:lambda=1",
        data__train=str(text),
        data__format="text",
        data__max_length=32,
    )
    tokens = steps(folder)[0]["generated_tokens"]
    assert 0 < tokens <= 4 * 16


def tokens(batch: dict[str, Any]) -> torch.Tensor:
    from kdrun.procedures.sampling import tokens_by_origin

    return tokens_by_origin([batch])


def make_trainer(
    pair: Any, folder: Path, spec: str, sampling: Sampling, **options: Any
) -> DistillTrainer:
    from kdrun.data.encode import encode_chats
    from kdrun.data.rows import load_rows

    tokenizer = transformers.AutoTokenizer.from_pretrained(pair.student)
    rows: Any = load_rows(pair.rows).rows[:8]
    load = transformers.AutoModelForCausalLM.from_pretrained
    return DistillTrainer(
        model=load(pair.student, dtype=torch.float32),
        teacher=load(pair.teacher, dtype=torch.float32),
        args=transformers.TrainingArguments(
            output_dir=str(folder), report_to="none", disable_tqdm=True, use_cpu=True
        ),
        procedure=spec,
        sampling=sampling,
        train_dataset=list(encode_chats(rows, tokenizer, 64).examples),
        data_collator=Collator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        **options,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss__kd_ratio": 0}, "with --kd-ratio 0 the student's own text has no effect"),
        ({"model__teacher_cache": "somewhere"}, "remove --teacher-cache and pass --teacher"),
        ({"data__packing": True}, "cannot be used with data.packing=true"),
        ({"training__fsdp": True}, "remove training.fsdp=true"),
        ({"procedure__spec": "distillm2:student_loss=taid"}, "student_loss=taid carries state"),
        (
            {"procedure__spec": "distillm2:student_loss=skew_reverse_kl:alpha=3"},
            "student_loss=skew_reverse_kl:alpha=3: .* less than 1",
        ),
        (
            {
                "procedure__spec": "distillm2:student_loss=total_variation",
                "loss__match_curvature": True,
            },
            "student_loss=total_variation: match_curvature: .* no curvature",
        ),
        (
            {"procedure__spec": "minillm", "procedure__text": "x.txt", "loss__kd_ratio": 1.0},
            "text: has no effect at --kd-ratio 1",
        ),
        ({"procedure__text": "text.txt"}, "does not use procedure.text"),
        ({"procedure__spec": "minillm", "procedure__text": "no.txt"}, "no.txt"),
        ({"procedure__max_new_tokens": 128}, "leaves no room for a prompt in data.max_length=128"),
        ({"procedure__max_new_tokens": 127}, "no prompt leaves room for 127 new tokens"),
        ({"procedure__spec": "gkd:lambda=2"}, "less than or equal to 1"),
    ],
)
def test_what_has_no_meaning_is_refused_first(
    distil: Run, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        distil(tmp_path / "run", **{"procedure__spec": "gkd", **options})
    assert not (tmp_path / "run" / "student").exists()


@pytest.mark.parametrize(
    "spec", ["gkd:lambda=1", "minillm", "distillm:margin=0,increase=1", "distillm2"]
)
def test_a_ratio_may_begin_at_0(distil: Run, tmp_path: Path, spec: str) -> None:
    """The first step then learns by cross-entropy alone, if at all."""
    folder = distil(
        tmp_path / "run",
        procedure__spec=spec,
        loss__schedules={"kd_ratio": {"kind": "linear", "start": 0.0, "end": 1.0}},
    )
    first, second = steps(folder)[:2]
    assert (first["kd_ratio"], first["kd_loss"]) == (0, 0)
    assert second["kd_ratio"] == 0.5
    assert second["kd_loss"] > 0


def test_a_procedure_needs_a_teacher(distil: Run, tiny_pair: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs a --teacher"):
        distil(tmp_path / "run", procedure__spec="seqkd", model__teacher=None)


def test_prompts_without_room_are_left_out_counted_and_said(distil: Run, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    with open(rows, "w", encoding="utf-8") as stream:
        for number in range(20):
            prompt = "the user asks " * (1 if number % 4 else 12)
            stream.write(json.dumps({"prompt": f"{number} {prompt}", "response": "an answer"}))
            stream.write("\n")
    said: list[str] = []
    distil(
        tmp_path / "run",
        said,
        procedure__spec="gkd:lambda=1",
        procedure__max_new_tokens=30,
        data__train=str(rows),
        data__eval=str(rows),
        data__max_length=64,
    )
    (line,) = [line for line in said if "leave no room" in line]
    assert line.startswith("procedure: skipped 5 of 20 training rows, whose prompts leave no room")


def test_a_tokenizer_without_an_end_token_is_refused(
    distil: Run, tiny_pair: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    student = tmp_path / "student"
    shutil.copytree(tiny_pair.student, student)
    endless = copy.deepcopy(tiny_tokenizer)
    endless.eos_token = None
    endless.save_pretrained(student)
    with pytest.raises(InputError, match=r"no end-of-text token.*set its eos_token"):
        distil(tmp_path / "run", procedure__spec="gkd", model__student=str(student))


def test_the_student_writes_with_its_adapters(distil: Run, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    options = {"procedure__spec": "gkd:lambda=1", "lora__rank": 2, "training__max_steps": 3}
    folder = distil(tmp_path / "run", **options, **SHORT)
    assert steps(folder)[-1]["student_share"] == 1.0
    assert (folder / "student" / "adapter_model.safetensors").is_file()


def test_empty_answers_are_counted_skipped_and_said(table: Callable[..., Any]) -> None:
    student = table(0)
    student.logits.data[:, 3] = torch.tensor([60.0, -60.0, 0.0, 0.0])
    session = Session(
        procedure=GKD(lambda_=1.0),
        settings=Sampling(max_new_tokens=3, max_length=8),
        student=student,
        teacher=None,
        tokenizer=SimpleNamespace(eos_token_id=3, pad_token_id=0),  # type: ignore[arg-type]
        vocab_size=4,
    )
    session._stops = {3}
    rows = [{"input_ids": [end, 2], "labels": [-100, 2]} for end in (0, 1, 0, 0)]
    (batch,) = session.micro_batches([Collator(0)(rows)])
    supervised = (batch["labels"] != -100).sum(-1).tolist()
    assert supervised[0] == supervised[2] == supervised[3] == 0 < supervised[1]
    figures = session.figures()
    assert figures["empty_generations"] == 3
    assert figures["generated_tokens"] == 3 + 3  # three end tokens, and one answer to its limit
    assert session.remarks(figures) == [
        f"6 tokens were generated in {figures['generation_seconds']:.0f} s",
        "3 sampled answers were empty and were skipped",
    ]


def test_another_procedures_checkpoint_is_refused(distil: Run, tmp_path: Path) -> None:
    from kdrun.errors import InputError

    folder = distil(tmp_path / "run", procedure__spec="gkd", training__save_steps=1, **SHORT)
    (folder / "summary.json").unlink()
    for changed in ({"procedure__spec": "gkd:lambda=0.2", **SHORT}, {}):
        with pytest.raises(InputError, match=r"procedure\.spec was 'gkd' when the run began"):
            distil(folder, resume=True, training__max_steps=3, training__save_steps=1, **changed)


def test_a_trainer_of_ones_own_takes_a_procedure(tiny_pair: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_pair, tmp_path, "gkd:lambda=1", Sampling(4, 64), kd_ratio=1.0)
    trainer.args.max_steps = 1
    trainer.train()
    assert trainer.session is not None
    assert trainer.session.counts.generated_tokens > 0
    with pytest.raises(ValueError, match="procedure: needs a live or a served teacher"):
        DistillTrainer(trainer.model, None, "forward_kl", 0.0, procedure="gkd")
    assert kdlosses.available_losses()


def test_several_answers_to_a_row_are_told_apart(tiny_pair: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_pair, tmp_path, "gkd", Sampling(12, 64))
    session, rows = trainer.session, trainer.train_dataset
    assert session is not None
    first, again, other = (
        [sample.answer for sample in session.write(rows, 0, what=what)]
        for what in ("answer", "answer", "other")
    )
    assert first == again != other


class TestPromptsWithoutAnswers:
    @pytest.fixture
    def prompts(self, tiny_pair: Any, tmp_path: Path) -> dict[str, Any]:
        rows = map(json.loads, Path(tiny_pair.rows).read_text(encoding="utf-8").splitlines())
        file = tmp_path / "prompts.jsonl"
        file.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
        return {"data__train": str(file), "data__eval": str(tiny_pair.rows)}

    @pytest.mark.parametrize("spec", ["gkd:lambda=1", "seqkd"])
    def test_procedures_that_write_every_answer_take_them(
        self, distil: Callable[..., Path], prompts: dict[str, Any], tmp_path: Path, spec: str
    ) -> None:
        given = prompts | {"procedure__spec": spec, "procedure__max_new_tokens": 4}
        if spec == "seqkd":
            given["loss__kd_ratio"] = 0.0
        folder = distil(tmp_path / "run", **given)
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        assert summary["steps"] == 2
        assert summary["after"]["eval_tokens"] > 40  # the answers of the held-out rows

    @pytest.mark.parametrize("spec", [None, "gkd:lambda=0.5"])
    def test_others_do_not(
        self, distil: Callable[..., Path], prompts: dict[str, Any], tmp_path: Path, spec: str | None
    ) -> None:
        with pytest.raises(InputError, match=r"prompts but no answers .*gkd:lambda=1 or seqkd"):
            distil(tmp_path / "run", **prompts, procedure__spec=spec)

    def test_they_cannot_be_held_out(
        self, distil: Callable[..., Path], prompts: dict[str, Any], tmp_path: Path
    ) -> None:
        given = prompts | {"data__eval": None, "procedure__spec": "gkd:lambda=1"}
        with pytest.raises(InputError, match="rows without answers cannot be evaluated on"):
            distil(tmp_path / "run", **given)
