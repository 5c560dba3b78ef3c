"""Losses from files that are not installed."""

import hashlib
import pickle

import pytest
import torch

from kdlosses import BrokenLossError, LossSpecError, find_loss, get_loss, loss_files, parse_spec
from kdlosses.testing import check_loss

TEXT = '''
from pydantic import Field
from kdlosses import Divergence, RowLoss


class Scaled(Divergence):
    """Scaled squares, sum w (p - q)^2 with w = weight.

    Reference: none.
    """

    weight: float = Field(1.0, gt=0, le=10, description="the factor")

    def integrand(self, teacher_log_probs, student_log_probs):
        gap = teacher_log_probs.exp() - student_log_probs.exp()
        return self.weight * gap * gap


class Unfinished(RowLoss):
    pass


class Nothing:
    pass
'''


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "my_loss.py"
    path.write_text(TEXT, encoding="utf-8")
    return path


def value(spec, **options):
    student, teacher = torch.tensor([[[0.5, 0.5]], [[0.25, 0.75]]]).log()
    return get_loss(spec, **options)(student, teacher, torch.tensor([0])).item()


@pytest.mark.parametrize("folder", ["", "./", "sub-folder/", "absolute"])
def test_a_class_of_a_file_is_a_loss(file, folder):
    if folder == "sub-folder/":
        (file.parent / folder).mkdir()
        file.rename(file.parent / folder / file.name)
    path = str(file) if folder == "absolute" else f"{folder}my_loss.py"
    assert value(f"{path}:Scaled") == pytest.approx(0.125)
    assert value(f"{path}:Scaled:weight=3") == pytest.approx(0.375)
    chunked = value(f"{path}:Scaled_chunked:weight=3", chunk_size=1, compiled=False)
    assert chunked == pytest.approx(0.375)
    ref = find_loss(f"{path}:Scaled")
    assert (ref.distribution, ref.name) == ("file", f"{path}:Scaled")


@pytest.mark.parametrize(
    "first", ["forward_kl", "my_loss.py:Scaled:weight=2", "./my_loss.py:Scaled"]
)
def test_sums_with_files(file, first):
    spec = f"0.5*{first}+2*./my_loss.py:Scaled:weight=4"
    assert value(spec) == pytest.approx(0.5 * value(first) + 1.0)
    assert parse_spec(parse_spec(spec).text(chunked=True)).chunked
    assert parse_spec(parse_spec(spec).text(chunked=True)).terms == parse_spec(spec).terms


def test_it_conforms_and_is_a_value(file):
    check_loss("my_loss.py:Scaled:weight=2")
    loss = get_loss("my_loss.py:Scaled").loss
    assert pickle.loads(pickle.dumps(loss)) == loss == get_loss("./my_loss.py:Scaled").loss


def test_a_changed_file_is_another_loss(file):
    before = loss_files("0.5*my_loss.py:Scaled+forward_kl")
    assert before == {"my_loss.py": hashlib.sha256(TEXT.encode()).hexdigest()}
    old = get_loss("my_loss.py:Scaled").loss
    file.write_text(TEXT.replace("gap * gap", "gap.abs()"), encoding="utf-8")
    assert loss_files("my_loss.py:Scaled_chunked") != before
    assert value("my_loss.py:Scaled") == pytest.approx(0.5)
    assert type(old) is not type(get_loss("my_loss.py:Scaled").loss)
    assert loss_files("forward_kl") == {}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("other.py:Scaled", "there is no file other.py$"),
        ("my_los.py:Scaled", "there is no file my_los.py, did you mean 'my_loss.py'"),
        ("my_loss.py:Scald", "no class 'Scald', did you mean 'Scaled'.; it has Scaled, Unfinished"),
        ("my_loss.py:Nothing", "Nothing is not a subclass of kdlosses.Divergence or RowLoss"),
        ("my_loss.py:Unfinished", "Unfinished does not define row"),
        ("my_loss.py:Field", "Field is not a subclass"),
        ("my_loss.py", "FILE.py:CLASS, such as my_loss.py:Scaled or my_loss.py:Scaled_chunked"),
        ("none.py", "FILE.py:CLASS, such as none.py:MyLoss"),
        (".:Scaled", "expected a name"),
        ("my_loss.py:Scaled:wait=1", "no parameter 'wait', did you mean 'weight'"),
        ("my_loss.py:Scaled:weight=11", "weight='11'"),
        ("my_loss.py:Scaled_chunked+my_loss.py:Scaled:weight=2", "write _chunked after my_loss.py"),
    ],
)
def test_mistakes_are_one_line(file, spec, message):
    with pytest.raises(LossSpecError, match=message) as caught:
        get_loss(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class A(:\n", "line 1: SyntaxError"),
        ("\n\nx = unknown\nclass A: pass\n", "line 3: NameError: name 'unknown'"),
        ("def f():\n    raise OSError('a\\nb')\nf()\nclass A: pass\n", "line 2: OSError: a b"),
        ("import nowhere\nclass A: pass\n", "line 1: ModuleNotFoundError"),
        ("import beside\nclass A: pass\n", "must not import files beside it"),
        ("import sys\nsys.exit(3)\nclass A: pass\n", "line 2: SystemExit: 3"),
        ("class A: pass\nx = '\\0'\0", "cannot be loaded"),
    ],
)
def test_a_file_that_cannot_be_loaded_names_its_line(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.py").write_text(text, encoding="utf-8")
    (tmp_path / "beside.py").write_text("", encoding="utf-8")
    with pytest.raises(BrokenLossError, match=message) as caught:
        get_loss("bad.py:A")
    assert "\n" not in str(caught.value)
    assert "KDLOSSES_DEBUG=1" in str(caught.value)
    monkeypatch.setenv("KDLOSSES_DEBUG", "1")
    with pytest.raises(BrokenLossError, match="Traceback"):
        get_loss("bad.py:A")


def test_a_folder_is_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(LossSpecError, match="cannot be read"):
        get_loss("folder.py:A")


def test_names_of_folders_have_no_path(file):
    terms = parse_spec("a/b/my_loss.py:Scaled_chunked:weight=2+forward_kl_chunked").terms
    assert [term.short for term in terms] == ["my_loss-Scaled", "forward_kl"]
    assert [term.file for term in terms] == ["a/b/my_loss.py", None]
