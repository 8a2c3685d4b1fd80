"""Folders of transformers' own LLaVA and LLaVA-NeXT, written from a trained connector, and what they answer.

    config.json, model*.safetensors     LlavaConfig or LlavaNextConfig: vision tower, folded projector (see model/folding.py), language model
    processor_config.json, preprocessor_config.json, chat_template.jinja, tokenizer files
    generation_config.json              greedy, and the tokens that end an answer

Input: a trained connector in memory and its encoder's folder. Output: a folder that transformers loads with none of our code. Invariant: a picture's
pixels, the token ids around it and the numbers behind it are those of Loupe's own prompt. The pixels are so with transformers' Pillow processors
(`backend="pil"`); its torchvision ones, which it takes by itself where torchvision is installed, resize otherwise: most pixels are the same, most
others are off by 1 of 255, and by up to 16 where random noise is made larger on one side and smaller on the other (torchvision 0.29).

The language model gets one token more, `<image>`, which stands for visual tokens and is never wanted as an answer: its rows are copies of a token's
that is none either, so it never is the likelier of the two.
"""

import copy
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from model.chat import IMAGE_PLACE, tokenise_question
from model.encoder import encoder_folder
from model.errors import FoldingError
from model.folding import STOCK_CLASSES, STOCK_TOWERS, FoldedProjector, check_foldable, fold_connector
from model.images import decode_image
from model.language_model import decoder
from model.specs import EncoderSpec, StockForm
from model.views import ViewSpec
from model.vision_language import VisionLanguageModel

__all__ = ["MAX_NEW_TOKENS", "AutoLoaded", "anonymous", "decodes_alike", "generation_config", "picture_template", "write_llava"]

MAX_NEW_TOKENS = 64
"""Of an answer, unless whoever asks says otherwise: as `loupe ask`."""

_MAX_SHARD = "4GB"

_PROBES = ("What?", "a", " x", "\nWhich number stands there?", "2 of 3?")
"""Questions that begin in different ways, to see how a tokenizer joins them to what stands before."""


@torch.no_grad()
def write_llava(
    folder: Path, form: StockForm, model: VisionLanguageModel, *, encoder: EncoderSpec, views: ViewSpec, max_shard_size: str = _MAX_SHARD
) -> None:
    """Write a trained connector with its models as a folder of transformers' own classes.

    Args:
        folder: where to; made if need be.
        form: which class.
        model: trained. Its language model's embeddings grow by the row of `<image>`; all other numbers stay.
        encoder: whose maps the connector reads.
        views: how pictures are cut.
        max_shard_size: of a weights file.

    Raises:
        FoldingError: the stock model does not compute this connector, or has no place for this language model or tokenizer.
    """
    check_foldable(form, model.connector.spec, encoder, views)
    folded = fold_connector(model.connector)
    tokenizer = _with_image_token(model.tokenizer)
    image_token_id = int(tokenizer.convert_tokens_to_ids(IMAGE_PLACE))
    if IMAGE_PLACE not in model.tokenizer.get_vocab():
        _make_room(model.language_model, tokenizer, image_token_id)
    stock = _assembled(form, model.language_model, folded, encoder, views, image_token_id)
    stock.generation_config = generation_config(model, tokenizer, [image_token_id])
    stock.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    _write_processor(folder, form, encoder, views)


def _with_image_token(original: Any) -> Any:
    """A copy of the tokenizer that knows `<image>`, adds nothing by itself, pads in front, and takes messages with pictures."""
    from tokenizers import AddedToken

    tokenizer = copy.deepcopy(original)
    tokenizer.add_tokens([AddedToken(IMAGE_PLACE, special=True, normalized=False)], special_tokens=True)
    if len(tokenizer.encode("a")) != len(tokenizer.encode("a", add_special_tokens=False)):
        # The chat template writes what a prompt begins with; a tokenizer that adds it once more would double it.
        tokenizer.add_bos_token = tokenizer.add_eos_token = False
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # it is saved with what it was made from
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for joint in ("", " "):
        tokenizer.chat_template = picture_template(original.chat_template, joint)
        if all(_same_ids(original, tokenizer, question) for question in _PROBES):
            return tokenizer
    raise FoldingError(
        f"the tokenizer of this language model gives other tokens for a text behind {IMAGE_PLACE} than for the same text by itself, and a blank "
        "between them does not mend it, so that a stock processor cannot write Loupe's prompt; take --to loupe"
    )


def _same_ids(original: Any, tokenizer: Any, question: str) -> bool:
    """Whether the stock prompt of a question is Loupe's own."""
    wanted = tokenise_question(original, question, 2**20)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    place = tokenizer.convert_tokens_to_ids(IMAGE_PLACE)
    return bool(tokenizer(text)["input_ids"] == [*wanted.before, place, *wanted.after])


