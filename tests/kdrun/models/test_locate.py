from __future__ import annotations

from pathlib import Path

import pytest

from kdrun.errors import InputError
from kdrun.models.locate import ModelSource, locate_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "teacher"
    folder.mkdir()
    return folder


def error_of(given: str | Path) -> str:
    with pytest.raises(InputError) as info:
        locate_model(given)
    message = str(info.value)
    assert "\n" not in message
    return message


def test_a_folder(folder: Path) -> None:
    (folder / "config.json").touch()
    (folder / "model.gguf").touch()
    assert locate_model(folder) == ModelSource(str(folder))
    assert locate_model(folder).is_local


def test_a_gguf_file_and_its_folder(folder: Path) -> None:
    (folder / "model.gguf").touch()
    expected = ModelSource(str(folder), "model.gguf")
    assert locate_model(folder) == locate_model(folder / "model.gguf") == expected
    assert str(expected) == f"{folder}/model.gguf"


def test_a_gguf_file_in_the_current_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "model.gguf").touch()
    monkeypatch.chdir(folder)
    assert locate_model("model.gguf") == ModelSource(".", "model.gguf")


@pytest.mark.parametrize("name", ["owner/name", "name", "owner/name-1.5B_x"])
def test_a_name_on_the_hub(name: str) -> None:
    assert locate_model(name) == ModelSource(name)
    assert not locate_model(name).is_local


def test_a_gguf_file_on_the_hub() -> None:
    assert locate_model("owner/name/x.Q4.gguf") == ModelSource("owner/name", "x.Q4.gguf")


def test_the_home_folder_of_nobody() -> None:
    assert "~nobody-here/teacher: no home folder" in error_of("~nobody-here/teacher")


def test_a_spelling_mistake(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "config.json").touch()
    wrong = folder.with_name("techer")
    assert f"did you mean {folder}?" in error_of(wrong)
    # Where the first part is a folder here, a name with one slash is a path and not on the hub.
    monkeypatch.chdir(folder.parent.parent)
    assert "did you mean" in error_of(f"{folder.parent.name}/techer")


@pytest.mark.parametrize("name", ["./x", "../x", "/no/such", "x/y/z", "x.gguf", "x/y.gguf", "~/x"])
def test_paths_are_not_taken_for_names(name: str) -> None:
    assert "no such file or folder" in error_of(name)


def test_several_gguf_files(folder: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (folder / name).touch()
    assert "a.gguf, b.gguf" in error_of(folder)


def test_a_folder_without_a_model(folder: Path) -> None:
    assert "neither a config.json nor a GGUF file" in error_of(folder)


def test_the_folder_of_a_run(folder: Path) -> None:
    (folder / "student").mkdir()
    (folder / "student" / "config.json").touch()
    assert str(folder / "student") in error_of(folder)


def test_an_adapter_alone(folder: Path) -> None:
    (folder / "adapter_config.json").touch()
    assert "adapter" in error_of(folder)


def test_another_file(folder: Path) -> None:
    (folder / "config.json").touch()
    assert "pass the folder" in error_of(folder / "config.json")
