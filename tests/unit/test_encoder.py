import dataclasses
import json
import re
import shutil
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    Siglip2Config,
    Siglip2Model,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

from model.encoder import describe_encoder, encoder_folder, load_encoder, plan_encoder, resolve_encoder
from model.encoder_execution import EncoderForward
from model.errors import EncoderError
from model.packed_layers import can_pack
from model.specs import EncoderFamily, MapSpec, UnknownDigest

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

NAFLEX = {key: value for key, value in VISION.items() if key != "image_size"} | {"num_patches": 16}
# Trained at 70 px, so that views of 56 px need interpolated positions.
DINO = {key: value for key, value in VISION.items() if key != "intermediate_size"} | {"mlp_ratio": 2, "image_size": 70, "layerscale_value": 0.7}

MODELS = {
    "clip tower": lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)),
    "clip tower with projection": lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)),
    "whole clip": lambda: CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT)),
    "siglip tower": lambda: SiglipVisionModel(SiglipVisionConfig(**VISION)),
    "whole siglip": lambda: SiglipModel(SiglipConfig(vision_config=VISION, text_config=TEXT)),
    "siglip2 tower": lambda: Siglip2VisionModel(Siglip2VisionConfig(**NAFLEX)),
    "whole siglip2": lambda: Siglip2Model(Siglip2Config(vision_config=NAFLEX, text_config=TEXT)),
    "dinov2 tower": lambda: Dinov2Model(Dinov2Config(**DINO)),
    "dinov2 backbone": lambda: Dinov2Backbone(Dinov2Config(**DINO, out_features=["stage4"])),
    "dinov2 classifier": lambda: Dinov2ForImageClassification(Dinov2Config(**DINO)),
    "dinov2 giant": lambda: Dinov2Model(Dinov2Config(**DINO, use_swiglu_ffn=True)),
    "dinov2_with_registers tower": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINO, num_register_tokens=3)),
    "dinov2_with_registers giant": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**DINO, num_register_tokens=2, use_swiglu_ffn=True)),
    "dinov2_with_registers classifier": lambda: Dinov2WithRegistersForImageClassification(Dinov2WithRegistersConfig(**DINO)),
}

TOWERS = [kind for kind in MODELS if kind.endswith("tower")]

CROP_56 = {"crop_size": {"height": 56, "width": 56}, "size": {"shortest_edge": 64}}


def write(kind, folder):
    """A folder with random weights, larger than their initialisation so that every block changes something; and the stock model."""
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    if kind.startswith("dinov2"):
        (folder / "preprocessor_config.json").write_text(json.dumps(CROP_56))
    return model


def stock_states(model, pixels):
    """Hidden states by transformers' own code."""
    whole = next((getattr(model, name) for name in ("vision_model", "dinov2", "dinov2_with_registers") if hasattr(model, name)), model)
    if "Siglip2" in type(model).__name__:
        patches = torch.stack([torch.from_numpy(convert_image_to_patches(image.float().numpy(), 14)) for image in pixels])
        mask = torch.ones(patches.shape[:2], dtype=torch.int32)
        shapes = torch.tensor([[4, 4]] * len(patches))
        return whole(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shapes, output_hidden_states=True).hidden_states
    return whole(pixel_values=pixels, output_hidden_states=True).hidden_states


