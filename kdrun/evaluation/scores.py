"""Scores of one answer against what it should have been."""

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
"""A minus or point before a digit, but not in a word such as covid-19; the slash of a fraction."""
_PUNCTUATION = re.compile(f"(?!{_OF_NUMBERS})[{re.escape(string.punctuation)}]")


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """ROUGE-L: F measure of the longest common subsequence of stemmed words, 0 to 1.

    The best over the references, as MiniLLM, DistiLLM and GKD's summaries are scored. Words are
    runs of ASCII letters and digits: not for other scripts, where it is always 0.

    Args:
        answer: what the model said.
        references: right answers, at least one.

    Raises:
        InputError: the package rouge-score is not installed.

    Reference: Lin 2004, aclanthology.org/W04-1013; MiniLLM, arXiv:2306.08543.
    """
    found: float = _rouge().score_multi(list(references), answer)["rougeL"].fmeasure
    return found


def exact_match(answer: str, references: Sequence[str], pattern: str) -> float:
    """1 where the final answer is that of one of the references, else 0.

    Case, punctuation, English articles and spaces are left out of the comparison, as for SQuAD
    (Rajpurkar et al. 2016, arXiv:1606.05250). Other than there, what makes another number stays:
    minus, decimal point and the slash of a fraction. Numbers are compared as they are written:
    1,000 is 1000, but 1.50 is not 1.5.

    Args:
        answer: what the model said.
        references: right answers, at least one.
        pattern: regular expression whose first group is the final answer in both; its last match
            counts. ``#### *(.+)`` fits GSM8K, ``(?s)(.*)`` takes the whole text.
    """
    wanted = {_final(reference, pattern) for reference in references} - {None}
    return float(_final(answer, pattern) in wanted)


def check_rouge() -> None:
    """Refuse to begin what could not be scored at its end.

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
