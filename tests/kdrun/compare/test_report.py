"""The report says all there is to say, of any comparison, whatever its losses are called."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from browser import Browser, find
from rich.console import Console
from synthetic import BASELINE, HOSTILE, arm, comparison, record, records_of

from kdrun.compare.labels import label_arms
from kdrun.compare.record import Trial
from kdrun.compare.report import ReportInput, print_table, write_report
from kdrun.compare.report.content import summarise
from kdrun.evaluation.yardsticks import YARDSTICKS

for package in ("scipy", "matplotlib", "jinja2"):
    pytest.importorskip(package)

CE, FORWARD_KL = YARDSTICKS[0], YARDSTICKS[1]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    write_report(comparison(hostile=True), folder)
    return folder


@pytest.fixture(scope="module")
def page(hostile):
    return (hostile / "report.html").read_text(encoding="utf-8")


def text_of(html):
    """What a reader sees, and the attributes of elements of one name."""
    texts, scripts = [], []

    class Reader(HTMLParser):
        inside = ""

        def handle_starttag(self, tag, attributes):
            self.inside = tag
            if tag == "script":
                scripts.append("")

        def handle_data(self, data):
            if self.inside == "script":
                scripts[-1] += data
            elif self.inside != "style":
                texts.append(data)

        def handle_endtag(self, tag):
            self.inside = ""

    Reader().feed(html)
    return " ".join(" ".join(texts).split()), scripts


def test_the_files(hostile):
    names = {"differences", "curves", "speed"}
    expected = {f"{name}.{kind}" for name in names for kind in ("svg", "png")}
    assert {path.name for path in (hostile / "figures").iterdir()} == expected
    files = {path.name for path in hostile.iterdir()}
    assert files == {"report.html", "results.csv", "results.tex", "figures"}
    for path in (hostile / "figures").glob("*.svg"):
        ElementTree.parse(path)
    for path in (hostile / "figures").glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_verdict_comes_first(page):
    text, _ = text_of(page)
    assert text.index("forward_kl_chunked is better than cross-entropy alone") < text.index(
        "Learning curves"
    )
    for word in (
        *("better", "equivalent", "identical", "undecided", "worse", "diverged in 1 of 5 seeds"),
        *("seeds would show a difference of 0.02", "untrained student", "teacher"),
    ):
        assert word in text


def test_nothing_is_dropped_in_silence(page, hostile):
    text, _ = text_of(page)
    assert "Unfinished: 2 of 58 trials have not run" in text
    assert "Trials that did not finish: 1 diverged, 1 failed" in text
    assert "the loss is nan at step 12 <b>" in text
    assert "out of memory" in text
    assert text.count("not run taid_chunked, seed") == 2
    rows = list(csv.DictReader(io.StringIO((hostile / "results.csv").read_text("utf-8"))))
    statuses = [row["status"] for row in rows]
    assert [statuses.count(s) for s in ("done", "diverged", "failed", "missing")] == [54, 1, 1, 2]


def test_each_trial_has_its_command_and_environment(page):
    text, _ = text_of(page)
    given = comparison(hostile=True)
    for one in given.records:
        if one.command:
            assert " ".join(one.command.split()) in text
    assert "Environment 1" in text
    assert "AMD EPYC" in text
    assert "2.13.0" in text


def test_arms_that_train_on_a_yardstick_are_marked(page):
    text, _ = text_of(page)
    assert (
        "Trained on the primary yardstick, cross-entropy: cross-entropy alone (wholly) and "
        "all other arms (in part)"
    ) in text
    rows = re.findall(
        r"<tr>\s*<th scope=\"row\"><code>(.*?)</code></th>(.*?)</tr>", page, re.DOTALL
    )
    cells = {name: re.findall(r"<td[^>]*>(.*?)</td>", row) for name, row in rows}
    assert cells["cross-entropy alone"][2].endswith("†")
    assert cells["forward_kl_chunked"][3].endswith("‡")
    assert not cells["reverse_kl_chunked"][3].endswith("‡")


def test_names_are_harmless_in_html(page):
    text, scripts = text_of(page)
    assert len(scripts) == 1
    assert "alert" not in scripts[0]
    assert HOSTILE not in page
    assert HOSTILE in text
    assert "default-src 'none'" in page
    assert not re.search(r"""(?:src|href)=["'](?!data:,|#)""", page)
    assert "url(http" not in page


