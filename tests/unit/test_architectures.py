"""Known shapes are held to transformers' own classes: parameters on the meta device, encoders to what a folder of them describes as."""

from typing import get_args

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Siglip2Config,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from model.architectures import (
    known_encoder,
    known_encoders,
    known_language_model,
    known_language_models,
    num_encoder_parameters,
    unknown_text,
)
from model.counting import empty_language_model
from model.encoder import plan_encoder
from model.errors import CanonicalisationError
from model.specs import EncoderFamily, UnknownDigest, fingerprint


def stock_config(spec):
    """The vision config in transformers that has this shape; whatever a class fixes by default (norms, activations) is left to it."""
    size = {"hidden_size": spec.width, "num_hidden_layers": spec.num_blocks, "num_attention_heads": spec.num_heads, "patch_size": spec.patch_px}
    match spec.family:
        case "clip":
            return CLIPVisionConfig(**size, intermediate_size=spec.mlp_width, image_size=spec.view_px)
        case "siglip":
            return SiglipVisionConfig(**size, intermediate_size=spec.mlp_width, image_size=spec.view_px)
        case "siglip2":
            return Siglip2VisionConfig(**size, intermediate_size=spec.mlp_width, num_patches=spec.num_patches)
        case "dinov2":
            return Dinov2Config(**size, mlp_ratio=4, image_size=518, use_swiglu_ffn=spec.activation == "swiglu")
        case "dinov2_with_registers":
            return Dinov2WithRegistersConfig(**size, mlp_ratio=4, image_size=518, use_swiglu_ffn=spec.activation == "swiglu")


CLASSES = {
    "clip": CLIPVisionModel,
    "siglip": SiglipVisionModel,
    "siglip2": Siglip2VisionModel,
    "dinov2": Dinov2Model,
    "dinov2_with_registers": Dinov2WithRegistersModel,
}


def test_every_family_is_known():
    assert {known_encoder(name).family for name in known_encoders()} == set(get_args(EncoderFamily)) == set(CLASSES)
    assert known_encoder("nobody/has-this") is None
    assert known_language_model("nobody/has-this") is None


@pytest.mark.parametrize("name", known_encoders())
def test_a_known_encoder_is_what_its_folder_describes_as(name, tmp_path):
    spec = known_encoder(name)
    assert spec.weights_sha256 == UnknownDigest(f"the weights of {name}")
    stock_config(spec).save_pretrained(tmp_path)
    if spec.family.startswith("dinov2"):
        (tmp_path / "preprocessor_config.json").write_text('{"crop_size": {"height": 224, "width": 224}}')
    found = plan_encoder(str(tmp_path))
    for field in ("family", "view_px", "patch_px", "width", "num_blocks", "prefix_tokens", "mean", "std", "num_heads", "mlp_width", "activation"):
        assert getattr(found, field) == getattr(spec, field), field
    assert found.norm_eps == spec.norm_eps
    assert plan_encoder(name) == spec


@pytest.mark.parametrize("name", known_encoders())
def test_parameters_of_a_known_encoder(name):
    spec = known_encoder(name)
    config = stock_config(spec)
    with torch.device("meta"):
        tower = CLASSES[spec.family](config)
    needed = ("embeddings.", "pre_layrnorm.", "encoder.")
    count = sum(value.numel() for part, value in tower.named_parameters() if part.startswith(needed) and "mask_token" not in part)
    assert num_encoder_parameters(spec, spec.num_blocks) == count
    one = sum(value.numel() for part, value in tower.named_parameters() if part.startswith(("encoder.layers.0.", "encoder.layer.0.")))
    assert num_encoder_parameters(spec, 0) == count - one * spec.num_blocks


def test_whole_models_hold_known_towers(tmp_path):
    for kind, name in (
        (CLIPConfig, "openai/clip-vit-large-patch14-336"),
        (SiglipConfig, "google/siglip2-so400m-patch14-384"),
        (Siglip2Config, "google/siglip2-so400m-patch16-naflex"),
    ):
        spec = known_encoder(name)
        kind(vision_config=stock_config(spec).to_dict()).save_pretrained(tmp_path)
        found = plan_encoder(str(tmp_path))
        assert (found.family, found.num_patches, found.num_blocks) == (spec.family, spec.num_patches, spec.num_blocks)


# As the models' cards and files give them.
PUBLISHED = {
    "lmsys/vicuna-7b-v1.5": 6_738_415_616,
    "lmsys/vicuna-13b-v1.5": 13_015_864_320,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "microsoft/phi-2": 2_779_683_840,
    "smollm2-135m-instruct": 134_515_008,
}


@pytest.mark.parametrize("name", known_language_models())
def test_parameters_of_a_known_language_model(name):
    shape = known_language_model(name)
    network = empty_language_model(shape)
    assert type(network).__name__ == {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "phi": "PhiForCausalLM"}[shape.family]
    network.tie_weights()
    assert shape.num_parameters == sum(value.numel() for value in network.parameters()) == PUBLISHED[name]


def test_a_packaged_language_model_is_known_as_it_is():
    from workers.language_models import PACKAGED

    for name, packaged in PACKAGED.items():
        shape = known_language_model(name)
        assert (shape.hidden, shape.context_tokens) == (packaged.hidden, packaged.max_tokens)


def test_what_is_only_known_has_no_key():
    with pytest.raises(
        CanonicalisationError, match=r"EncoderSpec\.weights_sha256: the weights of openai/clip-vit-base-patch32 are not on this machine"
    ):
        fingerprint(known_encoder("openai/clip-vit-base-patch32"))


def test_what_is_not_known_is_told_with_the_name_that_was_meant():
    said = unknown_text("openai/clip-vit-large-patch14-366", known_encoders())
    assert "did you mean 'openai/clip-vit-large-patch14-336'?" in said
    assert "a plan asks no network, and takes a folder with its config.json" in said
    assert "did you mean" not in unknown_text("quite/another", known_encoders())
