"""Loupe's models as transformers models: what is written and loaded by the Auto classes computes what an export does, for every kind of connector."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from model.auto import IMAGE_TOKEN_ID, LoupeConfig, LoupeForConditionalGeneration, LoupeProcessor, write_loupe
from model.connector import build_connector
from model.encoder import compute_dtype, describe_encoder, load_encoder
from model.errors import ExportError
from model.export import ExportConfig, ExportedModel
from model.language_model import hold_in, load_language_model
from model.specs import (
    CompressionSpec,
    ConnectorSpec,
    DCISpec,
    GatedMixtureSpec,
    GlobalBranchSpec,
    LearnableSelectorSpec,
    LocalBranchSpec,
    MLPSpec,
    SCISpec,
    SingleSpec,
    STISpec,
    TextGuidedSelectorSpec,
)
from model.views import ViewSpec
from model.vision_language import VisionLanguageModel

DCI = DCISpec(base=5, groups=((0, 2), (3, 4)))
MIXED = GlobalBranchSpec(fusion=DCI, adapters=GatedMixtureSpec())
PLAIN = GlobalBranchSpec(fusion=SCISpec(base=4, layers=(2,)), adapters=MLPSpec())
COMPRESSED = LocalBranchSpec(fusion=DCI, compression=CompressionSpec(queries=4))
KINDS: dict[str, tuple[ConnectorSpec, ViewSpec]] = {
    "mixture, compression": (ConnectorSpec(global_branch=MIXED, local_branch=COMPRESSED), ViewSpec.slime(max_slices=3)),
    "newline, own projector": (
        ConnectorSpec(
            global_branch=MIXED,
            local_branch=LocalBranchSpec(
                fusion=SingleSpec(layer=2), projector="own", compression=CompressionSpec(queries=4), merge="spatial", newline=True
            ),
        ),
        ViewSpec.slime_paper(max_side=2),
    ),
    "text-guided selector": (
        ConnectorSpec(
            global_branch=PLAIN,
            local_branch=LocalBranchSpec(
                fusion=SCISpec(base=4, layers=(2,)),
                compression=None,
                merge="spatial_unpad",
                newline=True,
                selector=TextGuidedSelectorSpec(top_p=0.5),
            ),
            separator=None,
        ),
        ViewSpec.anyres(),
    ),
    "learnable selector": (
        ConnectorSpec(
            global_branch=MIXED,
            local_branch=LocalBranchSpec(fusion=DCI, compression=CompressionSpec(queries=9), selector=LearnableSelectorSpec(width=8, top_p=0.6)),
        ),
        ViewSpec.slime(max_slices=2),
    ),
    "tokens more than patches": (
        ConnectorSpec(global_branch=GlobalBranchSpec(fusion=STISpec(base=5, layers=(1,)), adapters=MLPSpec()), local_branch=None),
        ViewSpec.slime(global_fit="pad"),
    ),
    "output grid": (
        ConnectorSpec(global_branch=GlobalBranchSpec(fusion=DCI, adapters=MLPSpec(), output_grid=2), local_branch=None),
        ViewSpec.slime(),
    ),
}


def picture(size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def png(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    picture(size).save(file, "PNG")
    return file.getvalue()


def assemble(kind: str, encoder: Path, language_model: Path, precision: str = "fp32", compute: str = "fp32") -> ExportedModel:
    spec, views = KINDS[kind]
    described = describe_encoder(str(encoder))
    loaded = load_language_model(language_model)
    if precision == "bf16":
        hold_in(loaded.network, torch.bfloat16)
    connector = build_connector(spec, described, hidden=loaded.hidden, embedding_rms=0.05, seed=3)
    for parameter in connector.parameters():  # gates and selectors start at values that hide them
        parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())), alpha=0.02)
    model = VisionLanguageModel(connector, loaded, precision=precision)
    model.requires_grad_(requires_grad=False)
    config = ExportConfig(
        connector=spec,
        encoder=described,
        views=views,
        feature_precision="fp16",
        precision=precision,
        language_model_precision=precision,
        feature_compute=compute,
    )
    return ExportedModel(config=config, model=model, encoder=load_encoder(described, 6, dtype=compute_dtype(compute, "cpu", or_wider=True)))


def loaded(ours: ExportedModel, folder: Path) -> tuple[Any, Any]:
    write_loupe(folder, ours.config, ours.model, max_shard_size="60KB")
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


def messages(question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def inputs(processor: Any, size: tuple[int, int], question: str) -> Any:
    return processor(images=picture(size), text=processor.apply_chat_template(messages(question), add_generation_prompt=True))


@pytest.mark.parametrize("kind", KINDS)
def test_every_connector_survives_the_round_trip(kind, tiny_encoder_folder, tiny_language_model_folder, tmp_path):
    ours = assemble(kind, tiny_encoder_folder, tiny_language_model_folder)
    network, processor = loaded(ours, tmp_path / "once")
    assert isinstance(network, LoupeForConditionalGeneration)
    assert isinstance(processor, LoupeProcessor)
    network.save_pretrained(tmp_path / "twice")
    processor.save_pretrained(tmp_path / "twice")
    again, processor_again = AutoModelForImageTextToText.from_pretrained(tmp_path / "twice"), AutoProcessor.from_pretrained(tmp_path / "twice")
    assert isinstance(AutoConfig.from_pretrained(tmp_path / "twice"), LoupeConfig)
    assert again.config.computes == ours.config
    for size, question in (((100, 60), "What is it?"), ((60, 130), "Which number stands at the top?")):
        expected = ours.prompt_logits(png(size), question)
        for model, maker in ((network, processor), (again, processor_again)):
            given = inputs(maker, size, question)
            assert torch.equal(model(**given).logits[0], expected)
            assert torch.equal(model(**given, logits_to_keep=3).logits[0], ours.prompt_logits(png(size), question, last=3))
            batch = ours.prompt(png(size), question)
            answer = model.generate(**given, max_new_tokens=6)
            assert torch.equal(answer[:, : given["input_ids"].shape[1]], given["input_ids"])
            new = answer[0, given["input_ids"].shape[1] :].tolist()
            own = ours.model.generate(batch, 6)[0]
            assert new[: len(own)] == own
            assert all(token in ours.model.end_ids() for token in new[len(own) :])


@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_an_encoder_computes_as_it_did_in_training(compute, tiny_encoder_folder, tiny_language_model_folder, tmp_path):
    kind = next(iter(KINDS))
    ours = assemble(kind, tiny_encoder_folder, tiny_language_model_folder, compute=compute)
    network, processor = loaded(ours, tmp_path)
    given = inputs(processor, (100, 60), "What is it?")
    assert torch.equal(network(**given).logits[0], ours.prompt_logits(png((100, 60)), "What is it?"))
    exact = assemble(kind, tiny_encoder_folder, tiny_language_model_folder).prompt_logits(png((100, 60)), "What is it?")
    # fp16 is computed in fp32 on a CPU, which is not good at it.
    assert torch.equal(network(**given).logits[0], exact) == (compute == "fp16")


@pytest.mark.parametrize("mode", ["blind", "global", "local", "both"])
def test_modes_show_what_they_show(mode, tiny_encoder_folder, tiny_language_model_folder, tmp_path):
    ours = assemble("mixture, compression", tiny_encoder_folder, tiny_language_model_folder)
    network, processor = loaded(ours, tmp_path)
    given = inputs(processor, (100, 60), "What is it?")
    assert torch.equal(network(**given, mode=mode).logits[0], ours.prompt_logits(png((100, 60)), "What is it?", mode))


def test_a_frozen_bf16_language_model_is_loaded_as_it_was_held(tiny_encoder_folder, tiny_language_model_folder, tmp_path):
    ours = assemble("newline, own projector", tiny_encoder_folder, tiny_language_model_folder, "bf16")
    network, processor = loaded(ours, tmp_path)
    for part, dtype in (("language_model", torch.bfloat16), ("connector", torch.float32), ("vision_tower", torch.float32)):
        assert {parameter.dtype for parameter in getattr(network, part).parameters()} == {dtype}, part
    assert torch.equal(network(**inputs(processor, (100, 60), "What?")).logits[0], ours.prompt_logits(png((100, 60)), "What?"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_type_of_a_language_model_s_own_files_does_not_matter(precision, tiny_encoder_folder, tiny_language_model_folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(tiny_language_model_folder, dtype=torch.float16).save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(tiny_language_model_folder).save_pretrained(tmp_path / "half")
    ours = assemble("output grid", tiny_encoder_folder, tmp_path / "half", precision)
    network, processor = loaded(ours, tmp_path / "written")
    assert {parameter.dtype for parameter in network.language_model.parameters()} == {
        getattr(torch, {"fp32": "float32", "bf16": "bfloat16"}[precision])
    }
    assert torch.equal(network(**inputs(processor, (100, 60), "What?")).logits[0], ours.prompt_logits(png((100, 60)), "What?"))


def test_unlike_prompts_share_a_batch(tiny_encoder_folder, tiny_language_model_folder, tmp_path):
    """Pictures of other shapes, and one prompt without a picture among them."""
    ours = assemble("text-guided selector", tiny_encoder_folder, tiny_language_model_folder)
    network, processor = loaded(ours, tmp_path)
    sizes, questions = ((100, 60), (60, 130)), ("What is it?", "Which number stands at the top?")
    texts = [processor.apply_chat_template(messages(question), add_generation_prompt=True) for question in questions]
    blind = processor.apply_chat_template([{"role": "user", "content": "Say a."}], add_generation_prompt=True)
    given = processor(images=[picture(size) for size in sizes], text=[texts[0], blind, texts[1]])
    logits = network(**given).logits
    for row, size, question in ((0, sizes[0], questions[0]), (2, sizes[1], questions[1])):
        expected = ours.prompt_logits(png(size), question)
        # Rows of a batch take other paths through matrix products than a row alone.
        assert torch.allclose(logits[row, -len(expected) :], expected, atol=2e-6)
    ids = torch.tensor([ours.model.tokenizer.encode(blind, add_special_tokens=False)])
    assert torch.allclose(logits[1, -ids.shape[1] :], ours.model.language_model(ids).logits[0], atol=2e-6)


def test_pictures_may_stand_in_the_messages(tiny_encoder_folder, tiny_language_model_folder, tmp_path):
    _, processor = loaded(assemble("output grid", tiny_encoder_folder, tiny_language_model_folder), tmp_path)
    told = [{"role": "user", "content": [{"type": "image", "image": picture((100, 60))}, {"type": "text", "text": "What?"}]}]
    whole = processor.apply_chat_template(told, add_generation_prompt=True, tokenize=True, return_dict=True)
    apart = inputs(processor, (100, 60), "What?")
    assert whole.keys() == apart.keys()
    assert all(torch.equal(whole[name], apart[name]) for name in apart)
    assert torch.equal(processor(images=png((100, 60)), text="a<image>b")["pixel_values"], apart["pixel_values"])


def test_a_picture_s_place_has_no_text(tiny_encoder_folder, tiny_language_model_folder, tmp_path):
    _, processor = loaded(assemble("output grid", tiny_encoder_folder, tiny_language_model_folder), tmp_path)
    ids = processor(images=picture((9, 9)), text="ab<image>cd")["input_ids"]
    assert ids[0].tolist().count(IMAGE_TOKEN_ID) == 1
    assert processor.decode(ids[0]) == "abcd"
    assert processor.batch_decode(ids) == processor.post_process_image_text_to_text(ids) == ["abcd"]


def test_mistakes_are_told(tiny_encoder_folder, tiny_language_model_folder, tmp_path):
    network, processor = loaded(assemble("output grid", tiny_encoder_folder, tiny_language_model_folder), tmp_path)
    given = inputs(processor, (100, 60), "What?")
    with pytest.raises(ExportError, match=r"found 1 places of a picture in the prompts, and 0 pictures; .* mode = 'blind'"):
        network(input_ids=given["input_ids"])
    with pytest.raises(ExportError, match="has no local branch"):
        network(**given, mode="local")
    with pytest.raises(ExportError, match="holds 2 places of a picture"):
        network(**processor(images=[picture((9, 9))] * 2, text="<image><image>"))
    with pytest.raises(ExportError, match="found no text"):
        processor(images=picture((9, 9)))
    with pytest.raises(ExportError, match="needs the field loupe"):
        _ = LoupeConfig().computes