def test_names_are_harmless_in_csv(hostile):
    rows = list(csv.reader(io.StringIO((hostile / "results.csv").read_text("utf-8"))))
    assert len({len(row) for row in rows}) == 1
    cells = [cell for row in rows[1:] for cell in row]
    assert "'=1+1" in cells
    for cell in cells:
        if cell.startswith(("=", "+", "@", "-", "\t", "\r")):
            float(cell)


@pytest.mark.parametrize("prefix", ["=", "+", "-", "@", "\t", "\r"])
def test_no_text_starts_a_formula(prefix, tmp_path):
    loss = f"{prefix}cmd|' /C calc'!A0"
    records = [record(arm(loss), 0, 1.0, command=f"{prefix}x"), record(BASELINE, 0, 1.1)]
    write_report(given_of(records), tmp_path)
    with open(tmp_path / "results.csv", encoding="utf-8", newline="") as stream:
        row = next(row for row in csv.DictReader(stream) if "calc" in row["loss"])
    assert row["loss"].startswith(("'", " "))
    assert row["loss"][1:].lstrip(prefix) == loss[1:]
    assert row["command"].startswith(("'", " "))


def test_names_are_harmless_in_latex(hostile):
    latex = (hostile / "results.tex").read_text(encoding="utf-8")
    assert r"\textless{}script\textgreater{}alert(1)\textless{}/script\textgreater{}" in latex
    hostile_name = (
        r"\_private\_50\%\&\$x\$\#\{a\}\textasciicircum{}\textasciitilde{}\textbackslash{}"
    )
    assert hostile_name in latex
    for line in latex.splitlines():
        if line.startswith("%"):
            continue
        bare = re.sub(r"\\[_%&$#{}\\]", "", line).replace("$-$", "").replace(r"$\pm$", "")
        assert not re.search(r"[_%$#^~<>|\"]", bare), line
        assert bare.count("{") == bare.count("}")
    columns = [line.count(" & ") for line in latex.splitlines() if line.endswith(r" \\")]
    # An arm, its verdict, difference and interval; an arm, what was measured, speed and memory.
    measured = [y for y in YARDSTICKS if any(r.measures.get(y.name) for r in comparison().records)]
    assert set(columns) == {3, len(measured) + 2}


def given_of(records, trials=(), **more):
    values = {
        "title": "t",
        "records": records,
        "trials": trials,
        "baseline": BASELINE,
        "yardstick": CE,
        "difference": 0.02,
    }
    return ReportInput(**(values | more))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (given_of([]), "There is nothing to compare"),
        (
            given_of([], [Trial(arm=of, seed=0) for of in (BASELINE, arm("forward_kl"))]),
            "No verdict on cross-entropy of held-out rows is possible yet",
        ),
        (
            given_of([record(BASELINE, 0, 1.0), record(arm("forward_kl"), 0, 1.1)]),
            "one seed finished by both this arm and the baseline; an interval needs two",
        ),
        (
            given_of([record(BASELINE, 0, {}, status="failed", reason="full disk")]),
            "full disk",
        ),
        (
            given_of(
                [
                    *(record(BASELINE, s, 1.0 + s) for s in (0, 1)),
                    *(record(arm("x"), s, {}, status="diverged") for s in (0, 1)),
                ]
            ),
            "No verdict on cross-entropy of held-out rows is possible: every arm diverged except "
            "the baseline.",
        ),
        (
            given_of(
                [
                    record(of, s, {}, status="diverged")
                    for of in (BASELINE, arm("x"))
                    for s in (0, 1)
                ]
            ),
            "is possible: every arm diverged.",
        ),
        (
            given_of(
                [
                    *(record(BASELINE, s, {}, status="diverged") for s in (0, 1)),
                    *(record(arm("x"), s, 1.0 + s) for s in (0, 1)),
                ]
            ),
            "is possible: the baseline diverged.",
        ),
        (
            given_of([record(BASELINE, 0, 1.0), record(arm("forward_kl"), 0, 1.1)]),
            "is possible; the table gives the reason for each arm.",
        ),
        (
            given_of(
                [
                    record(of, s, {"forward_kl": 1.0 + s})
                    for of in (BASELINE, arm("x"))
                    for s in (0, 1)
                ],
                yardstick=FORWARD_KL,
            ),
            "No arm is shown to be better",
        ),
    ],
)
def test_unfinished_comparisons_have_a_report(given, said, tmp_path):
    text, _ = text_of(write_report(given, tmp_path).read_text(encoding="utf-8"))
    assert said in text
    print_table(given, Console(file=io.StringIO(), width=80))


