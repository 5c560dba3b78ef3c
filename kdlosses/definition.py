"""The base of losses, token weights and losses on hidden states: parameters, traits, state."""

from abc import ABC
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict
from torch import Tensor


class state_variable:  # noqa: N801 - a decorator
    """Declare a state variable of a loss or token weight by its initial value.

    ::

        @state_variable
        def share(self) -> float:
            return self.first_share

    ``integrand``, ``row`` or ``weigh`` reads ``self.share``; ``next_state`` returns its next value.
    The values are stored in the module that evaluates it (in its ``state_dict``), not in the frozen
    definition.
    """

    def __init__(self, start: Callable[[Any], float]) -> None:
        self._start = start
        self.__doc__ = start.__doc__

    def __get__(self, definition: Any, owner: type | None = None) -> Any:
        # Without __set__, an entry in the instance's __dict__ takes precedence (Definition.bind).
        return self if definition is None else self._start(definition)


class Definition(BaseModel, ABC):
    """A pure function with validated hyper-parameters (fields) and declared properties (traits).

    Every hyper-parameter has a default, so that it can be constructed without arguments.

    Attributes:
        expected_failures: names of the checks of :mod:`kdlosses.testing` that it is known to fail,
            each with a reason.
        stateful: it has state; set automatically if a :class:`state_variable` is declared.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, ignored_types=(state_variable,)
    )

    expected_failures: ClassVar[Mapping[str, str]] = MappingProxyType({})
    stateful: ClassVar[bool] = False

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        cls.stateful = bool(cls.state_names())

    @classmethod
    def state_names(cls) -> tuple[str, ...]:
        """The names of the state variables."""
        return tuple(
            name
            for kind in reversed(cls.__mro__)
            for name, value in vars(kind).items()
            if isinstance(value, state_variable)
        )

    def initial_state(self) -> dict[str, float]:
        """The state variables before the first step."""
        return {name: float(getattr(self, name)) for name in self.state_names()}

    def bind(self, values: Mapping[str, Tensor]) -> Self:
        """Return the same definition with some fields or state variables given as tensors.

        Bound values may change without recompilation. They are not validated, because the engine
        binds checked values inside the compiled tile.
        """
        bound: Self = object.__new__(type(self))
        for name, value in {**self.__dict__, **values}.items():
            object.__setattr__(bound, name, value)
        return bound
