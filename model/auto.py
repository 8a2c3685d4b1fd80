"""Loupe's models as transformers models: importing this module registers them with the Auto classes.

    import model.auto
    network = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)

Everything that a recipe can train fits: mixtures, local views, selectors, newlines. Input: what LoupeProcessor makes of pictures and prompts. Output:
logits and answers, those of `loupe ask` on the same run. Invariant: a prompt holds the place of its picture once, as IMAGE_TOKEN_ID; how many visual
tokens come there is the model's affair, since a selector decides it by the question. For inference: nothing here takes labels.

Source: transformers' PreTrainedModel and ProcessorMixin. Differs: pixels are uint8 views that the model normalises, as everywhere in Loupe.
"""

import contextlib
import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, no_type_check

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    initialization,
)
from transformers.feature_extraction_utils import BatchFeature
from transformers.modeling_outputs import CausalLMOutput

from model.chat import IMAGE_PLACE, Conversation
from model.compression import Resampler, place_codes
from model.connector import Connector
from model.decoding import from_json
from model.encoder import Encoder, compute_dtype, encoder_folder
from model.errors import ExportError
from model.export import ExportConfig, as_stored
from model.images import cut_views, decode_image
from model.language_model import LanguageModel
from model.llava_hf import anonymous, generation_config, picture_template
from model.specs import EncoderSpec, canonical_json, deepest_layer
from model.views import Branch, ViewPlan, ViewSpec, plan_views
from model.vision_language import Batch, Mode, VisionLanguageModel, lay_out_images, plan_sequences

__all__ = ["IMAGE_TOKEN_ID", "LoupeConfig", "LoupeForConditionalGeneration", "LoupeProcessor", "write_loupe"]

IMAGE_TOKEN_ID = -200
"""Stands for a picture in input ids: no token of any language model, so their embeddings stay as they are."""

TOWERS: dict[str, str] = {
    "clip": "CLIPVisionModel",
    "siglip": "SiglipVisionModel",
    "siglip2": "Siglip2VisionModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
}
"""The class in transformers of every encoder family."""


class LoupeConfig(PreTrainedConfig):
    """What a Loupe model computes: the configs of its two models, and Loupe's own beside them."""

    model_type = "loupe"
    __no_type_check__ = True  # transformers makes it a dataclass whose __init__ takes more than its fields, which no checker of types believes
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig, "vision_config": AutoConfig}

    text_config: Any = None
    vision_config: Any = None
    loupe: dict[str, Any] | None = None
    """An ExportConfig, as JSON."""
    separator_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Make configs of what JSON gives."""
        for name in self.sub_configs:
            value = getattr(self, name)
            if isinstance(value, dict):
                values = dict(value)
                setattr(self, name, AutoConfig.for_model(values.pop("model_type"), **values))
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]

    @property
    def computes(self) -> ExportConfig:
        """The typed config.

        Raises:
            ExportError: there is none.
        """
        if self.loupe is None:
            raise ExportError("a LoupeConfig needs the field loupe, found none; load a folder that `loupe export RECIPE --to loupe` wrote")
        return from_json(ExportConfig, self.loupe, where="config.json: loupe")


@contextlib.contextmanager
def _plain_tensors() -> Iterator[None]:
    """New tensors are fp32 and on the CPU: a load sets another device and type, in which a connector's start cannot be drawn."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


class LoupeForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Vision tower, connector and language model; `generate` answers as `loupe ask` does.

    Args:
        config: what it computes.
    """

    config_class = LoupeConfig
    base_model_prefix = "language_model"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012 - transformers declares it so
    _supports_sdpa = True
    _supports_flash_attn = True
    # A language model that was frozen in bf16 is loaded so; the rest always computes from fp32, as in training.
    _keep_in_fp32_modules_strict = {"connector", "vision_tower"}  # noqa: RUF012 - transformers declares it so

    def __init__(self, config: LoupeConfig) -> None:
        super().__init__(config)
        computes = config.computes
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        with _plain_tensors():
            self.connector = Connector(
                computes.connector,
                encoder_width=computes.encoder.width,
                num_patches=computes.encoder.num_patches,
                hidden=self.language_model.get_input_embeddings().weight.shape[1],
                embedding_rms=1.0,
                generator=torch.Generator().manual_seed(0),
            )
        self.post_init()  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """What no file holds: transformers empties these buffers when it loads a model. Weights start as the connector draws them."""
        if isinstance(module, Resampler):
            query_places, key_places = place_codes(module.query_grid, module.key_grid, module.width)
            initialization.copy_(module.query_places, query_places)
            initialization.copy_(module.key_places, key_places)

    def _parts(self) -> tuple[VisionLanguageModel, Encoder]:
        """The same modules under the names that compute; made anew each time, since they hold nothing of their own."""
        computes = self.config.computes
        language_model = LanguageModel(network=self.language_model, tokenizer=None, max_tokens=0)
        model = VisionLanguageModel(self.connector, language_model, precision=computes.precision, separator_id=self.config.separator_token_id)
        self.vision_tower.to(compute_dtype(computes.feature_compute, str(self.device), or_wider=True))
        return model, Encoder(self.vision_tower, computes.encoder, self.config.vision_config.num_hidden_layers).to(self.device)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Int[Tensor, "batch length"],
        pixel_values: UInt8[Tensor, "views 3 px px"] | None = None,
        image_sizes: Int[Tensor, "images 2"] | None = None,
        attention_mask: Int[Tensor, "batch length"] | None = None,
        *,
        mode: Mode = "both",
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Logits of prompts.

        Args:
            input_ids: padded in front; IMAGE_TOKEN_ID once where a picture stands.
            pixel_values: views of all pictures, each its global one first, then its local ones row by row.
            image_sizes: height and width of each picture, in pixels.
            attention_mask: 0 at padding.
            mode: which views are shown.
            logits_to_keep: so many positions at the end; 0 is all.
            **kwargs: ignored where transformers passes its own on (`return_dict` and the like).

        Returns:
            Logits at every position of the prompts with their visual tokens, which are more than the ids; padded in front.
        """
        del kwargs
        model, encoder = self._parts()
        batch = self._batch(encoder, input_ids, pixel_values, image_sizes, attention_mask, mode)
        return CausalLMOutput(logits=model.prompt_logits(batch, logits_to_keep))

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: Int[Tensor, "batch length"],
        pixel_values: UInt8[Tensor, "views 3 px px"] | None = None,
        image_sizes: Int[Tensor, "images 2"] | None = None,
        attention_mask: Int[Tensor, "batch length"] | None = None,
        *,
        mode: Mode = "both",
        **options: Any,
    ) -> Any:
        """Answer prompts.

        Args:
            input_ids: as for `forward`; so for the other tensors.
            pixel_values: as for `forward`.
            image_sizes: as for `forward`.
            attention_mask: as for `forward`.
            mode: which views are shown.
            **options: of the language model's own `generate`.

        Returns:
            The prompts' ids and the new ones, as every transformers model gives them; with `return_dict_in_generate` an object that holds them.
        """
        model, encoder = self._parts()
        batch = self._batch(encoder, input_ids, pixel_values, image_sizes, attention_mask, mode)
        if "generation_config" not in options:
            self.language_model.generation_config = self.generation_config
        with model.autocast():
            sequences = model.sequences(batch, model.visual_tokens(batch), pad_left=True)
            mask, _ = sequences.left_padding()
            generated = self.language_model.generate(inputs_embeds=sequences.embedded, attention_mask=mask, **options)
        if isinstance(generated, Tensor):
            return torch.cat([_repeated(input_ids, generated), generated], dim=1)
        generated.sequences = torch.cat([_repeated(input_ids, generated.sequences), generated.sequences], dim=1)
        return generated

    def _batch(
        self,
        encoder: Encoder,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        image_sizes: Tensor | None,
        attention_mask: Tensor | None,
        mode: Mode,
    ) -> Batch:
        computes = self.config.computes
        spec = computes.connector
        rows = _texts(input_ids, attention_mask)
        pictured = [place is not None for place, _ in rows]
        sizes = [] if image_sizes is None else image_sizes.tolist()
        if mode != "blind" and (pixel_values is None or sum(pictured) != len(sizes)):
            raise ExportError(
                f"found {sum(pictured)} places of a picture in the prompts, and {len(sizes)} pictures; give each its own, or mode = 'blind'"
            )
        if mode == "local" and spec.local_branch is None:
            raise ExportError("this model has no local branch, so mode 'local' shows nothing; use 'global' or 'blind'")
        plans = [plan_views(width, height, computes.encoder.view_px, computes.views) for height, width in sizes]
        shows_global = mode in ("global", "both") and bool(plans)
        shows_local = mode in ("local", "both") and spec.local_branch is not None and bool(plans)
        first = _first_views(plans, local=spec.local_branch is not None)
        global_maps = local_maps = None
        if shows_global and pixel_values is not None:
            global_maps = _maps(encoder, pixel_values[first[:-1]], spec.global_branch.fusion.maps, computes)
        if shows_local and pixel_values is not None and spec.local_branch is not None:
            places = [place for start, stop in pairwise(first) for place in range(start + 1, stop)]
            local_maps = _maps(encoder, pixel_values[places], spec.local_branch.fusion.maps, computes)
        images = torch.tensor(pictured).cumsum(0) - 1
        batch = plan_sequences(
            [text for _, text in rows],
            [mode if there else "blind" for there in pictured],
            images.clamp(min=0).tolist(),
            lay_out_images(self.connector, [shows_global] * len(plans), [plan if shows_local else None for plan in plans]),
            pad_left=True,
            global_maps=global_maps,
            local_maps=local_maps,
            selects=computes.selects,
        )
        return batch.to(self.device)


