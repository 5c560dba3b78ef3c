"""Scores of answers, against numbers counted by hand."""

import pytest

from kdrun.config.training_sections import EvaluationConfig
from kdrun.evaluation.scores import exact_match, rouge_l


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        # Longest common subsequence 3 of 4 and 3 words: precision 3/4, recall 1.
        ("the big cat sat", ["the cat sat"], 2 * 0.75 / 1.75),
        # Stems agree: running and runs, dogs and dog.
        ("running dogs", ["runs dog"], 1.0),
        # Order counts: of "b a" against "a b" one word is left.
        ("b a", ["a b"], 0.5),
        # The best of several references.
        ("yes", ["certainly not", "yes"], 1.0),
        ("", ["something"], 0.0),
        ("something", ["..."], 0.0),
    ],
)
def test_rouge_l(answer, references, expected):
    assert rouge_l(answer, references) == pytest.approx(expected)


GSM8K = "#### *(.+)"


@pytest.mark.parametrize(
    ("answer", "references", "pattern", "expected"),
    [
        ("so 40 + 2\n#### 42", ["6 * 7\n#### 42"], GSM8K, 1),
        ("#### 1,000", ["#### 1000"], GSM8K, 1),
        ("#### 41\n#### 42", ["#### 42"], GSM8K, 1),
        ("42", ["#### 42"], GSM8K, 0),
        ("####", ["####"], GSM8K, 0),
        ("The  Answer.", ["answer"], "(?s)(.*)", 1),
        ("an answer", ["another"], "(?s)(.*)", 0),
        ("b", ["a", "B!"], "(?s)(.*)", 1),
        # What makes another number counts, what surrounds it does not.
        ("#### -5", ["#### 5"], GSM8K, 0),
        ("#### -5.", ["#### -5"], GSM8K, 1),
        ("#### \N{MINUS SIGN}5", ["#### -5"], GSM8K, 1),
        ("#### -$5", ["#### $5"], GSM8K, 0),
        ("#### 1.50", ["#### 150"], GSM8K, 0),
        ("#### $1.50.", ["#### 1.50"], GSM8K, 1),
        ("#### .5", ["#### 5"], GSM8K, 0),
        ("#### 1/2", ["#### 12"], GSM8K, 0),
        ("#### (1/2)", ["#### 1/2"], GSM8K, 1),
        ("#### 1,000.", ["#### 1000"], GSM8K, 1),
        ("COVID-19", ["covid19."], "(?s)(.*)", 1),
        ("and/or", ["andor"], "(?s)(.*)", 1),
    ],
)
def test_exact_match(answer, references, pattern, expected):
    assert exact_match(answer, references, pattern) == expected


@pytest.mark.parametrize("pattern", ["[", "no group"])
def test_patterns_without_an_answer_are_refused(pattern):
    with pytest.raises(ValueError, match=r"group|regular"):
        EvaluationConfig(answer_pattern=pattern)