def picture_template(own: str, joint: str) -> str:
    """The language model's chat template, for messages whose content lists pictures and texts.

    Args:
        own: the template for texts.
        joint: what stands between a picture's place and the line break behind it.

    Returns:
        A template that renders a text as `own` does.
    """
    place = f"{IMAGE_PLACE}{joint}\\n"
    return (
        "{%- set loupe = namespace(messages=[], pictures=0) -%}"
        "{%- for message in messages -%}"
        "{%- if message['content'] is string -%}"
        f"{{%- set text = message['content'] | replace('{IMAGE_PLACE}\\n', '{place}') -%}}"
        "{%- else -%}"
        "{%- set pictures = message['content'] | selectattr('type', 'equalto', 'image') | list | length -%}"
        "{%- set loupe.pictures = loupe.pictures + pictures -%}"
        "{%- set words = message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('') -%}"
        f"{{%- set text = '{place}' * pictures + words -%}}"
        "{%- endif -%}"
        "{%- set loupe.messages = loupe.messages + [dict(message, content=text)] -%}"
        "{%- endfor -%}"
        "{%- if loupe.pictures > 1 -%}"
        "{{- raise_exception('this model was trained on one picture in a conversation; give one') -}}"
        "{%- endif -%}"
        "{%- set messages = loupe.messages -%}"
        "{{- '' }}" + own
    )


def _make_room(network: nn.Module, tokenizer: Any, image_token_id: int) -> None:
    """Rows of `<image>` in the embeddings and in the head."""
    embeddings: nn.Embedding = network.get_input_embeddings()  # type: ignore[operator]
    if image_token_id >= embeddings.num_embeddings:
        network.resize_token_embeddings(image_token_id + 1, mean_resizing=False)  # type: ignore[operator]
    never = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id]
    like = next((token for token in never if token is not None and token not in (tokenizer.eos_token_id, image_token_id)), image_token_id - 1)
    for table in (network.get_input_embeddings(), network.get_output_embeddings()):  # type: ignore[operator]
        table.weight.data[image_token_id] = table.weight.data[like]


def _assembled(form: StockForm, network: nn.Module, folded: FoldedProjector, encoder: EncoderSpec, views: ViewSpec, image_token_id: int) -> Any:
    """The stock model around our language model, tower and folded projector."""
    import transformers

    head: Any = network.get_output_embeddings()  # type: ignore[operator]
    tower = getattr(transformers, STOCK_TOWERS[encoder.family]).from_pretrained(
        encoder_folder(encoder.model), dtype=torch.float32, local_files_only=True
    )
    text_config, vision_config = anonymous(network.config), anonymous(tower.config)
    text_config.dtype = vision_config.dtype = "float32"
    if vision_config.image_size != encoder.view_px and form == "llava-next-hf":
        raise FoldingError(
            f"--to {form}: encoder {encoder.model} was trained on {vision_config.image_size} px and is used on {encoder.view_px} px, and LLaVA-NeXT "
            "takes the former for its grids; take --to loupe"
        )
    fields: dict[str, Any] = {
        "vision_config": vision_config,
        "text_config": text_config,
        "image_token_index": image_token_id,
        "image_seq_length": encoder.num_patches,
        "projector_hidden_act": "gelu",
        "vision_feature_select_strategy": _strategy(encoder),
        "vision_feature_layer": folded.layers[0] if len(folded.layers) == 1 else list(folded.layers),
        "tie_word_embeddings": bool(text_config.tie_word_embeddings),
    }
    if form == "llava-next-hf":
        fields["image_grid_pinpoints"] = _pinpoints(encoder, views)
    config_class = getattr(transformers, STOCK_CLASSES[form].replace("ForConditionalGeneration", "Config"))
    with torch.device("meta"):
        stock = getattr(transformers, STOCK_CLASSES[form])(config_class(**fields))
    body = decoder(network)
    if type(stock.model.language_model) is not type(body) or head.bias is not None:
        raise FoldingError(
            f"--to {form}: a {type(network).__name__} is more than its decoder with a plain head, and {STOCK_CLASSES[form]} has no place for the "
            "rest; take --to loupe"
        )
    stock.model.vision_tower, stock.model.language_model, stock.lm_head = tower, body, head
    projector = stock.model.multi_modal_projector
    for linear, weight, bias in ((projector.linear_1, folded.weight_1, folded.bias_1), (projector.linear_2, folded.weight_2, folded.bias_2)):
        linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(bias)
    if form == "llava-next-hf":
        assert folded.newline is not None
        stock.model.image_newline = nn.Parameter(folded.newline)
    return stock


def anonymous(config: Any) -> Any:
    """A copy of a config that does not tell from which folder of this machine it was loaded.

    Args:
        config: of a loaded model.

    Returns:
        The copy.
    """
    bare = copy.deepcopy(config)
    bare.name_or_path = ""
    return bare


