"""Answers to a prompt, for a look at a student."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kdrun.builtin import TEACHER_DIR
from kdrun.config import BUILT_IN
from kdrun.data.chat import ChatRenderer
from kdrun.data.formats import Message
from kdrun.errors import InputError
from kdrun.models.load import load_model
from kdrun.models.locate import ModelSource, holds_model, locate_model
from kdrun.models.tokenizers import load_tokenizer
from kdrun.quiet import quiet_libraries
from kdrun.runs import STUDENT


def answer(
    model_name: str,
    prompt: str,
    max_new_tokens: int,
    sampling_temperature: float,
    seed: int,
    trust_remote_code: bool,
) -> Iterator[str]:
    """Generate an answer, prompted exactly as chats are in training.

    Args:
        model_name: a model's folder or hub id, a run's folder, or 'builtin'.
        prompt: the user's message; given as it is to a model without a chat template.
        max_new_tokens: where the answer is cut.
        sampling_temperature: 0 takes the most likely token.
        seed: of the sampling.
        trust_remote_code: run Python code that comes with the model.

    Yields:
        The text, so far all at once.

    Raises:
        InputError: no such model, or an empty prompt.
    """
    import torch

    with quiet_libraries():
        source = _source(model_name)
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
        model = load_model(source, trust_remote_code=trust_remote_code)
        text = prompt
        if tokenizer.chat_template:
            message = Message("user", prompt)
            text = ChatRenderer(tokenizer).render([message], for_generation=True)
        inputs = tokenizer(
            text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template
        )
        if not inputs["input_ids"].numel():
            raise InputError("--prompt is empty; give the model something to answer")
        torch.manual_seed(seed)
        sampled = sampling_temperature > 0
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=sampled,
            temperature=sampling_temperature if sampled else None,
            top_p=1.0 if sampled else None,
            top_k=0 if sampled else None,
            pad_token_id=tokenizer.pad_token_id,
        )
    new = output[0, inputs["input_ids"].shape[1] :]
    yield tokenizer.decode(new, skip_special_tokens=True)


def _source(name: str) -> ModelSource:
    if name == BUILT_IN:
        return ModelSource(str(TEACHER_DIR))
    if holds_model(Path(name) / STUDENT):
        return locate_model(Path(name) / STUDENT)
    return locate_model(name)
