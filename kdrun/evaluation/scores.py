"""Scores of an answer against its references."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from functools import cache
from typing import Any

from kdrun.errors import InputError

_MINUS = "\N{MINUS SIGN}"
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_OF_NUMBERS = r"(?<![^\W\d])-(?=\$?\.?\d)|(?<![^\W\d])\.(?=\d)|(?<=\d)/(?=\d)"
"""A minus or point before a digit, except within a word such as covid-19; a fraction slash."""
_PUNCTUATION = re.compile(f"(?!{_OF_NUMBERS})[{re.escape(string.punctuation)}]")


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """ROUGE-L: F measure of the longest common subsequence of stemmed words, 0 to 1.

    The maximum over the references, as in the evaluations of MiniLLM, DistiLLM and GKD's summaries.
    Words are sequences of ASCII letters and digits, so the score is always 0 for other scripts.

    Args:
        answer: the answer of the model.
        references: reference answers, at least one.

    Raises:
        InputError: the package rouge-score is not installed.

    Reference: Lin 2004, aclanthology.org/W04-1013; MiniLLM, arXiv:2306.08543.
    """
    found: float = _rouge().score_multi(list(references), answer)["rougeL"].fmeasure
    return found


def exact_match(answer: str, references: Sequence[str], pattern: str) -> float:
    """Return 1 if the final answer equals that of a reference, else 0.

    Case, punctuation, English articles and spaces are ignored, as for SQuAD (Rajpurkar et al. 2016,
    arXiv:1606.05250). Unlike there, minus signs, decimal points and fraction slashes are kept,
    because they change a number. Numbers are compared as text: 1,000 equals 1000, but 1.50 does not
    equal 1.5.

    Args:
        answer: the answer of the model.
        references: reference answers, at least one.
        pattern: regular expression whose first group is the final answer, in answer and references;
            the last match counts. ``#### *(.+)`` fits GSM8K, ``(?s)(.*)`` matches the whole text.
    """
    wanted = {_final(reference, pattern) for reference in references} - {None}
    return float(_final(answer, pattern) in wanted)


def check_rouge() -> None:
    """Check that rouge-score is installed, before answers are generated.

    Raises:
        InputError: the package rouge-score is not installed.
    """
    _rouge()


def _final(text: str, pattern: str) -> str | None:
    matches = [match for match in re.finditer(pattern, text) if match[1]]
    if not matches:
        return None
    said = matches[-1][1].lower().replace(_MINUS, "-")
    return " ".join(_ARTICLES.sub(" ", _PUNCTUATION.sub("", said)).split())


@cache
def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError as error:
        raise InputError(
            "scoring answers needs rouge-score, which is not installed: "
            "pip install 'kdlosses[evaluate]', or --answers 0"
        ) from error
    return RougeScorer(["rougeL"], use_stemmer=True)
