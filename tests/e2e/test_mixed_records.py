"""`loupe run` over LLaVA files, one of which has records without an image, as LLaVA's instruction mix: captions to align on, the mix to tune on."""

import json
import re
from pathlib import Path

import pytest

from tests import small_data
from tests.commands import start
from tests.tiny import tiny_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_captions_align_and_a_mix_with_text_fine_tunes(tmp_path: Path, tiny_encoder_folder: Path, tiny_language_model_folder: Path) -> None:
    captions = [{"image": f"{k}.png", "conversations": small_data.conversation("<image>\nDescribe it.", f"noise {k}")} for k in range(14)]
    talk = [{"conversations": small_data.conversation("Hello.", "Hello!", f"And {k}?", f"{k}.")} for k in range(9)]
    shown = [{"image": f"{k}.png", "conversations": small_data.conversation("<image>\nWhat?", "noise", "Sure?", "yes")} for k in range(14, 32)]
    named = []
    for name, records, images in (("captions", captions, range(14)), ("mix", [*talk, *shown, *talk], range(14, 32))):
        source = small_data.write_llava(tmp_path / name, records, {f"{k}.png": small_data.png(k) for k in images})
        path = Path(source.records).rename(tmp_path / name / f"{name}.json")
        named.append(f'{{ kind = "llava_json", records = "{path}", images = "{source.images}" }}')
    text = tiny_recipe(tiny_encoder_folder, tiny_language_model_folder, seeds="[0]")
    text = re.sub(r"(?m)^sources = .*$", f"sources = [{', '.join(named)}]", text)
    text = re.sub(r"(?m)^steps = .*$", "epochs = 1", text)
    text = text.replace('train = ["global_mlp"]\n', 'train = ["global_mlp"]\nsources = ["captions"]\ntemplate = "plain"\n')
    text = text.replace('train = ["connector", "language_model"]\n', 'train = ["connector", "language_model"]\nsources = ["mix"]\n')
    (tmp_path / "mixed.toml").write_text(text)
    root = tmp_path / "root"
    with start(tmp_path / "cache", "run", str(tmp_path / "mixed.toml"), "--root", str(root), "--set", "num_cpus=2") as process:
        printed, complained = process.communicate(timeout=550)
    assert process.returncode == 0, printed + complained
    records = {path.parent.parent.name: json.loads(path.read_text()) for path in root.glob("runs/*/*/COMMITTED.json")}
    built, trained, evaluated = records["build-dataset"], records["train-connector"], records["evaluate"]
    assert (built["num_items"], built["num_text_only"], built["num_duplicates"], built["num_quarantined"]) == (50, 9, 9, 0)
    assert records["cache-features"]["num_images"] == 32
    align, sft = trained["phases"]
    held_out_text = 9 - built["num_train_text_only_by_source"]["llava_json/mix"]
    assert align["steps"] == -(-built["num_train_by_source"]["llava_json/captions"] // 4)
    assert sft["steps"] == -(-built["num_train_by_source"]["llava_json/mix"] // 4)
    assert (trained["num_quarantined"], trained["num_text_only"]) == (0, 9 - held_out_text)
    assert trained["num_images"] + trained["num_text_only"] == built["num_train"]
    assert evaluated["num_text_only"] == held_out_text
    assert evaluated["num_images"] == built["num_held_out"] - held_out_text
    page = Path(printed.splitlines()[-1].removeprefix("Report:  ")).read_text()
    assert re.search(rf'<th scope="row">text</th><td>{9 - held_out_text}</td><td>{held_out_text}</td><td>18</td>', page)
    assert "The family text is conversations without a picture" in page
    assert "32 pictures, 9 conversations without a picture" in page
