"""Asking: what is wrong with question, image or folder is said by name, and before the model is loaded."""

import io
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from model.errors import ConversationError, ImageError
from model.export import MANIFEST
from pipelines.ask import FrameChoice, ask_export
from pipelines.errors import NothingThereError, SettingError
from workers.errors import StorageError


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a b.png"
    path.write_bytes(png())
    return path


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What came as far as the model."""
    calls: list[tuple[object, ...]] = []

    class Export:
        def ask(self, data: bytes, question: str, mode: str) -> SimpleNamespace:
            calls.append((data, question, mode))
            return SimpleNamespace(text="seven")

    def load(folder: Path) -> Export:
        calls.append((folder,))
        return Export()

    monkeypatch.setattr("model.export.load_export", load)
    return calls


def export_in(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text("{}")
    return folder


@pytest.mark.parametrize("as_url", [False, True])
def test_an_image_may_be_a_path_or_a_url(tmp_path: Path, image: Path, asked: list[object], monkeypatch: pytest.MonkeyPatch, as_url: bool) -> None:
    folder = export_in(tmp_path / "export")
    monkeypatch.chdir(tmp_path)
    assert ask_export(str(folder), image.as_uri() if as_url else "a b.png", "what?", "both").text == "seven"
    assert asked == [(folder,), (png(), "what?", "both")]


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(NothingThereError, match="found no image file"):
        ask_export(str(tmp_path), str(tmp_path), "what?", "both")


@pytest.mark.parametrize("question", ["", "  ", "\n"])
def test_no_question_has_no_answer(question: str, image: Path, asked: list[object]) -> None:
    with pytest.raises(ConversationError, match="ask: found the question"):
        ask_export("/nowhere", str(image), question, "both")
    assert asked == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file has no bytes; give a whole PNG or JPEG"),
        (b"hello", "they start with b'hello'; give a whole PNG or JPEG"),
        (png()[:-30], "give a whole PNG or JPEG"),
        (b"P6 90000 1 255 ", "the image is 90000x1; one side may be at most 100 times the other; crop it"),
    ],
)
def test_an_image_that_cannot_be_decoded_is_named(tmp_path: Path, asked: list[object], data: bytes, message: str) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(data)
    with pytest.raises(ImageError) as caught:
        ask_export(str(export_in(tmp_path / "export")), str(path), "what?", "both")
    assert str(caught.value).startswith(f"ask: image {path}: ")
    assert message in str(caught.value)
    assert asked == []


@pytest.mark.parametrize("given", ["root", "root/exports"])
def test_a_folder_that_holds_exports_names_one(tmp_path: Path, image: Path, given: str) -> None:
    export = export_in(tmp_path / "root" / "exports" / "0123")
    with pytest.raises(NothingThereError) as caught:
        ask_export(str(tmp_path / given), str(image), "what?", "both")
    assert f"{tmp_path / given} is no export folder: it has no {MANIFEST}; there is one inside it, give {export}" in str(caught.value)


def test_of_several_exports_the_newest_is_named(tmp_path: Path, image: Path) -> None:
    for name, written in (("a", 3), ("b", 5), ("c", 4)):
        os.utime(export_in(tmp_path / "exports" / name) / MANIFEST, (written, written))
    with pytest.raises(NothingThereError, match=r"inside it, the newest of 3, give .*exports/b$"):
        ask_export(str(tmp_path), str(image), "what?", "both")


def test_a_folder_without_exports_names_the_command(tmp_path: Path, image: Path) -> None:
    for given, message in ((str(tmp_path), "is no export folder"), ("", "found ''"), (str(tmp_path / "gone"), "found no export folder")):
        with pytest.raises(NothingThereError, match=message) as caught:
            ask_export(given, str(image), "what?", "both")
        assert "`loupe export RECIPE` writes" in str(caught.value)


def test_a_name_that_no_folder_can_have_is_no_bug(image: Path) -> None:
    with pytest.raises(StorageError):
        ask_export("x" * 300, str(image), "what?", "both")


def test_a_video_is_asked_by_its_frames(tmp_path: Path, asked: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [Image.new("RGB", (8, 8), (shade,) * 3) for shade in (0, 100, 200)]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    shown: list[tuple[int, str, str | None, int]] = []

    def ask_video(exported: object, found: list[Image.Image], question: str, layout: str | None, *, pool: int) -> SimpleNamespace:
        shown.append((len(found), question, layout, pool))
        return SimpleNamespace(text="eight")

    monkeypatch.setattr("model.video.ask_video", ask_video)
    folder = export_in(tmp_path / "export")
    assert ask_export(str(folder), str(tmp_path / "film.gif"), "what?", "both", FrameChoice(num=5)).text == "eight"
    assert ask_export(str(folder), str(tmp_path / "film.gif"), "what?", "both", FrameChoice(num=2, layout="frames", pool=1)).text == "eight"
    assert shown == [(5, "what?", None, 2), (2, "what?", "frames", 1)]
    assert ask_export(str(folder), str(tmp_path / "film.gif"), "what?", "both").text == "seven"  # its first frame, as an image


def test_what_is_no_video_is_told_before_a_model_is_loaded(tmp_path: Path, image: Path, asked: list[object]) -> None:
    (tmp_path / "text").write_bytes(b"no video")
    folder = str(export_in(tmp_path / "export"))
    with pytest.raises(ImageError, match="give a whole video or animation"):
        ask_export(folder, str(tmp_path / "text"), "what?", "both", FrameChoice(num=8))
    with pytest.raises(ImageError, match="or --frames 8 for a video"):
        ask_export(folder, str(tmp_path / "text"), "what?", "both")
    assert asked == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"num": -1}, "--frames: found -1"),
        ({"layout": "grid"}, "--layout: found grid, but no frames are asked for"),
        ({"pool": 2}, "--pool: found 2, but no frames are asked for"),
        ({"num": 4, "pool": 0}, "--pool: found 0; allowed: 1"),
        ({"num": 4, "layout": "grid", "pool": 2}, "--pool: of layout grid"),
    ],
)
def test_words_about_frames_that_mean_nothing_are_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        FrameChoice(**words)


def test_frames_have_no_mode(image: Path, asked: list[object]) -> None:
    with pytest.raises(SettingError, match="--mode: found blind with --frames"):
        ask_export("/nowhere", str(image), "what?", "blind", FrameChoice(num=4))
    assert asked == []