def views(count=2, side=56, seed=0):
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_every_layer_of_every_kind_of_folder_is_the_full_models(kind, tmp_path):
    model = write(kind, tmp_path)
    spec = describe_encoder(str(tmp_path))
    family = kind.replace("whole ", "").split()[0]
    assert (spec.family, spec.width, spec.num_blocks, spec.view_px, spec.grid) == (family, 32, 4, 56, 4)
    for deepest in range(5):
        encoder = load_encoder(spec, deepest)
        assert len(encoder.blocks) == deepest
        states = stock_states(model, encoder.normalise(views()))
        assert len(states) == 5
        found = encoder(views(), [MapSpec(layers=(layer,)) for layer in range(deepest + 1)])
        for layer in range(deepest + 1):
            expected = states[layer][:, spec.prefix_tokens :]
            assert tuple(expected.shape) == (2, 16, 32)
            # Same kernels in the same order; measured difference 0 on CPU.
            torch.testing.assert_close(found[f"layer_{layer}"], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_half_precision_is_the_stock_models_half_precision(kind, tmp_path):
    model = write(kind, tmp_path).to(torch.bfloat16)
    spec = describe_encoder(str(tmp_path))
    encoder = load_encoder(spec, 4, dtype=torch.bfloat16)
    states = stock_states(model, encoder.normalise(views()))
    found = encoder(views(), [MapSpec(layers=(layer,)) for layer in range(5)])
    for layer in range(5):
        torch.testing.assert_close(found[f"layer_{layer}"], states[layer][:, spec.prefix_tokens :].float(), rtol=0, atol=0)


PACKED = [*TOWERS, "dinov2 giant", "dinov2_with_registers giant"]


@pytest.mark.parametrize("kind", PACKED)
@torch.no_grad()
def test_packed_layers_compute_what_the_stock_model_does(kind, tmp_path):
    model = write(kind, tmp_path)
    spec = describe_encoder(str(tmp_path))
    encoder = load_encoder(spec, 4)
    forward = EncoderForward(encoder)
    plain = [module for module in encoder.blocks.modules() if isinstance(module, torch.nn.Linear)]
    fused = [module for module in encoder.blocks.modules() if isinstance(module, torch.nn.Sequential)]
    assert (len(plain), len(fused)) == ((0, 0 if kind.endswith("giant") else 4) if can_pack(torch.float32) else (len(plain), 0))
    EncoderForward(encoder)  # packed already
    for count in (1, 3, 2):
        states = stock_states(model, encoder.normalise(views(count, seed=count)))
        found = forward(views(count, seed=count), [MapSpec(layers=(layer,)) for layer in range(5)])
        for layer in range(5):
            expected = states[layer][:, spec.prefix_tokens :]
            # Sums in another order: measured 3e-7 of the largest value at most.
            torch.testing.assert_close(found[f"layer_{layer}"], expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", PACKED)
@torch.no_grad()
def test_packed_layers_of_half_precision_are_no_further_from_the_truth(kind, tmp_path):
    write(kind, tmp_path)
    spec, maps = describe_encoder(str(tmp_path)), [MapSpec(layers=(layer,)) for layer in range(5)]
    exact = load_encoder(spec, 4)(views(), maps)
    plain = load_encoder(spec, 4, dtype=torch.bfloat16)(views(), maps)
    packed = EncoderForward(load_encoder(spec, 4, dtype=torch.bfloat16))(views(), maps)
    for name, expected in exact.items():
        # An activation behind a product sees sums that are not rounded yet, so it errs a little less.
        assert (packed[name] - expected).norm() <= 1.05 * (plain[name] - expected).norm()


def test_layers_stay_as_they_are_where_packing_was_not_measured(tmp_path, monkeypatch):
    write("clip tower", tmp_path)
    encoder = load_encoder(describe_encoder(str(tmp_path)), 4)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    maps = [MapSpec(layers=(4,))]
    assert torch.equal(EncoderForward(encoder)(views(), maps)["layer_4"], encoder(views(), maps)["layer_4"])
    assert any(isinstance(module, torch.nn.Linear) for module in encoder.blocks.modules())


def test_every_family_is_tried():
    assert {kind.split()[0] for kind in TOWERS} == set(get_args(EncoderFamily))


@pytest.mark.parametrize("kind", MODELS)
def test_blocks_behind_the_deepest_needed_layer_are_neither_read_nor_run(kind, tmp_path):
    """Poison everything that no map of layer 2 needs: deeper blocks, final norms, heads, text towers. Nothing of it may be seen."""
    write(kind, tmp_path)
    spec = describe_encoder(str(tmp_path))
    clean = load_encoder(spec, 2)(views(), [MapSpec(layers=(0, 1, 2))])["mean_0_2"]
    weights = load_file(tmp_path / "model.safetensors")

    def needed(name):
        own = name.removeprefix("vision_model.").removeprefix("dinov2.").removeprefix("dinov2_with_registers.")
        block = re.match(r"encoder\.layers?\.(\d+)\.", own)
        return int(block[1]) < 2 if block else own.startswith(("embeddings.", "pre_layrnorm.")) and "mask_token" not in own

    poisoned = {name: value if needed(name) else torch.full_like(value, float("nan")) for name, value in weights.items()}
    assert 0 < sum(bool(value.isnan().any()) for value in poisoned.values()) < len(poisoned)
    save_file(poisoned, tmp_path / "model.safetensors", metadata={"format": "pt"})
    encoder = load_encoder(describe_encoder(str(tmp_path)), 2)
    assert not any(bool(value.isnan().any()) for name, value in encoder.state_dict().items() if "mask_token" not in name)
    torch.testing.assert_close(encoder(views(), [MapSpec(layers=(0, 1, 2))])["mean_0_2"], clean, rtol=0, atol=0)
    calls = []
    for number, block in enumerate(encoder.blocks, 1):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
    encoder(views(), [MapSpec(layers=(0,)), MapSpec(layers=(1,))])
    assert calls == [1]  # a call runs no deeper than its own maps, however deep the encoder was loaded
    # Without them the folder is as good: what is not needed need not be there.
    save_file({name: value for name, value in weights.items() if needed(name)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(
        load_encoder(describe_encoder(str(tmp_path)), 2)(views(), [MapSpec(layers=(0, 1, 2))])["mean_0_2"], clean, rtol=0, atol=0
    )


@pytest.mark.parametrize("kind", TOWERS)
def test_a_missing_tensor_that_a_map_needs_is_named(kind, tmp_path):
    write(kind, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    embeddings = [name for name in weights if name.startswith("embeddings.") and "mask_token" not in name]
    second = [name for name in weights if re.match(r"encoder\.layers?\.1\.", name)]
    assert len(embeddings) >= 3
    for missing in (*embeddings, second[0], second[-1]):
        save_file({name: value for name, value in weights.items() if name != missing}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(EncoderError, match=r"lack tensors of the vision tower.*first (embeddings|encoder)\.") as caught:
            load_encoder(describe_encoder(str(tmp_path)), 2)
        if missing in embeddings:
            assert f"first {missing};" in str(caught.value)
    projection = next(name for name in embeddings if "patch" in name and name.endswith("weight"))
    save_file({name: value[:1] if name == projection else value for name, value in weights.items()}, tmp_path / "model.safetensors")
    with pytest.raises(EncoderError, match=r"cannot be loaded|another shape"):
        load_encoder(describe_encoder(str(tmp_path)), 2)


def test_siglip_2_at_a_fixed_resolution_is_siglip(tmp_path):
    """As google/siglip2-so400m-patch14-384 and its like declare themselves; 60 px are four whole patches of 14 and 4 px that no patch covers."""
    config = SiglipConfig(vision_config=VISION | {"image_size": 60}, text_config=TEXT | {"vocab_size": 256})
    torch.manual_seed(0)
    model = SiglipModel(config).eval()
    model.save_pretrained(tmp_path)
    spec = describe_encoder(str(tmp_path))
    assert (spec.family, spec.view_px, spec.grid, spec.num_patches, spec.prefix_tokens) == ("siglip", 60, 4, 16, 0)
    encoder = load_encoder(spec, 3)
    states = stock_states(model, encoder.normalise(views(side=60)))
    torch.testing.assert_close(encoder(views(side=60), [MapSpec(layers=(3,))])["layer_3"], states[3], rtol=0, atol=1e-6)


def test_dinov2_sees_views_of_its_crop_or_of_its_config(tmp_path):
    write("dinov2 tower", tmp_path)
    assert describe_encoder(str(tmp_path)).view_px == 56
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"crop_size": 42, "image_mean": [0.1, 0.2, 0.3]}))
    spec = describe_encoder(str(tmp_path))
    assert (spec.view_px, spec.num_patches, spec.mean, spec.std) == (42, 9, (0.1, 0.2, 0.3), (0.229, 0.224, 0.225))
    (tmp_path / "preprocessor_config.json").unlink()
    spec = describe_encoder(str(tmp_path))
    assert (spec.view_px, spec.num_patches, spec.mean) == (70, 25, (0.485, 0.456, 0.406))
    assert tuple(load_encoder(spec, 1)(views(side=70), [MapSpec(layers=(1,))])["layer_1"].shape) == (2, 25, 32)


@pytest.mark.parametrize(
    ("kind", "file", "change", "message"),
    [
        ("dinov2 tower", "preprocessor_config.json", {"crop_size": {"height": 56, "width": 70}}, r"crop_size should be a side in pixels.*found \{"),
        ("dinov2 tower", "preprocessor_config.json", {"crop_size": 13}, r"at least one patch, found views of 13 px and patches of 14 px"),
        ("clip tower", "config.json", {"image_size": 0}, r"image_size should be a side in pixels.*found 0"),
        ("siglip2 tower", "config.json", {"num_patches": 17}, r"num_patches should be a square number, found 17"),
    ],
)
def test_views_that_are_not_square_are_refused(kind, file, change, message, tmp_path):
    write(kind, tmp_path)
    path = tmp_path / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(EncoderError, match=message):
        describe_encoder(str(tmp_path))


@pytest.mark.parametrize("kind", MODELS)
def test_a_plan_needs_the_config_alone(kind, tmp_path):
    write(kind, tmp_path)
    whole = describe_encoder(str(tmp_path))
    assert plan_encoder(str(tmp_path)) == whole
    (tmp_path / "model.safetensors").unlink()
    planned = plan_encoder(str(tmp_path))
    assert isinstance(planned.weights_sha256, UnknownDigest)
    assert planned == dataclasses.replace(whole, weights_sha256=UnknownDigest(f"the weights of {tmp_path}"))
    with pytest.raises(EncoderError, match="found none"):
        describe_encoder(str(tmp_path))
    with pytest.raises(EncoderError, match="found none"):
        load_encoder(planned, 1)


def test_a_plan_takes_what_the_hubs_cache_holds_and_asks_no_network(tiny_encoder_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the network"))
    with pytest.raises(
        EncoderError, match=r"a plan asks no network, and takes a folder with its config\.json\. Known are openai/clip-vit-base-patch32, "
    ):
        plan_encoder("some/tower")
    snapshot = tmp_path / "models--some--tower" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    shutil.copyfile(tiny_encoder_folder / "config.json", snapshot / "config.json")
    assert plan_encoder("some/tower").weights_sha256 == UnknownDigest("the weights of some/tower")
    (snapshot / "pytorch_model.bin").write_bytes(b"of another program; a run fetches safetensors")
    assert plan_encoder("some/tower").weights_sha256 == UnknownDigest("the weights of some/tower")
    shutil.copyfile(tiny_encoder_folder / "model.safetensors", snapshot / "model.safetensors")
    expected = describe_encoder(str(tiny_encoder_folder))
    assert plan_encoder("some/tower") == dataclasses.replace(expected, model="some/tower")
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))
    assert isinstance(plan_encoder("some/tower").weights_sha256, UnknownDigest)


def test_weights_that_an_index_names_must_all_be_there(tiny_encoder_folder, tmp_path):
    folder = shutil.copytree(tiny_encoder_folder, tmp_path / "encoder")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(EncoderError, match=r"found no model-00002-of-00002\.safetensors; copy or fetch it"):
        encoder_folder(str(folder))
    assert isinstance(plan_encoder(str(folder)).weights_sha256, UnknownDigest)
    index.write_text("[]")
    with pytest.raises(EncoderError, match=r"found no model\.safetensors\.index\.json"):
        encoder_folder(str(folder))


def test_a_mean_is_the_mean_of_its_layers_in_fp32(tiny_encoder_folder):
    encoder = load_encoder(describe_encoder(str(tiny_encoder_folder)), 6, dtype=torch.bfloat16)
    maps = [MapSpec(layers=(1, 2, 6)), *(MapSpec(layers=(layer,)) for layer in (1, 2, 6))]
    found = encoder(views(), maps)
    assert {value.dtype for value in found.values()} == {torch.float32}
    torch.testing.assert_close(found["mean_1.2.6"], (found["layer_1"] + found["layer_2"] + found["layer_6"]) / 3, rtol=1e-6, atol=1e-6)


def test_a_pool_is_the_mean_of_squares_of_patches_row_by_row(tiny_encoder_folder):
    encoder = load_encoder(describe_encoder(str(tiny_encoder_folder)), 6)
    whole, pooled = MapSpec(layers=(2, 6)), MapSpec(layers=(2, 6), pool=2)
    found = encoder(views(3), [whole, pooled])
    assert (whole.name, pooled.name) == ("mean_2.6", "mean_2.6_pool_2")
    assert found[pooled.name].shape == (3, 4, found[whole.name].shape[2])
    for view in range(3):
        for row in range(2):
            for column in range(2):
                square = [found[whole.name][view, (2 * row + y) * 4 + 2 * column + x] for y in range(2) for x in range(2)]
                torch.testing.assert_close(found[pooled.name][view, 2 * row + column], sum(square) / 4, rtol=1e-6, atol=1e-6)


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
    with pytest.raises(EncoderError, match=r"Pickled weights can run code"):
        plan_encoder(str(folder))
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