def _strategy(encoder: EncoderSpec) -> str:
    """How stock models take prefix tokens away: `default` drops one, `full` none."""
    return "default" if encoder.prefix_tokens else "full"


def _pinpoints(encoder: EncoderSpec, views: ViewSpec) -> list[list[int]]:
    """Heights and widths of the canvases, in the rule's order, since the first of equally good ones wins there too."""
    return [[rows * encoder.view_px, columns * encoder.view_px] for columns, rows in views.candidate_grids]


def generation_config(model: VisionLanguageModel, tokenizer: Any, never: list[int] | None = None) -> Any:
    """How transformers generates what `ask` answers: greedily, up to the same end tokens.

    Args:
        model: whose end tokens.
        tokenizer: whose padding.
        never: tokens that no answer holds.

    Returns:
        A GenerationConfig.
    """
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=model.end_ids(),
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=never,
    )


def _write_processor(folder: Path, form: StockForm, encoder: EncoderSpec, views: ViewSpec) -> None:
    """The processor, as data: transformers takes its Pillow or its torchvision class by what is installed."""
    side = {"height": encoder.view_px, "width": encoder.view_px}
    kind = {"llava-hf": "LlavaImageProcessor" if views.global_fit == "pad" else "CLIPImageProcessor", "llava-next-hf": "LlavaNextImageProcessor"}[
        form
    ]
    image_processor: dict[str, Any] = {
        "image_processor_type": kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": encoder.view_px} if form == "llava-next-hf" else side,
        "resample": 3,
        "do_center_crop": False,
        "crop_size": side,  # nothing is cropped; some readers take a view's side from here
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(encoder.mean),
        "image_std": list(encoder.std),
    }
    if form == "llava-next-hf":
        image_processor |= {"image_grid_pinpoints": _pinpoints(encoder, views), "do_pad": True}
    elif views.global_fit == "pad":
        image_processor["do_pad"] = True
    name = STOCK_CLASSES[form].replace("ForConditionalGeneration", "Processor")
    processor = {
        "processor_class": name,
        "image_processor": image_processor,
        "image_token": IMAGE_PLACE,
        "num_additional_image_tokens": encoder.prefix_tokens,
        "patch_size": encoder.patch_px,
        "vision_feature_select_strategy": _strategy(encoder),
    }
    for file, values in (("processor_config.json", processor), ("preprocessor_config.json", {**image_processor, "processor_class": name})):
        (folder / file).write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")


def decodes_alike(image_bytes: bytes) -> bool:
    """Whether Pillow by itself gives the pixels that Loupe does, which turns, lays on black and converts colours where a file says so.

    Args:
        image_bytes: an image file that Loupe accepts.
    """
    from PIL import Image

    ours = decode_image(image_bytes)
    with Image.open(io.BytesIO(image_bytes)) as opened:
        return opened.size == ours.size and opened.convert("RGB").tobytes() == ours.tobytes()


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoLoaded:
    """A written folder, loaded by transformers' Auto classes, and asked as its card says."""

    network: Any
    processor: Any

    @classmethod
    def load(cls, folder: Path) -> "AutoLoaded":
        """Load a folder in the type that it names, with Pillow's pixels.

        Args:
            folder: as `write_llava` wrote it, or `model.auto.write_loupe`, whose module then has to be imported.

        Returns:
            The model.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        processor = AutoProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
        network: Any = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True)
        return cls(network=network.eval(), processor=processor)

    def inputs(self, image_bytes: bytes, question: str) -> Any:
        """A question's prompt.

        Args:
            image_bytes: an image file.
            question: about it.

        Returns:
            What the network takes.
        """
        from PIL import Image

        with Image.open(io.BytesIO(image_bytes)) as opened:
            image = opened.convert("RGB")
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        return self.processor(images=image, text=text, return_tensors="pt")

    @torch.no_grad()
    def prompt_logits(self, image_bytes: bytes, question: str, *, last: int = 0) -> Float[Tensor, "length vocabulary"]:
        """Logits at the positions of a question's prompt.

        Args:
            image_bytes: an image file.
            question: about it.
            last: so many positions at the end; 0 is all.

        Returns:
            Logits in fp32.
        """
        logits: Tensor = self.network(**self.inputs(image_bytes, question), logits_to_keep=last).logits[0].float()
        return logits

    @torch.no_grad()
    def ask(self, image_bytes: bytes, question: str, max_new_tokens: int) -> str:
        """Answer a question greedily.

        Args:
            image_bytes: an image file.
            question: about it.
            max_new_tokens: the answer ends here at the latest.

        Returns:
            The answer.
        """
        inputs = self.inputs(image_bytes, question)
        tokens = self.network.generate(**inputs, max_new_tokens=max_new_tokens)[0, inputs["input_ids"].shape[1] :]
        return str(self.processor.decode(tokens, skip_special_tokens=True)).strip()
