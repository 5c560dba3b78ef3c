"""Section ``served`` of a run's configuration: a teacher on an inference server."""

from typing import Literal

from pydantic import Field

from kdrun.config.base import Section


class ServedConfig(Section):
    """A teacher named by the address of a server (--teacher http://HOST:PORT)."""

    form: Literal["states", "top_k"] | None = Field(
        None,
        description="what the server gives: states are exact for every loss and need its connector "
        "('kdrun served connector') and a common folder; top_k are log-probabilities over HTTP; "
        "null takes states where the server has them",
    )
    model: str | None = Field(
        None, description="name of the model on the server; null takes the only one"
    )
    head: str | None = Field(
        None,
        description="with states: folder or hub id of the teacher's model, of which only the final "
        "norm and the output head are read; null takes what the server names",
    )
    folder: str | None = Field(
        None,
        description="with states: the folder for them as this machine sees it; null is "
        "/dev/shm/kdrun-states",
    )
    space: float = Field(
        2.0, gt=0, description="with states: GiB that they may take in the folder at most"
    )
    top_k: int = Field(64, ge=1, description="with top_k: log-probabilities of each position")
    concurrency: int = Field(8, ge=1, description="requests at a time, of all processes together")
    timeout: float = Field(120.0, gt=0, description="seconds to wait for one answer")
    patience: float = Field(
        120.0, ge=0, description="seconds to wait for a server that is away or busy"
    )
    tokenizer: str | None = Field(
        None,
        description="folder or hub id of the teacher's tokenizer, where the server cannot tokenise",
    )
