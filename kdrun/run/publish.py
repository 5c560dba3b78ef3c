"""Uploading the finished student to the Hugging Face hub (``trainer.push_to_hub``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from kdrun.errors import InputError, TrainingError
from kdrun.models.locate import STUDENT

if TYPE_CHECKING:
    from kdrun.run.start import Start
    from kdrun.training.trainer import DistillTrainer


@contextmanager
def reporting_hub(arguments: Any) -> Iterator[None]:
    """Turn a failure to create the repository, which the Trainer does first, into one line.

    Raises:
        InputError: with the hub's reason.
    """
    try:
        yield
    except Exception as error:  # of huggingface_hub, or of the network below it
        if not arguments.push_to_hub:
            raise
        raise InputError(
            f"trainer.push_to_hub: the repository cannot be created ({_one_line(error)}); log in "
            "with 'hf auth login', and check trainer.hub_model_id"
        ) from error


def publish(trainer: DistillTrainer, start: Start) -> None:
    """Upload the saved student, if the run asks for it.

    Raises:
        TrainingError: the hub refuses; the student is saved all the same.
    """
    if not trainer.args.push_to_hub or not start.world.is_main:
        return
    from huggingface_hub import HfApi

    folder = start.folder / STUDENT
    name = trainer.hub_model_id
    try:
        HfApi().upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=f"Student after {trainer.state.global_step} steps",
            revision=trainer.args.hub_revision,
        )
    except Exception as error:  # of huggingface_hub, or of the network below it
        raise TrainingError(
            f"the student is saved in {folder}, but it cannot be uploaded ({_one_line(error)}); "
            f"upload it with 'hf upload {name} {folder}'"
        ) from error
    start.say(f"uploaded to {name}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
