"""Text generation: batches of prompts, and single answers to inspect a student."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrun.builtin import TEACHER_DIR
from kdrun.config.base import BUILT_IN
from kdrun.data.chat import ChatRenderer
from kdrun.data.fields import BadRowError
from kdrun.data.messages import Message
from kdrun.data.templates import USUAL_RENDERING, Rendering
from kdrun.errors import InputError
from kdrun.models.ends import stop_tokens
from kdrun.models.load import load_model
from kdrun.models.locate import STUDENT, ModelSource, holds_model, locate_model
from kdrun.models.tokenizers import load_tokenizer
from kdrun.quiet import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling_temperature: float = 0.0,
    batch_size: int = 16,
) -> list[list[int]]:
    """Continue prompts, in batches of similar length padded on the left.

    Of the model's generation settings, only the end-of-text tokens are used: a repetition penalty,
    for example, would change the distribution of answers.

    Args:
        model: temporarily in evaluation mode; no gradient is recorded.
        tokenizer: provides padding and end tokens.
        prompts: token ids, none empty.
        max_new_tokens: maximum length of a continuation.
        sampling_temperature: 0 takes the most likely token; otherwise the full distribution is
            sampled at this temperature, with torch's global generator.
        batch_size: prompts per batch.

    Returns:
        The new ids of each prompt, in the order of the prompts, without the end token.
    """
    import torch
    from transformers import GenerationConfig

    stops = stop_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(stops, default=0)
    sampled = sampling_temperature > 0
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sampled,
        num_beams=1,
        use_cache=True,
        eos_token_id=sorted(stops) or None,
        pad_token_id=pad,
        **({"temperature": sampling_temperature, "top_p": 1.0, "top_k": 0} if sampled else {}),
    )
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    found: dict[int, list[int]] = {}
    with _for_generation(model):
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            width = len(prompts[batch[-1]])
            ids = torch.full((len(batch), width), pad, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, number in enumerate(batch):
                ids[row, width - len(prompts[number]) :] = torch.tensor(prompts[number])
                mask[row, width - len(prompts[number]) :] = 1
            output: Any = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=settings,
            )
            for number, new in zip(batch, output[:, width:].tolist(), strict=True):
                end = next((i for i, token in enumerate(new) if token in stops), len(new))
                found[number] = new[:end]
    return [found[number] for number in range(len(prompts))]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    rendering: Rendering = USUAL_RENDERING,
    tools: Sequence[dict[str, Any]] | None = None,
) -> list[int]:
    """Return the prompt ids for a model's answer to a conversation, exactly as in training.

    Raises:
        BadRowError: the chat template rejects the conversation.
        InputError: neither the chat template nor the tokenizer has an end for earlier answers.
    """
    text = ChatRenderer(tokenizer, rendering).offering(tools).render_prompt(messages)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def answer(
    model_name: str,
    prompt: str,
    max_new_tokens: int,
    sampling_temperature: float,
    seed: int,
    trust_remote_code: bool,
    say: Callable[[str], None] | None = None,
    rendering: Rendering = USUAL_RENDERING,
) -> Iterator[str]:
    """Generate an answer, prompted exactly as chats are in training.

    Args:
        model_name: a model's folder or hub id, a run's folder, or 'builtin'.
        prompt: the user's message; passed unchanged to a model without a chat template.
        max_new_tokens: maximum length of the answer.
        sampling_temperature: 0 takes the most likely token.
        seed: seed of the sampling.
        trust_remote_code: run Python code that comes with the model.
        say: called with a line for each unused file of the model; None reports nothing.
        rendering: settings of the rendering other than the chat template.

    Yields:
        The text, currently all at once.

    Raises:
        InputError: no such model, an empty prompt, or one that the chat template rejects.
    """
    import torch

    with quiet_libraries():
        source = find_model(model_name)
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
        model = load_model(source, trust_remote_code=trust_remote_code, say=say)
        if tokenizer.chat_template:
            try:
                ids = encode_prompt(tokenizer, [Message("user", prompt)], rendering)
            except BadRowError as error:
                raise InputError(
                    f"--prompt {error}; variables that a template needs are read from the "
                    "folder of a run (data.template_arguments)"
                ) from error
        else:
            ids = list(tokenizer(prompt)["input_ids"])
        if not ids:
            raise InputError("--prompt is empty; pass a text to answer")
        torch.manual_seed(seed)
        (new,) = generate(
            model,
            tokenizer,
            [ids],
            max_new_tokens=max_new_tokens,
            sampling_temperature=sampling_temperature,
        )
    yield tokenizer.decode(new, skip_special_tokens=True)


def find_model(name: str) -> ModelSource:
    """Locate a model to inspect: as for training, or the student in a run's folder.

    Raises:
        InputError: there is no model.
    """
    if name == BUILT_IN:
        return ModelSource(str(TEACHER_DIR))
    if holds_model(Path(name) / STUDENT):
        return locate_model(Path(name) / STUDENT)
    return locate_model(name)


@contextmanager
def _for_generation(model: PreTrainedModel) -> Iterator[None]:
    """Temporarily set evaluation mode and default generation settings."""
    from transformers import GenerationConfig

    training, own = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.train(training)
        model.generation_config = own
