"""Adds to datasets' lazy rows: sequences of anything made only when it is looked at."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar, overload

T = TypeVar("T", covariant=True)


class Lazy(Sequence[T]):
    """A sequence that makes an element on each access; a slice is a list of elements."""

    @abstractmethod
    def element(self, number: int) -> T:
        """Make an element; the number is from 0 to the length less 1."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: Any) -> Any:
        """Return an element, or a list of them."""
        numbers = range(len(self))[index]
        if isinstance(numbers, range):
            return [self.element(number) for number in numbers]
        return self.element(numbers)
