"""Adds to transformers' chat templates: which one renders a run's rows, and with what settings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from kdrun.data.turn_ends import name_of
from kdrun.errors import InputError
from kdrun.paths import expand_home

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kdrun.config.data_section import DataConfig

PLAIN_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{{ '\\n' }}{% endif %}"
    "{% for message in messages %}{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}{{ call['function'] | tojson }}{% endfor %}"
    "{% if message['role'] == 'assistant' and eos_token %}{{ eos_token }}"
    "{% else %}{{ '\\n' }}{% endif %}"
    "{% endfor %}"
)
_JOINED_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
_CLOCK = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<form>.*?)(?P=quote)\s*\)""")


@dataclass(frozen=True, slots=True)
class Rendering:
    """Settings that determine the text of a conversation besides the tokenizer's template.

    Attributes:
        date: The date, in ISO form, for templates that include one; None is today.
        rendered: Whether messages are already rendered and only concatenated.
        arguments: Further variables of the template.
        reasoning: Whether the reasoning of answers stays in the text.
        supervise: Which answers are targets.
    """

    date: str | None = None
    rendered: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    reasoning: Literal["keep", "drop"] = "keep"
    supervise: Literal["all", "last"] = "all"

    @classmethod
    def of(cls, data: DataConfig) -> Rendering:
        """Return the rendering of a run's rows."""
        return cls(
            data.date, data.rendered, data.template_arguments, data.reasoning, data.supervise
        )

    @property
    def key(self) -> list[Any]:
        """Everything but the date, as JSON can hold it."""
        return [self.rendered, dict(self.arguments), self.reasoning, self.supervise]

    def dated(self, template: str) -> str:
        """Return a chat template that uses :attr:`date` as the current date.

        transformers gives every template a clock, ``strftime_now``, which those of Llama 3 and
        others use: a run's rows would otherwise change from day to day.
        """
        if self.date is None:
            return template
        noon = datetime.fromisoformat(f"{self.date}T12:00:00")
        return _CLOCK.sub(lambda call: json.dumps(noon.strftime(call["form"])), template)


USUAL_RENDERING = Rendering()


def template_of(tokenizer: PreTrainedTokenizerBase, rendering: Rendering) -> str:
    """Return the template for rendering conversations.

    Raises:
        InputError: the tokenizer has several, and none is the default.
    """
    if rendering.rendered:
        return _JOINED_TEMPLATE
    if not tokenizer.chat_template:
        return _plain_template(tokenizer)
    named = tokenizer.chat_template
    if isinstance(named, dict) and "default" not in named:
        raise InputError(
            f"{name_of(tokenizer)}: the tokenizer has several chat templates "
            f"({', '.join(sorted(named))}) and none called default; keep one of them as its "
            "chat_template"
        )
    return rendering.dated(tokenizer.get_chat_template())


def read_template(
    file: str, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]
) -> str:
    """Read a chat template and try it, with its further variables, on a question and its answer.

    Raises:
        InputError: it cannot be read, or is broken; names its line.
    """
    from jinja2 import TemplateSyntaxError

    try:
        text = expand_home(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise InputError(f"data.template={file}: cannot be read ({reason})") from error
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        tokenizer.apply_chat_template(talk, chat_template=text, tokenize=False, **arguments)
    except TemplateSyntaxError as error:
        raise InputError(f"data.template={file}, line {error.lineno}: {error.message}") from error
    except Exception as error:  # a template may raise whatever it likes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"data.template={file}: fails on a question with an answer ({reason})"
        ) from error
    return text


def uses_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the chat template uses the current date."""
    return "strftime_now" in json.dumps(tokenizer.chat_template)


def _plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return `PLAIN_TEMPLATE`, after a begin-of-text token if the tokenizer prepends one."""
    bos = tokenizer.bos_token_id
    begins = bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]
    return ("{{ bos_token }}" if begins else "") + PLAIN_TEMPLATE
