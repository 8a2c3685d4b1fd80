"""Every known encoder at its real width, view and patch, two blocks deep, with random weights: our maps against the stock model's hidden states."""

from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

from model.architectures import known_encoder, known_encoders
from model.encoder import describe_encoder, load_encoder
from model.specs import MapSpec


def stock(spec: Any) -> Any:
    size = {"hidden_size": spec.width, "num_attention_heads": spec.num_heads, "patch_size": spec.patch_px, "num_hidden_layers": 3}
    match spec.family:
        case "clip":
            return CLIPVisionModel(CLIPVisionConfig(**size, intermediate_size=spec.mlp_width, image_size=spec.view_px))
        case "siglip":
            return SiglipVisionModel(SiglipVisionConfig(**size, intermediate_size=spec.mlp_width, image_size=spec.view_px))
        case "siglip2":
            return Siglip2VisionModel(Siglip2VisionConfig(**size, intermediate_size=spec.mlp_width, num_patches=spec.num_patches))
        case "dinov2":
            return Dinov2Model(Dinov2Config(**size, image_size=518, use_swiglu_ffn=spec.activation == "swiglu"))
        case "dinov2_with_registers":
            return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**size, image_size=518, use_swiglu_ffn=spec.activation == "swiglu"))


def hidden_states(model: Any, spec: Any, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if spec.family != "siglip2":
        return model(pixel_values=pixels, output_hidden_states=True).hidden_states
    patches = torch.stack([torch.from_numpy(convert_image_to_patches(image.numpy(), spec.patch_px)) for image in pixels])
    return model(
        pixel_values=patches,
        pixel_attention_mask=torch.ones(patches.shape[:2], dtype=torch.int32),
        spatial_shapes=torch.tensor([[spec.grid, spec.grid]] * len(patches)),
        output_hidden_states=True,
    ).hidden_states


DAILY = {
    "openai/clip-vit-base-patch32",
    "openai/clip-vit-base-patch16",
    "openai/clip-vit-large-patch14",
    "openai/clip-vit-large-patch14-336",
    "google/siglip-base-patch16-224",
    "google/siglip-so400m-patch14-384",
    "google/siglip2-base-patch32-256",
    "google/siglip2-so400m-patch14-384",
    "google/siglip2-base-patch16-naflex",
    "google/siglip2-so400m-patch16-naflex",
    "facebook/dinov2-base",
    "facebook/dinov2-with-registers-small",
}
"""One of each kind; the others take another minute."""


def test_the_daily_ones_are_known():
    assert set(known_encoders()) > DAILY
    assert {known_encoder(name).family for name in DAILY} == {known_encoder(name).family for name in known_encoders()}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in DAILY else pytest.mark.heavy) for name in known_encoders()])
@torch.no_grad()
def test_maps_are_the_stock_models_hidden_states(name, tmp_path):
    known = known_encoder(name)
    torch.manual_seed(0)
    model = stock(known).eval()
    model.save_pretrained(tmp_path)
    if known.family.startswith("dinov2"):
        (tmp_path / "preprocessor_config.json").write_text('{"crop_size": {"height": 224, "width": 224}}')
    spec = describe_encoder(str(tmp_path))
    assert (spec.view_px, spec.num_patches, spec.width) == (known.view_px, known.num_patches, known.width)
    encoder = load_encoder(spec, 2)
    side = spec.view_px
    views = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = encoder(views, [MapSpec(layers=(layer,)) for layer in range(3)])
    states = hidden_states(model, spec, encoder.normalise(views))
    for layer in range(3):
        assert tuple(found[f"layer_{layer}"].shape) == (1, spec.num_patches, spec.width)
        # Same kernels in the same order; measured difference 0 on CPU.
        torch.testing.assert_close(found[f"layer_{layer}"], states[layer][:, spec.prefix_tokens :], rtol=0, atol=1e-6)
    for file in tmp_path.iterdir():
        file.unlink()
