"""Section ``features`` of a run's configuration: a term on hidden states."""

from typing import Self

from pydantic import Field, model_validator

from kdrun.config.base import Section


class FeaturesConfig(Section):
    """A loss on the hidden states of paired layers, added to the objective."""

    spec: str | None = Field(
        None,
        description="name of a registered loss on hidden states, with its parameters and layers, "
        "weight and tokens, such as hidden_cosine:layers=uniform,weight=0.1; null adds none",
    )
    chunk_size: int = Field(
        1024, ge=1, description="tokens evaluated at a time; relations take one sequence at a time"
    )

    @model_validator(mode="after")
    def _need_a_spec(self) -> Self:
        self.require("features", "spec")
        return self