@pytest.mark.parametrize(
    ("difference", "shown"), [(0.0005, "−0.00040 ("), (0.02, "+0.000 ("), (0.5, "+0.000 (")]
)
def test_numbers_are_as_fine_as_the_difference_of_interest(difference, shown, tmp_path):
    small = {BASELINE: [3.0, 3.1, 3.2], arm("x"): [2.9996, 3.09961, 3.19959]}
    given = given_of(records_of(small), difference=difference)
    text, _ = text_of(write_report(given, tmp_path).read_text(encoding="utf-8"))
    assert shown in text
    stream = io.StringIO()
    print_table(given, Console(file=stream, width=140))
    assert shown in stream.getvalue()


def test_tuning_is_shown_apart(tmp_path):
    slow, fast = arm("forward_kl", lr=1e-4), arm("forward_kl", lr=1e-3)
    records = [record(slow, 5, 1.2, stage="tuning"), record(fast, 5, 1.1, stage="tuning")]
    records += [record(of, s, 1 + s / 7) for of in (BASELINE, fast) for s in (0, 1)]
    given = given_of(records)
    summary = summarise(given)
    assert [(label, chosen) for label, _, chosen in summary.tuned] == [
        ("forward_kl, lr 0.0001", False),
        ("forward_kl, lr 0.001", True),
    ]
    assert [one.arm for one in summary.arms] == [BASELINE, fast]
    text, _ = text_of(write_report(given, tmp_path).read_text(encoding="utf-8"))
    assert "Tuning cross-entropy on validation rows" in text


def test_labels_name_what_varies():
    arms = [BASELINE, arm("a", 0.5), arm("a", 1.0), arm("b", 0.5, student="t")]
    assert list(label_arms(arms).values()) == [
        "cross-entropy alone, student s",
        "a, ratio 0.5, student s",
        "a, ratio 1, student s",
        "b, ratio 0.5, student t",
    ]
    assert list(label_arms([BASELINE, arm("a\nb")]).values()) == ["cross-entropy alone", "a b"]


def test_the_same_input_gives_the_same_files(tmp_path):
    given = dataclasses.replace(comparison(seeds=2), notes=())
    for name in ("one", "other"):
        write_report(given, tmp_path / name)
    for path in (tmp_path / "one").rglob("*.*"):
        assert (
            path.read_bytes()
            == (tmp_path / "other" / path.relative_to(tmp_path / "one")).read_bytes()
        )


def test_the_terminal_tells_the_same():
    stream = io.StringIO()
    print_table(comparison(hostile=True), Console(file=stream, width=140))
    text = stream.getvalue()
    for word in (HOSTILE, "better", "identical", "diverged", "untrained student", "out of memory"):
        assert word in text
    assert "Unfinished" in text


def test_without_the_extra_one_line_says_what_to_install():
    code = (
        "import sys; sys.modules['scipy'] = None\n"
        "from kdrun.errors import InputError\n"
        "try:\n    import kdrun.compare.statistics\n"
        "except InputError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == (
        "comparisons need scipy, which is not installed: pip install 'kdlosses[compare]'\n"
    )


