"""Adds to transformers' chat templates: what ends an answer, a token or the end of the text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdrun.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TurnEnds:
    """The tokens of a tokenizer that may end an answer.

    Args:
        tokenizer: The tokenizer that both models use.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Read the tokenizer's tokens."""
        self._tokenizer = tokenizer
        self.special = tuple(special_tokens(tokenizer))
        self._added = (
            *self.special,
            *(token.content for token in tokenizer.added_tokens_decoder.values()),
        )

    def is_end(self, ending: str) -> bool:
        """Return whether the text that a template writes after an answer ends it with a token."""
        return ending.rstrip().endswith(self._added)

    def ends_itself(self, answer: str) -> bool:
        """Return whether a rendered answer already includes its end."""
        return answer.rstrip().endswith(self.special)

    def opening(self, text: str) -> int:
        """Return the length of a text's leading special token, including white space before it.

        The begin-of-text token does not count: no model ends an answer with it.
        """
        rest = text.lstrip()
        begin = self._tokenizer.bos_token
        found = (token for token in self.special if token != begin and rest.startswith(token))
        token = max(found, key=len, default="")
        return len(text) - len(rest) + len(token) if token else 0

    def end_of_text(self) -> str:
        """Return the end-of-text token.

        Raises:
            InputError: It does not exist.
        """
        end = self._tokenizer.eos_token
        if end is None:
            raise InputError(
                f"{name_of(self._tokenizer)}: its tokenizer has no end-of-text token, and no chat "
                "template that ends answers with a token, so the student would never learn to "
                "stop; set one as eos_token in its tokenizer_config.json"
            )
        return str(end)


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the ids of control tokens, such as the end of a turn."""
    added = tokenizer.added_tokens_decoder
    found = {token.content: number for number, token in added.items() if token.special}
    own = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    return found | dict(own)


def name_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the name of a tokenizer's folder, for messages."""
    return getattr(tokenizer, "name_or_path", "") or "the model"
