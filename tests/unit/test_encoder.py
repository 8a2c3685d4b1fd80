import json
import shutil

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from model.encoder import describe_encoder, load_encoder, resolve_encoder
from model.errors import EncoderError
from model.specs import MapSpec

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 99,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

MODELS = {
    "clip tower": lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)),
    "clip tower with projection": lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)),
    "whole clip": lambda: CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT)),
    "siglip tower": lambda: SiglipVisionModel(SiglipVisionConfig(**VISION)),
    "whole siglip": lambda: SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT)),
}


def views(count=2, side=56, seed=0):
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", MODELS)
def test_every_layer_of_every_kind_of_folder_is_the_full_models(kind, tmp_path):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    model.save_pretrained(tmp_path)
    spec = describe_encoder(str(tmp_path))
    assert (spec.family, spec.width, spec.num_blocks, spec.view_px, spec.grid) == (kind.replace("whole ", "").split()[0], 32, 4, 56, 4)
    for deepest in range(5):
        encoder = load_encoder(spec, deepest)
        assert len(encoder.blocks) == deepest
        whole = getattr(model, "vision_model", model)
        states = whole(pixel_values=encoder.normalise(views()), output_hidden_states=True).hidden_states
        found = encoder(views(), [MapSpec(layers=(layer,)) for layer in range(deepest + 1)])
        for layer in range(deepest + 1):
            expected = states[layer][:, spec.prefix_tokens :]
            # Same kernels in the same order; measured difference 0 on CPU.
            torch.testing.assert_close(found[f"layer_{layer}"], expected, rtol=0, atol=1e-6)


def test_a_mean_is_the_mean_of_its_layers_in_fp32(tiny_encoder_folder):
    encoder = load_encoder(describe_encoder(str(tiny_encoder_folder)), 6, dtype=torch.bfloat16)
    maps = [MapSpec(layers=(1, 2, 6)), *(MapSpec(layers=(layer,)) for layer in (1, 2, 6))]
    found = encoder(views(), maps)
    assert {value.dtype for value in found.values()} == {torch.float32}
    torch.testing.assert_close(found["mean_1.2.6"], (found["layer_1"] + found["layer_2"] + found["layer_6"]) / 3, rtol=1e-6, atol=1e-6)


def test_views_do_not_depend_on_their_batch(tiny_encoder_folder):
    encoder = load_encoder(describe_encoder(str(tiny_encoder_folder)), 6)
    maps = [MapSpec(layers=(6,))]
    together = encoder(views(5), maps)["layer_6"]
    alone = torch.cat([encoder(views(5)[place : place + 1], maps)["layer_6"] for place in range(5)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_a_layer_that_was_cut_off_is_refused(tiny_encoder_folder):
    spec = describe_encoder(str(tiny_encoder_folder))
    with pytest.raises(EncoderError, match="loaded up to layer 2, but a map needs layer 3"):
        load_encoder(spec, 2)(views(), [MapSpec(layers=(3,))])
    with pytest.raises(EncoderError, match=r"layers 0\.\.6, asked for 7"):
        load_encoder(spec, 7)
    with pytest.raises(EncoderError, match="views of 56 px, found 28"):
        load_encoder(spec, 2)(views(side=28), [MapSpec(layers=(1,))])


def test_mean_and_deviation_come_from_the_preprocessor_or_the_family(tiny_encoder_folder, tmp_path):
    folder = shutil.copytree(tiny_encoder_folder, tmp_path / "encoder")
    assert describe_encoder(str(folder)).mean == (0.48145466, 0.4578275, 0.40821073)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [1, 1, 1]}))
    spec = describe_encoder(str(folder))
    assert (spec.mean, spec.std) == ((0.5, 0.4, 0.3), (1.0, 1.0, 1.0))


def test_a_folder_without_weights_says_what_was_expected(tiny_encoder_folder, tmp_path):
    folder = shutil.copytree(tiny_encoder_folder, tmp_path / "encoder")
    (folder / "model.safetensors").unlink()
    with pytest.raises(EncoderError, match=r"expected weights as \*\.safetensors.*found none"):
        describe_encoder(str(folder))
    (folder / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(EncoderError, match=r"found pytorch_model\.bin\. Pickled weights can run code"):
        describe_encoder(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(EncoderError, match=r"found no config\.json"):
        describe_encoder(str(folder))


def test_an_unknown_family_is_refused(tiny_encoder_folder, tmp_path):
    folder = shutil.copytree(tiny_encoder_folder, tmp_path / "encoder")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    with pytest.raises(EncoderError, match=r"expected a model_type out of .* found 'vit'"):
        describe_encoder(str(folder))


def test_changed_weights_are_refused(tiny_encoder_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_encoder_folder, tmp_path / "encoder")
    spec = describe_encoder(str(folder))
    weights = load_file(folder / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"was changed after the spec was made \(weights_sha256 "):
        load_encoder(spec, 2)


def test_a_changed_config_is_refused(tiny_encoder_folder, tmp_path):
    """The weights alone do not say what comes out: another activation gives other features from the same bytes."""
    folder = shutil.copytree(tiny_encoder_folder, tmp_path / "encoder")
    spec = describe_encoder(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    with pytest.raises(EncoderError, match=r"\(activation quick_gelu to gelu\)"):
        load_encoder(spec, 2)


def test_weights_that_lack_a_tensor_are_refused(tiny_encoder_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_encoder_folder, tmp_path / "encoder")
    weights = load_file(folder / "model.safetensors")
    missing = next(name for name in weights if "layers.1." in name)
    save_file({name: value for name, value in weights.items() if name != missing}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match="lack tensors of the vision tower"):
        load_encoder(describe_encoder(str(folder)), 2)


def test_names_resolve_to_folders_hub_ids_or_errors(tiny_encoder_folder):
    assert resolve_encoder(str(tiny_encoder_folder)) == str(tiny_encoder_folder)
    assert resolve_encoder("openai/clip-vit-large-patch14-336") == "openai/clip-vit-large-patch14-336"
    with pytest.raises(EncoderError, match="no encoder 'builtin:nothing'"):
        resolve_encoder("builtin:nothing")
    with pytest.raises(EncoderError, match="found no such folder"):
        resolve_encoder("./not/here")
    with pytest.raises(EncoderError, match="found neither"):
        describe_encoder("nobody/has-this-model")
