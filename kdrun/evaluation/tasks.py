"""Tasks of lm-eval (the language model evaluation harness) on loaded models."""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdrun.errors import InputError
from kdrun.paths import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BOOTSTRAPS = 1000  # for metrics without a formula for the standard error


@dataclass(frozen=True)
class TaskChoice:
    """The tasks to run, and their options.

    Attributes:
        names: names of tasks or groups of tasks.
        folder: folder with further task files, or None.
        data: file with the questions of tasks in the folder, for tasks that require one.
        limit: number of questions per task; None uses all.
    """

    names: tuple[str, ...] = ()
    folder: Path | None = None
    data: Path | None = None
    limit: int | None = None

    def as_json(self) -> dict[str, Any]:
        """The choice as JSON for the results file."""
        paths = {"folder": self.folder, "data": self.data}
        return asdict(self) | {key: path and str(path) for key, path in paths.items()}


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: name of the task or group.
        metric: lm-eval's name of the metric, with a comma and the filter if a task has several.
        value: mean over the questions.
        stderr: standard error of the mean; None if lm-eval gives none.
        questions: number of questions; None for a group.
        higher_is_better: direction of the metric, if lm-eval knows it.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    questions: int | None
    higher_is_better: bool | None

    @property
    def title(self) -> str:
        """The title in tables."""
        return f"{self.task} {self.metric}"

    @property
    def shown(self) -> str:
        """The value with its standard error."""
        return f"{self.value:.4f}" + ("" if self.stderr is None else f" ± {self.stderr:.4f}")

    @property
    def explained(self) -> str:
        """Number of questions and direction, as text."""
        parts = [] if self.questions is None else [f"{self.questions} questions"]
        if self.higher_is_better is not None:
            parts.append(f"{'higher' if self.higher_is_better else 'lower'} is better")
        return ", ".join(parts)


class Tasks:
    """Tasks whose files and questions have been loaded.

    Args:
        choice: the tasks to load.

    Raises:
        InputError: lm-eval is not installed, a task is unknown, or its questions cannot be loaded.
    """

    def __init__(self, choice: TaskChoice) -> None:
        self.choice = choice
        _check_paths(choice)
        try:
            import lm_eval.tasks  # noqa: F401
        except ImportError as error:
            raise InputError(
                f"--task {choice.names[0]}: tasks need lm-eval, which is not installed: "
                "pip install 'kdlosses[lm-eval]'"
            ) from error
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        logging.getLogger("huggingface_hub").setLevel(
            logging.ERROR
        )  # hide its retries without a hub
        self._manager = _find(choice)
        for name in choice.names:
            try:
                self._manager.load([name])
            except Exception as error:  # a task runs its own code and the hub client
                raise InputError(_reason(name, error)) from error

    def run(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
    ) -> tuple[list[TaskScore], list[str]]:
        """Evaluate a model on all questions with lm-eval.

        Args:
            model: the model, in evaluation mode.
            tokenizer: the tokenizer of the model.
            batch_size: number of answers per batch.

        Returns:
            The scores, and notes on them.
        """
        import lm_eval.evaluator
        from lm_eval.models.huggingface import HFLM

        # lm-eval calls git, which prints an error outside a repository.
        lm_eval.evaluator.get_git_commit_hash = lambda: None
        asked = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        if not sys.stderr.isatty():  # progress bars only help on a terminal
            for method in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
                setattr(asked, method, partial(getattr(asked, method), disable_tqdm=True))
        with _count_cut_prompts() as cut:
            found = lm_eval.simple_evaluate(
                model=asked,
                tasks=list(self.choice.names),
                task_manager=self._manager,
                limit=self.choice.limit,
                bootstrap_iters=_BOOTSTRAPS,
                log_samples=False,
            )
        assert found is not None, "one process has all results"
        notes = []
        if cut.count:
            notes.append(
                f"tasks: {cut.count} prompts were truncated on the left to fit the context"
            )
        return read_scores(found), notes


class _CutPrompts(logging.Handler):
    """Count the prompts that lm-eval warns about one by one."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Count a prompt that was truncated on the left."""
        self.count += "from the left" in record.getMessage()


@contextmanager
def _count_cut_prompts() -> Iterator[_CutPrompts]:
    logger, handler = logging.getLogger("lm_eval.models.huggingface"), _CutPrompts()
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield handler
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def read_scores(found: dict[str, Any]) -> list[TaskScore]:
    """Read the scores from the results of lm-eval.

    Args:
        found: results; ``results`` by task contains ``"metric,filter"`` and
            ``"metric_stderr,filter"``.
    """
    scores = []
    for task, results in found["results"].items():
        directions = found.get("higher_is_better", {}).get(task, {})
        asked = found.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in results.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = results.get(f"{metric}_stderr,{kind}")
            scores.append(
                TaskScore(
                    task=task,
                    metric=metric if kind == "none" else key,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                    questions=asked,
                    higher_is_better=directions.get(metric),
                )
            )
    return scores


def _check_paths(choice: TaskChoice) -> None:
    for option, path in (("--task-folder", choice.folder), ("--task-data", choice.data)):
        if path is not None and not path.exists():
            raise InputError(f"{option} {path}: not found{did_you_mean(path)}")
    if choice.folder is not None and not choice.folder.is_dir():
        raise InputError(
            f"--task-folder {choice.folder}: is a file; pass the folder that contains it"
        )


def _find(choice: TaskChoice) -> Any:
    """The task index: only the folder's if it has all tasks, since lm-eval's loads slowly."""
    from lm_eval.tasks import TaskManager

    given: dict[str, Any] = {"include_path": None if choice.folder is None else str(choice.folder)}
    if choice.data is not None:
        given["metadata"] = {"data_file": str(choice.data.resolve())}
    if choice.folder is not None:
        own = TaskManager(include_defaults=False, **given)
        if set(choice.names) <= set(own.all_tasks):
            return own
    manager = TaskManager(**given)
    for name in choice.names:
        if name not in manager.all_tasks:
            raise InputError(f"--task {name}: no such task{_close(name, manager.all_tasks)}")
    return manager


def _close(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    if not close:
        return "; 'lm-eval ls tasks' lists them"
    return f"; did you mean {' or '.join(close)}?"


def _reason(name: str, error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"--task {name}: its questions cannot be loaded ({text}); without access to the hub, "
        "use a task file that reads local questions (--task-folder, --task-data)"
    )
