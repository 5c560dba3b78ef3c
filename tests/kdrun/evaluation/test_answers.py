"""Greedy answers of tiny models, against one token at a time without cache and padding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from kdrun.config.training_sections import EvaluationConfig
from kdrun.data.formats import ChatRow
from kdrun.data.messages import Message
from kdrun.data.records import Position
from kdrun.evaluation.answers import (
    Asked,
    ask,
    choose_common_questions,
    choose_questions,
    mean_scores,
)
from kdrun.models.context import context_limit
from kdrun.models.generation import generate, stop_tokens


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config)


def step_by_step(model: Any, prompt: list[int], most: int, stops: set[int]) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(most):
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token in stops:
                break
            ids.append(token)
    return ids[len(prompt) :]


def prompts(tokenizer: Any) -> list[list[int]]:
    texts = ("the user", "a", "the assistant gives an answer to the user", "question", "asks a")
    return [tokenizer(text)["input_ids"] for text in texts]


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_padding_batches_and_the_cache_change_nothing(model, tiny_tokenizer, batch_size):
    stops = stop_tokens(model, tiny_tokenizer)
    assert stops == {2}
    given = prompts(tiny_tokenizer)
    found = generate(model, tiny_tokenizer, given, max_new_tokens=12, batch_size=batch_size)
    assert found == [step_by_step(model, prompt, 12, stops) for prompt in given]


def test_an_answer_ends_before_its_end_token_though_it_pads_as_well(model, tiny_tokenizer):
    given = prompts(tiny_tokenizer)
    free = [step_by_step(model, prompt, 12, set()) for prompt in given]
    model.generation_config.eos_token_id = [free[0][3], free[2][5]]
    try:
        stops = stop_tokens(model, tiny_tokenizer)
        assert stops == {2, free[0][3], free[2][5]}
        found = generate(model, tiny_tokenizer, given, max_new_tokens=12)
    finally:
        model.generation_config.eos_token_id = None
    assert found == [step_by_step(model, prompt, 12, stops) for prompt in given]
    assert {len(ids) for ids in found} != {12}


def test_nothing_is_inherited_from_the_models_generation_settings(model, tiny_tokenizer):
    given = prompts(tiny_tokenizer)
    free = generate(model, tiny_tokenizer, given, max_new_tokens=12)
    own = model.generation_config
    model.generation_config = transformers.GenerationConfig(
        repetition_penalty=5.0, do_sample=True, temperature=3.0, num_beams=2, min_new_tokens=3
    )
    model.train()
    try:
        assert generate(model, tiny_tokenizer, given, max_new_tokens=12) == free
        assert model.training
        assert model.generation_config.repetition_penalty == 5.0
    finally:
        model.eval()
        model.generation_config = own


def test_sampling_follows_the_distribution(model, tiny_tokenizer):
    torch.manual_seed(0)
    prompt = tiny_tokenizer("the user")["input_ids"]
    drawn = generate(
        model,
        tiny_tokenizer,
        [prompt] * 3000,
        max_new_tokens=1,
        sampling_temperature=2.0,
        batch_size=3000,
    )
    with torch.no_grad():
        expected = (model(torch.tensor([prompt])).logits[0, -1].double() / 2).softmax(-1)
    counts = torch.zeros(300, dtype=torch.float64)
    for ids in drawn:
        counts[ids[0] if ids else 2] += 1
    error = (expected * (1 - expected) / 3000).sqrt()
    assert ((counts / 3000 - expected).abs() <= 5 * error + 1e-3).all()
    assert (counts > 0).sum() > 20


def chat(question: str, answer: str) -> ChatRow:
    return ChatRow((Message("user", question), Message("assistant", answer)), Position("f", 1))


def asked(model, tokenizer) -> Asked:
    return Asked(tokenizer, context_limit(model.config))


def test_rows_with_one_prompt_are_one_question_in_any_order(model, tiny_tokenizer):
    rows = [chat("a", "b"), chat("a", "c"), chat("the user", "d"), chat("x" * 99, "e")]
    config = EvaluationConfig(answers=9, max_new_tokens=8)
    one = asked(model, tiny_tokenizer)
    found, note = choose_questions(rows, one, config)
    again, _ = choose_questions(rows[::-1], one, config)
    assert [q.prompt_ids for q in found] == [q.prompt_ids for q in again]
    assert sorted(len(q.references) for q in found) == [1, 2]
    assert note is not None
    assert note.startswith("answers: to 2 of 3 held-out prompts")
    assert "1 prompts that leave no room" in note
    text = tiny_tokenizer.decode(found[0].prompt_ids)
    assert text.endswith("<|im_start|>assistant\n")


def test_models_with_other_contexts_are_asked_the_same(tiny_tokenizer):
    rows = [chat("a", "b"), chat("the user", "c"), chat("x" * 30, "d")]
    config = EvaluationConfig(answers=9, max_new_tokens=8)
    plain = copy.deepcopy(tiny_tokenizer)
    plain.chat_template = None
    models = [Asked(tiny_tokenizer, None), Asked(plain, None), Asked(tiny_tokenizer, 40)]
    (free, other, small), note = choose_common_questions(rows, models, config)
    asked = [question.messages[-1].content for question in free]
    assert sorted(asked) == ["a", "the user"]
    for questions in (other, small):
        assert [question.messages[-1].content for question in questions] == asked
    assert [q.prompt_ids for q in small] == [q.prompt_ids for q in free]
    texts = [plain.decode(question.prompt_ids) for question in other]
    assert texts == [f"{words}\n" for words in asked]
    assert note is not None
    assert "1 prompts that leave no room" in note


def test_questions_are_scored_by_their_best_reference(model, tiny_tokenizer):
    rows = [chat("a", "b"), chat("the user", "d")]
    config = EvaluationConfig(answers=2, max_new_tokens=8, answer_pattern="(?s)(.+)")
    one = asked(model, tiny_tokenizer)
    questions, _ = choose_questions(rows, one, config)
    ids = generate(model, tiny_tokenizer, [q.prompt_ids for q in questions], max_new_tokens=8)
    said = [tiny_tokenizer.decode(new, skip_special_tokens=True) for new in ids]
    taught = [chat(q.messages[0].content, text) for q, text in zip(questions, said, strict=True)]
    questions, _ = choose_questions([*rows, *taught], one, config)
    answers = ask(model, tiny_tokenizer, questions, config)
    assert [answer.text for answer in answers] == said
    assert all(answer.line()["answer"] == answer.text for answer in answers)
    assert mean_scores(answers)["exact_match"] == sum(any(c.isalnum() for c in t) for t in said) / 2


def test_plain_text_asks_nothing(model, tiny_tokenizer):
    from kdrun.data.formats import TextRow

    rows = [TextRow("text", Position("f", 1))]
    found, note = choose_questions(rows, asked(model, tiny_tokenizer), EvaluationConfig(answers=3))
    assert found == []
    assert note is not None
    assert "plain text" in note
    assert choose_questions(rows, asked(model, tiny_tokenizer), EvaluationConfig()) == ([], None)
    assert mean_scores([]) == {"rouge_l": None, "exact_match": None}
