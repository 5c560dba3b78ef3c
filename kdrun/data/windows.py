"""Adds to datasets' rows of text: fixed windows over one long list of tokens."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from kdrun.errors import InputError


def check_end_of_text(tokenizer: Any) -> None:
    """Refuse a tokenizer without an end-of-text token, which separates documents.

    Raises:
        InputError: The tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{getattr(tokenizer, 'name_or_path', '') or 'the model'}: its tokenizer has no "
            "end-of-text token, which must separate documents of plain text; set one as eos_token "
            "in its tokenizer_config.json"
        )


def concatenate(texts: Iterable[str], tokenizer: Any) -> list[int]:
    """Join documents into one list of tokens, each ended by the end-of-text token.

    Args:
        texts: The documents.
        tokenizer: A Hugging Face tokenizer with an `eos_token_id`.

    Raises:
        InputError: The tokenizer has none.
    """
    check_end_of_text(tokenizer)
    tokens: list[int] = []
    for text in texts:
        # `verbose=False`: a document may be longer than the model's context, but a window is not.
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        tokens.append(tokenizer.eos_token_id)
    return tokens


def window_phase(seed: int, epoch: int, length: int) -> int:
    """Return where the first window of an epoch starts: uniform in `0 .. length - 1`."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return int(torch.randint(length, (), generator=generator))


class TextWindows(Dataset[dict[str, list[int]]]):
    """Non-overlapping windows of `length` tokens.

    With `phase=True` every epoch cuts the text at different places, so that over the epochs every
    token is predicted from contexts of every length. The number of windows is constant: it is
    the number that fits after the largest phase, and the remainder is dropped.

    A training loop must call `set_epoch`. Loader processes that persist over epochs have copies
    of the data set, which such a call does not reach.
    """

    def __init__(
        self, tokens: Sequence[int], length: int, *, seed: int = 0, phase: bool = True
    ) -> None:
        """Cut a list of tokens.

        Args:
            tokens: The documents' tokens, one after another.
            length: Tokens per window.
            seed: Determines the phases, together with the epoch.
            phase: Whether the windows shift from epoch to epoch; `False` for evaluation.

        Raises:
            ValueError: The tokens do not fill one window.
        """
        if length < 2:
            raise ValueError(f"A window needs at least 2 tokens to predict one; got {length}.")
        self._count = (len(tokens) - (length - 1 if phase else 0)) // length
        if self._count < 1:
            needed = 2 * length - 1 if phase else length
            raise ValueError(
                f"The text has {len(tokens)} tokens; windows of {length} need at least {needed}."
            )
        self._tokens = tokens
        self._length = length
        self._seed = seed
        self._phase = phase
        self._start = 0
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Shift the windows to their positions in an epoch; no effect without `phase`."""
        if self._phase:
            self._start = window_phase(self._seed, epoch, self._length)

    def __len__(self) -> int:
        """The number of windows, in every epoch."""
        return self._count

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        """One window; `labels` are the inputs themselves, not shifted."""
        if not 0 <= index < self._count:
            raise IndexError(index)
        first = self._start + index * self._length
        window = list(self._tokens[first : first + self._length])
        return {"input_ids": window, "labels": list(window)}
