"""Exports under lmms-eval, without lmms-eval: settings, images, batches and stop strings; and the class it runs, on a stand-in of its base class.

The same class under the real package: tests/e2e/test_lmms_eval.py.
"""

import abc
import importlib
import io
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipelines.errors import PluginError
from pipelines.lmms_eval_plugin import Request, answers, batch_size_of, generation_rules, image_bytes, likelihood

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("settings", "max_new_tokens", "until"),
    [
        ({}, 64, ()),
        ({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}, 16, ()),
        ({"until": ["ASSISTANT:", ""], "image_aspect_ratio": "original"}, 64, ("ASSISTANT:",)),
        ({"until": "\n\n", "temperature": 0.2, "do_sample": False}, 64, ("\n\n",)),
        ({"until": [], "temperature": None, "num_beams": None, "top_p": None}, 64, ()),
    ],
)
def test_settings_of_tasks(settings: dict[str, Any], max_new_tokens: int, until: tuple[str, ...]) -> None:
    rules = generation_rules(settings)
    assert (rules.max_new_tokens, rules.until) == (max_new_tokens, until)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"do_sample": True, "temperature": 0.7},
            r"sampled answers \(do_sample True, temperature 0\.7\), .* greedily; run it with --gen_kwargs do_sample",
        ),
        ({"temperature": 0.2}, r"sampled answers \(do_sample None, temperature 0\.2\)"),
        ({"num_beams": 4}, "asks for 4 beams"),
        ({"repetition_penalty": 1.2, "visual_cot": True}, "sets repetition_penalty, visual_cot, which a Loupe export does not do"),
        ({"max_new_tokens": 0}, "max_new_tokens to 0; allowed: a whole number from 1 up"),
        ({"max_new_tokens": "16"}, "max_new_tokens to '16'"),
        ({"until": [3]}, r"until to \[3\]; allowed: a text or a list of texts"),
    ],
)
def test_settings_that_would_give_other_answers_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        generation_rules(settings)


@pytest.mark.parametrize(("text", "cut"), [("a\n\nb", "a"), ("one ASSISTANT: two\n\nx", "one"), ("ASSISTANT:", ""), ("plain", "plain"), ("", "")])
def test_the_first_stop_string_ends_an_answer(text: str, cut: str) -> None:
    assert generation_rules({"until": ["\n\n", "ASSISTANT:"]}).cut(text) == cut


@pytest.mark.parametrize("value", ["auto", "0", -1, None, "x"])
def test_batch_sizes_that_are_none(value: Any) -> None:
    with pytest.raises(PluginError, match=r"--batch_size: found .*; allowed: a whole number from 1 up"):
        batch_size_of(value)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1", "I"])
def test_images_of_any_mode_keep_their_size(mode: str) -> None:
    data = image_bytes([Image.new("RGB", (5, 3), (200, 10, 10)).convert(mode)])
    assert data is not None
    assert Image.open(io.BytesIO(data)).size == (5, 3)


def test_images_keep_their_pixels() -> None:
    image = Image.effect_noise((9, 7), 80).convert("RGB")
    data = image_bytes(image)
    assert data is not None
    assert Image.open(io.BytesIO(data)).tobytes() == image.tobytes()


@pytest.mark.parametrize("visuals", [None, [], [None], [[]]])
def test_nothing_to_look_at(visuals: Any) -> None:
    assert image_bytes(visuals) is None


def test_what_is_not_one_image_is_refused() -> None:
    image = Image.new("RGB", (4, 4))
    with pytest.raises(PluginError, match="asks about 2 images at once"):
        image_bytes([image, [image]])
    with pytest.raises(PluginError, match=r"asks about a str \('clip\.mp4'\), but a Loupe export answers about still images alone"):
        image_bytes(["clip.mp4"])
    with pytest.raises(PluginError, match="asks about a dict"):
        image_bytes([{"array": [0.0], "sampling_rate": 16000}])


class Echo:
    """In an export's place: answers with what it was asked, and remembers how."""

    def __init__(self) -> None:
        self.batches: list[tuple[list[str], int]] = []

    def ask_many(self, asked: Any, mode: str, *, max_new_tokens: int, may_end_early: bool) -> list[Any]:
        assert may_end_early
        self.batches.append(([question for _, question in asked], max_new_tokens))
        shown = ["image" if image else "blind" for image, _ in asked]
        return [types.SimpleNamespace(text=f"{mode} {how} {question}\n\nand more") for how, (_, question) in zip(shown, asked, strict=True)]

    def log_likelihood(self, image: bytes | None, question: str, answer: str, mode: str) -> tuple[float, bool]:
        return -float(len(answer)), answer == question


def request(question: str, settings: dict[str, Any] | None = None, image: bool = True) -> Request:
    return Request(question=question, settings=settings or {}, visuals=lambda: [Image.new("RGB", (4, 4))] if image else [])