def _repeated(input_ids: Tensor, generated: Tensor) -> Tensor:
    """Each prompt as often as it was answered."""
    return input_ids.to(generated.device).repeat_interleave(len(generated) // len(input_ids), dim=0)


def _texts(input_ids: Tensor, attention_mask: Tensor | None) -> list[tuple[int | None, Conversation]]:
    """Where each prompt's picture stands, and its text before and behind."""
    found: list[tuple[int | None, Conversation]] = []
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    for row, kept in zip(input_ids.tolist(), mask.tolist(), strict=True):
        ids = [token for token, there in zip(row, kept, strict=True) if there]
        places = [number for number, token in enumerate(ids) if token == IMAGE_TOKEN_ID]
        if len(places) > 1:
            raise ExportError(f"a prompt holds {len(places)} places of a picture; this model was trained on one, so give one")
        place = places[0] if places else None
        before, after = (ids, []) if place is None else (ids[:place], ids[place + 1 :])
        text = Conversation(before=tuple(before), after=tuple(after), supervised=(False,) * len(after), turns_kept=1)
        found.append((place, text))
    return found


def _first_views(plans: Sequence[ViewPlan], *, local: bool) -> list[int]:
    """The place of each picture's global view among all views, and how many there are in all."""
    first = [0]
    for plan in plans:
        first.append(first[-1] + 1 + (plan.rows * plan.columns if local else 0))
    return first


def _maps(encoder: Encoder, views: Tensor, maps: Sequence[Any], computes: ExportConfig) -> Mapping[str, Float[Tensor, "views patches width"]]:
    return as_stored(encoder(views, list(dict.fromkeys(maps))), computes.feature_precision)


class LoupeProcessor(ProcessorMixin):
    """Pictures to views, prompts to ids.

    Args:
        tokenizer: of the language model, with a chat template.
        chat_template: of messages with pictures.
        encoder: an EncoderSpec, as JSON.
        views: a ViewSpec, as JSON.
        shows_local: whether local views are cut.
    """

    encoder: dict[str, Any] | None
    views: dict[str, Any] | None
    shows_local: bool

    @no_type_check  # transformers reads the arguments' names off the code of this very function, which a checker of types wraps
    def __init__(
        self,
        tokenizer: Any = None,
        chat_template: str | None = None,
        encoder: dict[str, Any] | None = None,
        views: dict[str, Any] | None = None,
        shows_local: bool = True,
    ) -> None:
        self.encoder, self.views, self.shows_local = encoder, views, shows_local
        self.image_token, self.image_token_id = IMAGE_PLACE, IMAGE_TOKEN_ID
        super().__init__(tokenizer, chat_template=chat_template)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """Inputs of the model.

        Args:
            images: Pillow images or bytes of image files: one, or one for every prompt that holds `<image>`, in order.
            text: a rendered prompt, or several.
            **kwargs: ignored where transformers passes its own on (`return_tensors`, `padding`); tensors come out, padded in front.

        Returns:
            input_ids, attention_mask, and of pictures pixel_values (uint8) and image_sizes.

        Raises:
            ExportError: there is no text.
        """
        del kwargs
        if text is None:
            raise ExportError("the processor found no text; give a prompt with its chat template applied")
        texts = [text] if isinstance(text, str) else list(text)
        rows = [self._ids(one) for one in texts]
        longest = max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        data: dict[str, Any] = {
            "input_ids": torch.tensor([[pad] * (longest - len(row)) + row for row in rows]),
            "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
        }
        if pictures := _flat(images):
            data |= self._views(pictures)
        return BatchFeature(data)

    def decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """Text of ids; a picture's place has none.

        Args:
            token_ids: of one text, or of several.
            *args: of the tokenizer's `decode`.
            **kwargs: so too.

        Returns:
            The text, or the texts.
        """
        rows = token_ids.tolist() if isinstance(token_ids, Tensor) else token_ids
        if isinstance(rows, list) and rows and isinstance(rows[0], list | tuple | Tensor):
            return [self.decode(row, *args, **kwargs) for row in rows]
        return self.tokenizer.decode([token for token in rows if token != IMAGE_TOKEN_ID], *args, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> Any:
        """As `decode`, of several texts."""
        return self.decode(*args, **kwargs)

    def post_process_image_text_to_text(self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any) -> Any:
        """As `decode`, for transformers' pipelines.

        Args:
            generated_outputs: ids.
            skip_special_tokens: whether end tokens and the like are left out.
            **kwargs: of the tokenizer's `decode`.

        Returns:
            The texts.
        """
        return self.decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    def _ids(self, text: str) -> list[int]:
        """Text before and behind a picture's place is tokenised by itself, as in training."""
        ids: list[int] = []
        for number, piece in enumerate(text.split(IMAGE_PLACE)):
            ids += [IMAGE_TOKEN_ID] * (number > 0) + self.tokenizer.encode(piece, add_special_tokens=False)
        return ids

    def _views(self, pictures: Sequence[Any]) -> dict[str, Tensor]:
        encoder = from_json(EncoderSpec, self.encoder, where="processor_config.json: encoder")
        rule = from_json(ViewSpec, self.views, where="processor_config.json: views")
        views, sizes = [], []
        for picture in pictures:
            image = decode_image(picture) if isinstance(picture, bytes) else picture.convert("RGB")
            plan = plan_views(image.width, image.height, encoder.view_px, rule)
            branch: Branch | None = None if self.shows_local else "global"
            views.append(torch.from_numpy(cut_views(image, plan, branch, mean_colour=encoder.mean_colour)))
            sizes.append([image.height, image.width])
        return {"pixel_values": torch.cat(views), "image_sizes": torch.tensor(sizes)}


def _flat(images: Any) -> list[Any]:
    if images is None:
        return []
    return [image for item in images for image in _flat(item)] if isinstance(images, list | tuple) else [images]


@torch.no_grad()
def write_loupe(folder: Path, config: ExportConfig, model: VisionLanguageModel, *, max_shard_size: str = "4GB") -> None:
    """Write a trained connector with its models as a folder of the classes here.

    Args:
        folder: where to; made if need be.
        config: what it computes.
        model: trained, its language model in the type that the config says.
        max_shard_size: of a weights file.
    """
    import transformers

    spec, encoder = config.connector, config.encoder
    maps = [*spec.global_branch.fusion.maps, *(() if spec.local_branch is None else spec.local_branch.fusion.maps)]
    deepest = deepest_layer(maps)
    tower: Any = getattr(transformers, TOWERS[encoder.family]).from_pretrained(
        encoder_folder(encoder.model), num_hidden_layers=deepest, dtype=torch.float32, local_files_only=True
    )
    text_config, vision_config = anonymous(model.language_model.config), anonymous(tower.config)
    text_config.dtype = {"fp32": "float32", "bf16": "bfloat16"}[config.language_model_precision]
    vision_config.dtype = "float32"
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    own = LoupeConfig(
        text_config=text_config,
        vision_config=vision_config,
        loupe=json.loads(canonical_json(values)),
        separator_token_id=model.separator_id,
    )
    with torch.device("meta"):
        packed = LoupeForConditionalGeneration(own)
    packed.language_model, packed.vision_tower, packed.connector = model.language_model, tower, model.connector
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.chat_template = picture_template(tokenizer.chat_template, "")
    packed.generation_config = generation_config(model, tokenizer)
    packed.save_pretrained(folder, max_shard_size=max_shard_size)
    processor = LoupeProcessor(
        tokenizer=tokenizer,
        chat_template=tokenizer.chat_template,
        encoder=json.loads(canonical_json(encoder)),
        views=json.loads(canonical_json(config.views)),
        shows_local=spec.local_branch is not None,
    )
    processor.save_pretrained(folder)


AutoConfig.register("loupe", LoupeConfig, exist_ok=True)
AutoModel.register(LoupeConfig, LoupeForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(LoupeConfig, LoupeForConditionalGeneration, exist_ok=True)
AutoProcessor.register(LoupeConfig, LoupeProcessor, exist_ok=True)