def test_importing_the_report_imports_nothing_heavy():
    code = (
        "import sys, kdrun.compare.report\n"
        "heavy = {'scipy', 'matplotlib', 'jinja2', 'torch', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    executable = find()
    if executable is None:
        pytest.skip("no Chromium is installed")
    opened = Browser(executable, tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_fits_its_window(browser, hostile, width, scheme):
    browser.look(width, scheme)
    browser.open(hostile / "report.html")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    shown = browser.evaluate(
        "[...document.querySelectorAll('.drawing')].filter(d => d.offsetWidth)"
        ".map(d => d.className)"
    )
    assert shown == [f"drawing {'narrow' if width == 400 else 'wide'}"] * 3
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", ground))) < 60) == (scheme == "dark")
    ink = browser.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
    assert (min(map(int, re.findall(r"\d+", ink)[:3])) > 150) == (scheme == "dark")
    # Small text in a picture is scaled with it.
    sizes = browser.evaluate(
        "[...document.querySelectorAll('.drawing svg text')].filter(t => t.getBoundingClientRect()"
        ".height).map(t => [t.getScreenCTM(), parseFloat(getComputedStyle(t).fontSize)])"
        ".map(([m, size]) => size * Math.hypot(m.a, m.b))"
    )
    assert min(sizes) >= 9


def test_nothing_goes_wrong_and_nothing_is_fetched(browser, hostile):
    browser.problems.clear()
    browser.requests.clear()
    browser.open(hostile / "report.html")
    browser.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    browser.evaluate("document.querySelectorAll('th button').forEach(b => b.click())")
    assert browser.problems == []
    page = (hostile / "report.html").as_uri()
    assert [url for url in browser.requests if url not in (page, "data:,")] == []


COLUMN = (
    "JSON.stringify([...document.querySelectorAll('.sortable tbody tr')]"
    ".map(r => [r.cells[0].textContent.trim(), r.cells[{}].dataset.value || ''][{}]))"
)
SORTS = (
    "JSON.stringify([...document.querySelectorAll('.sortable thead th')]"
    ".map(h => h.getAttribute('aria-sort')))"
)


def test_the_table_sorts_by_click_and_by_key(browser, hostile):
    browser.open(hostile / "report.html")
    button = "document.querySelectorAll('.sortable th button')[{}]"
    ce, arms = COLUMN.format(3, 1), COLUMN.format(0, 0)
    assert set(json.loads(browser.evaluate(SORTS))) == {None}

    browser.evaluate(f"{button.format(3)}.click()")
    column = json.loads(browser.evaluate(ce))
    known = [float(value) for value in column if value]
    assert known == sorted(known)
    assert column[-1] == ""  # an arm without a measure
    assert json.loads(browser.evaluate(SORTS))[3] == "ascending"

    browser.evaluate(f"{button.format(3)}.focus()")
    browser.press("Enter", 13)
    column = json.loads(browser.evaluate(ce))
    known = [float(value) for value in column if value]
    assert known == sorted(known, reverse=True)
    assert column[-1] == ""
    assert json.loads(browser.evaluate(SORTS))[3] == "descending"

    browser.evaluate(f"{button.format(0)}.focus()")
    browser.press(" ", 32)
    names = json.loads(browser.evaluate(arms))
    assert names.index("alpha_beta_chunked:alpha=0.2,beta=0.7") < names.index("forward_kl_chunked")
    sorts = json.loads(browser.evaluate(SORTS))
    assert (sorts[0], sorts[3]) == ("ascending", None)


def test_scripts_other_than_the_page_s_own_do_not_run(browser, hostile, tmp_path):
    """Should an escape ever be missed, the page's policy still holds."""
    page = (hostile / "report.html").read_text(encoding="utf-8")
    broken = tmp_path / "broken.html"
    broken.write_text(page.replace("</h1>", "<script>window.ran = 1</script></h1>"), "utf-8")
    browser.open(broken)
    assert browser.evaluate("window.ran === undefined")
