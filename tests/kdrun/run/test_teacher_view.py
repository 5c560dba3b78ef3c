"""Runs in which the teacher reads another prompt, against two forward passes by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import kdrun
from pair_configs import config_of

from kdrun.errors import InputError

Distil = Callable[..., Path]

ROWS = [
    {"prompt": "question " * n, "response": f"the answer {n} " * 2, "hint": "ask the user " * m}
    for n, m in ((1, 4), (3, 1), (2, 6), (5, 2))
]
TEMPLATE = "{prompt} {context} again: {prompt}"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def texts(row: dict[str, str]) -> tuple[str, str]:
    seen = TEMPLATE.replace("{prompt}", row["prompt"]).replace("{context}", row["hint"])
    return row["prompt"], seen


def forward_kl(teacher_folder: Path, student_folder: Path, tokenizer: Any) -> float:
    """Mean KL over answer tokens: each model on its own text, one row at a time."""
    from transformers import AutoModelForCausalLM

    def answer_logs(model: Any, prompt: str, answer: str) -> torch.Tensor:
        asked = [{"role": "user", "content": prompt}]
        options = {"tokenize": False, "add_generation_prompt": True}
        before = tokenizer.apply_chat_template(asked, **options)
        first = tokenizer(before, add_special_tokens=False)["input_ids"]
        rest = tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([first + rest])).logits[0].double()
        return logits.log_softmax(-1)[len(first) - 1 : -1]

    teacher, student = (
        AutoModelForCausalLM.from_pretrained(folder).eval()
        for folder in (teacher_folder, student_folder)
    )
    total, count = 0.0, 0
    for row in ROWS:
        own, seen = texts(row)
        p = answer_logs(teacher, seen, row["response"])
        q = answer_logs(student, own, row["response"])
        total += float((p.exp() * (p - q)).sum())
        count += len(p)
    return total / count


def view(rows: Path, **more: Any) -> dict[str, Any]:
    return {
        "data__train": str(rows),
        "data__eval": str(rows),
        "data__teacher_context_field": "hint",
        "data__teacher_template": TEMPLATE,
        "data__teacher_max_length": 256,
        **more,
    }


def measures(folder: Path, when: str = "before") -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / "summary.json").read_text())[when]
    return found


def lines(folder: Path, name: str) -> list[float]:
    """A metric of each step."""
    every = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in every if name in line]


def test_each_model_is_evaluated_on_its_own_text(
    distil: Distil, rows: Path, tiny_pair: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    said: list[str] = []
    folder = distil(tmp_path / "run", said, **view(rows))
    by_hand = forward_kl(tiny_pair.teacher, tiny_pair.student, tiny_tokenizer)
    assert measures(folder)["eval_forward_kl"] == pytest.approx(by_hand, rel=1e-4)
    assert any("the teacher reads its own prompts" in line for line in said)


def test_packing_changes_nothing_but_the_rows(
    distil: Distil, rows: Path, still_student: Path, tmp_path: Path
) -> None:
    given = view(rows, model__student=str(still_student), training__max_steps=1)
    given |= {"data__max_length": 250, "data__teacher_max_length": 256}
    loose = distil(tmp_path / "loose", **given)
    said: list[str] = []
    packed = distil(tmp_path / "packed", said, **given, data__packing=True)
    assert any("packed into" in line for line in said)
    for name in ("class_loss", "kd_loss"):
        assert lines(packed, name) == pytest.approx(lines(loose, name), rel=1e-4)


def test_a_cache_is_for_the_prompts_that_the_teacher_reads(
    distil: Distil, rows: Path, tiny_pair: Any, tmp_path: Path
) -> None:
    live = distil(tmp_path / "live", **view(rows))
    options = [
        *("--teacher", str(tiny_pair.teacher), "--student", str(tiny_pair.student)),
        *("--data", str(rows), "--output", str(tmp_path / "cache"), "--kind", "hidden"),
    ]
    keys = {k.replace("__", "."): v for k, v in view(rows).items() if k != "data__train"}
    for key, value in {**keys, "data.max_length": 128}.items():
        options += ["--set", f"{key}={value}"]
    done = kdrun("cache-teacher", *options)
    assert done.returncode == 0, done.stderr
    cached = {"model__teacher": None, "model__teacher_cache": str(tmp_path / "cache")}
    folder = distil(tmp_path / "cached", **view(rows, **cached))
    found, wanted = measures(folder), measures(live)
    assert found["eval_forward_kl"] == pytest.approx(wanted["eval_forward_kl"], rel=1e-5)
    assert lines(folder, "kd_loss") == pytest.approx(lines(live, "kd_loss"), rel=1e-5)
    other = view(rows, data__teacher_template="{context} {prompt}", **cached)
    with pytest.raises(InputError, match="lacks the row"):
        distil(tmp_path / "other", **other)


def test_a_resumed_run_notices_another_prompt_of_the_teacher(
    distil: Distil, rows: Path, tmp_path: Path
) -> None:
    folder = distil(tmp_path / "run", **view(rows, training__save_steps=1))
    (folder / "summary.json").unlink()
    changed = view(rows, data__teacher_template="{context} {prompt}", training__max_steps=3)
    with pytest.raises(InputError, match="teacher_template"):
        distil(folder, resume=True, **changed)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"model__teacher": None, "loss__kd_ratio": 0.0}, "no effect without a teacher"),
        ({"procedure__spec": "seqkd"}, "shows teacher and student the same prompt"),
        ({"data__teacher_max_length": 257}, "data.teacher_max_length=257: the context of"),
        ({"data__teacher_max_length": 20}, "raise data.teacher_max_length"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    distil: Distil, rows: Path, tmp_path: Path, given: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InputError, match=problem) as error:
        distil(tmp_path / "run", **view(rows, **given))
    assert "\n" not in str(error.value)


def test_plain_text_has_no_prompt(distil: Distil, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a text " * 2000, encoding="utf-8")
    with pytest.raises(InputError, match="plain text has no prompt"):
        distil(tmp_path / "run", data__train=str(text), data__teacher_system="be right")


@pytest.mark.parametrize("lora", [{}, {"lora__rank": 2, "lora__alpha": 8}])
def test_self_is_the_student_at_its_start(
    distil: Distil, rows: Path, still_student: Path, tmp_path: Path, lora: dict[str, Any]
) -> None:
    given = view(rows, model__student=str(still_student), training__max_steps=4, **lora)
    said: list[str] = []
    own = distil(tmp_path / "own", said, **given, model__teacher="self")
    other = distil(tmp_path / "other", **given, model__teacher=str(still_student))
    found = lines(own, "kd_loss")
    assert found == pytest.approx(lines(other, "kd_loss"), rel=1e-5)
    assert len({round(value, 6) for value in found}) == len(found)  # the student moves
    assert any("without adapters" in line for line in said) == bool(lora)


def test_live_self_moves_with_the_student(
    distil: Distil, rows: Path, still_student: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    given = view(rows, model__student=str(still_student), model__teacher="self:live")
    folder = distil(tmp_path / "run", **given, training__max_steps=4)
    for when, student in (("before", still_student), ("after", folder / "student")):
        by_hand = forward_kl(student, student, tiny_tokenizer)
        assert measures(folder, when)["eval_forward_kl"] == pytest.approx(by_hand, rel=1e-3)
    assert measures(folder) != measures(folder, "after")


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"model__teacher": "self:live"}, "cannot differ from the student"),
        ({"model__teacher": "self", "loss__kd_ratio": 1.0}, "the loss stays 0"),
        ({"model__teacher": "self:lives"}, "did you mean self:live"),
        ({"model__teacher": "self", "model__teacher_revision": "main"}, "teacher_revision has no"),
    ],
)
def test_a_teacher_that_cannot_differ_is_refused(
    distil: Distil, tmp_path: Path, given: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InputError, match=problem) as error:
        distil(tmp_path / "run", **given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("teacher", ["self", "self:live", None])
def test_the_student_answers_its_own_prompt_and_the_teacher_judges_after_its_own(
    distil: Distil,
    rows: Path,
    still_student: Path,
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    teacher: str | None,
) -> None:
    from kdrun.training import loss

    used: list[Any] = []

    def keep(own: Any, inputs: Any) -> Any:
        used.append({name: value.clone() for name, value in inputs.items()})
        return source_of(own, inputs)

    source_of = loss.source_of
    monkeypatch.setattr(loss, "source_of", keep)
    given = view(rows, procedure__spec="gkd:lambda=1", procedure__max_new_tokens=6)
    if teacher is not None:
        given |= {"model__teacher": teacher, "model__student": str(still_student)}
    folder = distil(tmp_path / "run", **given, loss__kd_ratio=1.0)
    assert all(value > 0 for value in lines(folder, "kd_loss"))

    def rendered(prompt: str) -> list[int]:
        options = {"tokenize": False, "add_generation_prompt": True}
        text = tiny_tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **options)
        found: list[int] = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    prompts = {tuple(rendered(own)): rendered(seen) for own, seen in map(texts, ROWS)}
    answered = 0
    for batch in used:
        for row in range(len(batch["input_ids"])):
            parts = []
            for side in ("", "teacher_"):
                ids = batch[f"{side}input_ids"][row][batch[f"{side}attention_mask"][row] == 1]
                labels = batch[f"{side}shift_labels"][row]
                parts.append((ids.tolist(), labels[labels >= 0].tolist()))
            (own, answer), (seen, same) = parts
            assert answer == same
            prompt = own[: len(own) - len(answer)]
            assert own[len(prompt) :] == answer
            assert seen == prompts[tuple(prompt)] + answer
            answered += len(answer) > 0
    assert answered


def test_rows_whose_prompt_leaves_the_teacher_no_room_are_not_answered(
    distil: Distil, rows: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    given = view(rows, procedure__spec="gkd:lambda=1", procedure__max_new_tokens=90)
    distil(tmp_path / "run", said, **given | {"data__teacher_max_length": 130})
    assert any("of 4 training rows, whose prompts leave no room" in line for line in said), (
        "|".join(said)
    )


@pytest.mark.parametrize("command", ["cache-teacher", "evaluate", "compare-losses"])
def test_commands_without_a_student_in_training_refuse_self(
    command: str, rows: Path, tiny_pair: Any, tmp_path: Path
) -> None:
    given = ["--teacher", "self", "--data", rows]
    if command == "evaluate":
        given.append(tiny_pair.student)
    else:
        given += ["--student", tiny_pair.student, "--output", tmp_path / "out"]
    done = kdrun(command, *given)
    assert done.returncode == 2
    assert "pass the student's folder as --teacher" in done.stderr


@pytest.mark.parametrize("lora", [{}, {"lora__rank": 2}])
def test_a_mean_of_the_students_weights_resumes_bit_for_bit(
    distil: Distil, rows: Path, still_student: Path, tmp_path: Path, lora: dict[str, Any]
) -> None:
    given = view(rows, model__student=str(still_student), model__teacher="self", **lora)
    given |= {"model__teacher_ema": 0.5, "training__save_steps": 2, "training__max_steps": 4}
    whole = distil(tmp_path / "whole", **given)
    cut = distil(tmp_path / "cut", **given)
    (cut / "summary.json").unlink()
    for folder in (cut / "checkpoints").glob("checkpoint-4"):
        shutil.rmtree(folder)
    distil(cut, resume=True, **given)
    assert lines(cut, "kd_loss") == lines(whole, "kd_loss")
    assert measures(cut, "after") == measures(whole, "after")
    frozen = distil(tmp_path / "frozen", **given | {"model__teacher_ema": None})
    first, *later = zip(lines(whole, "kd_loss"), lines(frozen, "kd_loss"), strict=True)
    assert first[0] == first[1]
    assert all(one != other for one, other in later)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"model__teacher_ema": 0.9}, "needs --teacher self"),
        ({"model__teacher_ema": 0.9, "model__teacher": "self:live"}, "use --teacher self"),
        (
            {
                "model__teacher_ema": 0.9,
                "model__teacher": "self",
                "model__student_dtype": "bfloat16",
            },
            "the mean would not move",
        ),
    ],
)
def test_a_mean_of_other_weights_is_refused(
    distil: Distil, rows: Path, tmp_path: Path, given: dict[str, Any], problem: str
) -> None:
    with pytest.raises(InputError, match=problem):
        distil(tmp_path / "run", **view(rows, **given))


def test_streamed_rows_have_both_sides(
    distil: Distil, rows: Path, still_student: Path, tmp_path: Path
) -> None:
    given = view(rows, model__student=str(still_student), training__max_steps=1)
    in_order = {"data__streaming": True, "data__shuffle_buffer": 1}
    read = distil(tmp_path / "read", **given)
    streamed = distil(tmp_path / "streamed", **given, **in_order)
    assert lines(streamed, "kd_loss") == pytest.approx(lines(read, "kd_loss"), rel=1e-5)


def test_the_rows_on_screen_tell_what_the_teacher_reads(rows: Path, tiny_pair: Any) -> None:
    keys = {k.replace("__", "."): v for k, v in view(rows).items() if "teacher" in k}
    given = ["--student", tiny_pair.student, "--max-length", "128"]
    given += [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    shown = kdrun("data", "show", rows, *given)
    assert shown.returncode == 0, shown.stderr
    text = " ".join((shown.stdout + shown.stderr).split())
    assert text.count("the teacher reads") >= 2
    assert "question ask the user ask the user ask the user ask the user again" in text


def test_the_dry_run_counts_a_copy_but_no_adapters_that_are_switched_off(
    rows: Path, tiny_pair: Any
) -> None:
    from kdrun.dry_run.report import dry_run

    given = view(rows, model__teacher="self")
    plain, copied, adapted = (
        dry_run(config_of(tiny_pair, **keys), "cpu").memory
        for keys in (
            {**given, "model__teacher": str(tiny_pair.student)},
            given,
            {**given, "lora__rank": 2},
        )
    )
    assert copied["weights of the teacher"] == plain["weights of the teacher"] != 0
    assert adapted["weights of the teacher"] == 0