def test_requests_are_batched_by_their_settings_and_answered_in_order() -> None:
    echo, told = Echo(), []
    short = {"max_new_tokens": 4, "until": ["\n\n"]}
    requests = [request("a"), request("b", short), request("<image>\nc", image=False), request("d", short), request("e"), request("f")]
    found = answers(echo, requests, "both", 2, lambda place, text: told.append((place, text)))
    assert found == [
        "both image a\n\nand more",
        "both image b",
        "both blind c\n\nand more",
        "both image d",
        "both image e\n\nand more",
        "both image f\n\nand more",
    ]
    assert echo.batches == [(["a", "c"], 64), (["e", "f"], 64), (["b", "d"], 4)]
    assert sorted(told) == list(enumerate(found))
    assert answers(echo, [], "both", 2) == []


def test_settings_are_checked_before_the_first_question_is_asked() -> None:
    echo = Echo()
    with pytest.raises(PluginError, match="4 beams"):
        answers(echo, [request("a"), request("b", {"num_beams": 4})], "both", 1)
    assert echo.batches == []


def test_images_are_opened_when_their_turn_comes() -> None:
    opened: list[str] = []

    def opening(name: str) -> Any:
        def visuals() -> list[Any]:
            opened.append(f"{name} after {len(echo.batches)} batches")
            return []

        return visuals

    echo = Echo()
    answers(echo, [Request(question=name, settings={}, visuals=opening(name)) for name in "abc"], "both", 1)
    assert opened == ["a after 0 batches", "b after 1 batches", "c after 2 batches"]


def test_likelihoods_are_of_the_answer_without_blanks_around_it() -> None:
    assert likelihood(Echo(), "yes ", " yes", None, "blind") == (-3.0, True)


# -- the class, on a stand-in of its base


@pytest.fixture
def plugged(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """pipelines.lmms_eval_model over a base class with what lmms-eval 0.7.3 demands."""

    class Base(abc.ABC):
        is_simple = True

        def __init__(self) -> None:
            self.partials: list[Any] = []
            self.cache_hook = types.SimpleNamespace(add_partial=lambda *told: self.partials.append(told))
            self.task_dict: dict[str, Any] = {}

        @abc.abstractmethod
        def loglikelihood(self, requests: Any) -> Any: ...

        @abc.abstractmethod
        def generate_until(self, requests: Any) -> Any: ...

        @abc.abstractmethod
        def generate_until_multi_round(self, requests: Any) -> Any: ...

    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["lmms_eval.api.model"].lmms = Base
    monkeypatch.delitem(sys.modules, "pipelines.lmms_eval_model", raising=False)
    monkeypatch.setattr("model.export.load_export", lambda folder, device: Echo())
    yield importlib.import_module("pipelines.lmms_eval_model").LoupeExport
    sys.modules.pop("pipelines.lmms_eval_model", None)


def instance(*arguments: Any) -> Any:
    return types.SimpleNamespace(args=arguments)


def test_the_class_asks_what_the_task_holds(plugged: Any) -> None:
    model = plugged(pretrained="folder", mode="global", batch_size="2", max_batch_size=None)
    assert model.is_simple
    model.task_dict = {"task": {"test": [{"image": Image.new("RGB", (4, 4)), "answer": "yes"}, {"image": None, "answer": "no"}]}}
    settings = {"max_new_tokens": 8, "until": ["\n\n"]}

    def visual(row: dict[str, Any]) -> list[Any]:
        return [row["image"]] if row["image"] else []

    asked = [instance(f"question {place}?", settings, visual, place, "task", "test") for place in (1, 0)]
    assert model.generate_until(asked) == ["global blind question 1?", "global image question 0?"]
    assert [told[2] for told in model.partials] == ["global blind question 1?", "global image question 0?"]
    likely = [instance("yes", lambda row: row["answer"], visual, 0, "task", "test"), instance("x", " four", visual, 1, "task", "test")]
    assert model.loglikelihood(likely) == [(-3.0, True), (-4.0, False)]
    with pytest.raises(PluginError, match="in several rounds"):
        model.generate_until_multi_round(asked)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs --model_args pretrained=FOLDER"),
        ({"pretrained": "x", "mode": "all"}, "mode: found 'all'; allowed: blind, global, local, both"),
        ({"pretrained": "x", "batch_size": "auto"}, "--batch_size: found 'auto'"),
    ],
)
def test_arguments_that_cannot_be_right(plugged: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PluginError, match=message):
        plugged(**arguments)


def test_one_process_alone(plugged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(PluginError, match="runs in one process, found WORLD_SIZE=2"):
        plugged(pretrained="x")


def test_the_package_names_the_plugin() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lmms_eval.models"] == {"loupe": "pipelines.lmms_eval_plugin:manifest"}
    assert any(item.startswith("lmms-eval") for item in project["optional-dependencies"]["lmms-eval"])
    assert not any(item.startswith("lmms-eval") for item in project["optional-dependencies"]["dev"])


def test_loupe_does_without_lmms_eval() -> None:
    """Only the class's own module imports it when imported."""
    import ast

    users = []
    for path in [file for package in ("model", "workers", "pipelines") for file in (REPOSITORY / package).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            if any(name.split(".")[0] == "lmms_eval" for name in names):
                users.append(path.name)
    assert sorted(set(users)) == ["lmms_eval_model.py", "lmms_eval_plugin.py"]
    assert "lmms_eval" not in sys.modules
    importlib.import_module("pipelines.lmms_eval_plugin")
    assert "lmms_eval" not in sys.modules
