"""Written folders against Loupe itself, on random pictures of many shapes: pixels, token ids, hidden states, visual tokens, logits, greedy answers.

The stock side is transformers' own classes, loaded from the folder.
"""

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model.chat import tokenise_question
from model.connector import build_connector
from model.encoder import describe_encoder, load_encoder
from model.errors import FoldingError
from model.export import ExportConfig, ExportedModel
from model.images import cut_views
from model.language_model import load_language_model
from model.llava_hf import AutoLoaded, write_llava
from model.specs import ConnectorSpec, DCISpec, GlobalBranchSpec, LocalBranchSpec, MapSpec, MLPSpec, SCISpec, SingleSpec
from model.views import ViewSpec, plan_views
from model.vision_language import VisionLanguageModel
from tests.tiny import TINY_HIDDEN, tiny_tokenizer

# Worst of all cases below: 1.4e-6, on two cores of an AMD EPYC; the logits are of the order of 1.
TOLERANCE = 1e-5

SIZES = ((100, 60), (60, 100), (56, 56), (57, 200), (300, 40), (9, 7))
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1))
FUSIONS = {"single": SingleSpec(layer=3), "sci": SCISpec(base=3, layers=(0, 2)), "dci": DCISpec(base=3, groups=((0, 1), (2, 4)))}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, Path]:
    from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model, SiglipVisionConfig, SiglipVisionModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    folders = {}
    torch.manual_seed(0)
    models = {
        "clip": CLIPVisionModel(CLIPVisionConfig(**sizes, intermediate_size=48)),
        "siglip": SiglipVisionModel(SiglipVisionConfig(**sizes, intermediate_size=48)),
        "dinov2": Dinov2Model(Dinov2Config(**sizes, mlp_ratio=2)),
    }
    for name, model in models.items():
        folders[name] = tmp_path_factory.mktemp(name)
        for parameter in model.parameters():  # so that layers differ as trained ones do
            parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
        model.save_pretrained(folders[name])
    return folders


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def png(size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    picture(size).save(file, "PNG")
    return file.getvalue()


def assemble(encoder: Path, language_model: Path, fusion: Any, form: str, views: ViewSpec) -> ExportedModel:
    local = LocalBranchSpec(fusion=fusion, compression=None, merge="spatial_unpad", newline=True) if form == "llava-next-hf" else None
    spec = ConnectorSpec(global_branch=GlobalBranchSpec(fusion=fusion, adapters=MLPSpec()), local_branch=local, separator=None)
    described = describe_encoder(str(encoder))
    loaded = load_language_model(language_model)
    connector = build_connector(spec, described, hidden=loaded.hidden, embedding_rms=0.05, seed=4)
    tower = load_encoder(described, max(layer for map_spec in fusion.maps for layer in map_spec.layers))
    seen = np.concatenate([cut_views(picture((90, 50)), plan_views(90, 50, 56, views), mean_colour=described.mean_colour) for _ in range(2)])
    maps = tower(torch.from_numpy(seen), list(fusion.maps))
    connector.measure_inputs(maps, maps if local else None)
    model = VisionLanguageModel(connector, loaded)
    model.requires_grad_(requires_grad=False)
    config = ExportConfig(connector=spec, encoder=described, views=views, feature_precision="fp32", precision="fp32", language_model_precision="fp32")
    return ExportedModel(config=config, model=model, encoder=tower)


def written(ours: ExportedModel, form: str, folder: Path) -> AutoLoaded:
    write_llava(folder, form, ours.model, encoder=ours.config.encoder, views=ours.config.views)
    return AutoLoaded.load(folder)


CASES = [
    *(("llava-hf", encoder, fusion, fit) for encoder in ("clip", "siglip", "dinov2") for fusion in FUSIONS for fit in ("squash", "pad")),
    *(("llava-next-hf", encoder, fusion, "squash") for encoder in ("clip", "siglip", "dinov2") for fusion in FUSIONS),
]


@pytest.mark.parametrize(("form", "encoder", "fusion", "fit"), CASES)
def test_a_folded_connector_is_loupe_s_own(form, encoder, fusion, fit, encoders, tiny_language_model_folder, tmp_path):
    views = ViewSpec.anyres(grids=GRIDS) if form == "llava-next-hf" else ViewSpec.slime(global_fit=fit)
    ours = assemble(encoders[encoder], tiny_language_model_folder, FUSIONS[fusion], form, views)
    vocabulary = ours.model.language_model.get_output_embeddings().weight.shape[0]
    stock = written(ours, form, tmp_path)
    assert type(stock.network).__name__ == {"llava-hf": "Llava", "llava-next-hf": "LlavaNext"}[form] + "ForConditionalGeneration"
    for size in SIZES:
        data, question = png(size), f"What is {size[0]}?"
        expected, found = ours.prompt_logits(data, question), stock.prompt_logits(data, question)
        assert len(found) == len(expected), size
        assert (found[:, :vocabulary] - expected[:, :vocabulary]).abs().max() < TOLERANCE, size
        assert expected[:, :vocabulary].std() > 0.1  # there is something to be equal about
        inputs = stock.inputs(data, question)
        generated = stock.network.generate(**inputs, max_new_tokens=6, min_new_tokens=0)[0, inputs["input_ids"].shape[1] :].tolist()
        batch = ours.prompt(data, question)
        own = ours.model.generate(batch, 6)[0]
        assert generated[: len(own)] == own
        assert all(token in ours.model.end_ids() for token in generated[len(own) :])


def test_the_last_positions_are_the_last_positions(encoders, tiny_language_model_folder, tmp_path):
    ours = assemble(encoders["clip"], tiny_language_model_folder, FUSIONS["dci"], "llava-hf", ViewSpec.slime())
    stock = written(ours, "llava-hf", tmp_path)
    for side in (ours, stock):
        assert torch.allclose(side.prompt_logits(png((80, 60)), "What?", last=5), side.prompt_logits(png((80, 60)), "What?")[-5:], atol=1e-6)


@pytest.mark.parametrize("encoder", ["clip", "siglip", "dinov2"])
def test_hidden_states_of_stock_towers_are_counted_as_ours(encoder, encoders):
    """0 is the embedding output, for CLIP behind its first norm; k is the output of block k; the last is not normed."""
    from transformers import AutoModel

    spec = describe_encoder(str(encoders[encoder]))
    views = cut_views(picture((70, 90)), plan_views(70, 90, 56, ViewSpec.slime()), "local")
    ours = load_encoder(spec, 4)
    tower = AutoModel.from_pretrained(encoders[encoder])
    hidden = tower(ours.normalise(torch.from_numpy(views)), output_hidden_states=True).hidden_states
    assert len(hidden) == 5
    maps = ours(torch.from_numpy(views), [MapSpec(layers=(layer,)) for layer in range(5)])
    for layer in range(5):
        assert torch.allclose(hidden[layer][:, spec.prefix_tokens :], maps[f"layer_{layer}"], atol=1e-5), layer


@pytest.mark.parametrize(("form", "fit"), [("llava-hf", "squash"), ("llava-hf", "pad"), ("llava-next-hf", "squash")])
@pytest.mark.parametrize("size", [*SIZES, (640, 480), (333, 1000)])
def test_pixels_are_loupe_s_own_to_the_bit(form, fit, size, encoders, tiny_language_model_folder, tmp_path):
    views = ViewSpec.anyres(grids=GRIDS) if form == "llava-next-hf" else ViewSpec.slime(global_fit=fit)
    ours = assemble(encoders["clip"], tiny_language_model_folder, FUSIONS["single"], form, views)
    stock = written(ours, form, tmp_path)
    encoder = ours.config.encoder
    cut = cut_views(picture(size), plan_views(*size, 56, views), None if form == "llava-next-hf" else "global", mean_colour=encoder.mean_colour)
    pixels = stock.processor.image_processor(picture(size), return_tensors="pt")["pixel_values"].reshape(-1, 3, 56, 56)
    mean, std = (torch.tensor(numbers)[None, :, None, None] for numbers in (encoder.mean, encoder.std))
    assert np.array_equal(((pixels * std + mean) * 255).round().numpy().astype(np.uint8), cut)
    assert torch.allclose(pixels.float(), ours.encoder.normalise(torch.from_numpy(cut)), atol=1e-6)


def test_old_tokens_keep_their_numbers_and_the_new_one_never_wins(encoders, tiny_language_model_folder, tmp_path):
    ours = assemble(encoders["clip"], tiny_language_model_folder, FUSIONS["single"], "llava-hf", ViewSpec.slime())
    ids = torch.arange(6, 262)[None]
    before = ours.model.language_model(ids).logits.clone()
    stock = written(ours, "llava-hf", tmp_path)
    after = stock.network(input_ids=ids).logits
    assert after.shape[2] == before.shape[2] + 1 == stock.network.config.text_config.vocab_size
    assert torch.equal(after[..., :-1], before)
    pad = stock.processor.tokenizer.pad_token_id
    assert torch.equal(after[..., -1], after[..., pad])  # it is as likely as padding, which nobody learns to say
    assert stock.network.generation_config.suppress_tokens == [262] == [stock.network.config.image_token_id]
    assert not stock.network.generation_config.do_sample
    assert stock.network.generation_config.eos_token_id == ours.model.end_ids()


def test_a_place_that_the_language_model_knows_keeps_its_numbers(encoders, tiny_language_model_folder, tmp_path):
    from tokenizers import AddedToken
    from transformers import AutoModelForCausalLM

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    network = AutoModelForCausalLM.from_pretrained(tiny_language_model_folder)
    network.resize_token_embeddings(len(tokenizer) + 5)  # rows to spare, as published models have them
    network.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    ours = assemble(encoders["clip"], tmp_path / "model", FUSIONS["single"], "llava-hf", ViewSpec.slime())
    ids = torch.arange(6, 262)[None]
    before = ours.model.language_model(ids).logits.clone()
    stock = written(ours, "llava-hf", tmp_path / "stock")
    assert torch.equal(stock.network(input_ids=ids).logits, before)
    assert (stock.prompt_logits(png((80, 60)), "What?") - ours.prompt_logits(png((80, 60)), "What?")).abs().max() < TOLERANCE


def test_a_language_model_of_half_precision_files_is_written_in_single(encoders, tiny_language_model_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = shutil.copytree(tiny_language_model_folder, tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(tiny_language_model_folder, dtype=torch.float16).save_pretrained(folder)
    ours = assemble(encoders["clip"], folder, FUSIONS["dci"], "llava-hf", ViewSpec.slime())
    stock = written(ours, "llava-hf", tmp_path / "stock")
    assert {parameter.dtype for parameter in stock.network.parameters()} == {torch.float32}
    vocabulary = ours.model.language_model.config.vocab_size - 1
    expected, found = ours.prompt_logits(png((80, 60)), "What?"), stock.prompt_logits(png((80, 60)), "What?")
    assert (found - expected)[:, :vocabulary].abs().max() < TOLERANCE


def test_weights_come_in_shards(encoders, tiny_language_model_folder, tmp_path):
    ours = assemble(encoders["clip"], tiny_language_model_folder, FUSIONS["dci"], "llava-hf", ViewSpec.slime())
    write_llava(tmp_path, "llava-hf", ours.model, encoder=ours.config.encoder, views=ours.config.views, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert not list(tmp_path.glob("*.bin"))
    stock = AutoLoaded.load(tmp_path)
    expected = ours.prompt_logits(png((80, 60)), "What?")
    assert (stock.prompt_logits(png((80, 60)), "What?") - expected).abs().max() < TOLERANCE


def test_configs_tell_no_folder_of_this_machine(encoders, tiny_language_model_folder, tmp_path):
    ours = assemble(encoders["clip"], tiny_language_model_folder, FUSIONS["dci"], "llava-hf", ViewSpec.slime())
    write_llava(tmp_path, "llava-hf", ours.model, encoder=ours.config.encoder, views=ours.config.views)
    for file in tmp_path.glob("*.json"):
        assert str(encoders["clip"].parent) not in file.read_text(), file


# ---- prompts


def sentencepiece_tokenizer(scheme: str) -> Any:
    """As Llama's: a blank is a letter of its own, put before the text (`first`) or before every piece between special tokens (`always`)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<s>", "</s>"]
    letters = ["\u2581", "\n", *map(chr, range(33, 127))]
    vocabulary = {token: number for number, token in enumerate([*specials, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = (
        "{{ bos_token }}{% for message in messages %}{{ message['role'] | upper + ': ' + message['content'] + ' ' }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    return fast


def with_tokenizer(folder: Path, tokenizer: Any) -> Path:
    """A tiny language model that speaks another tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=TINY_HIDDEN,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
@pytest.mark.parametrize("question", ["What?", " two  blanks", "x", "a\nb"])
def test_prompts_are_loupe_s_own_for_sentencepiece_tokenizers_too(scheme, question, encoders, tmp_path):
    language_model = with_tokenizer(tmp_path / "model", sentencepiece_tokenizer(scheme))
    ours = assemble(encoders["clip"], language_model, FUSIONS["single"], "llava-hf", ViewSpec.slime())
    stock = written(ours, "llava-hf", tmp_path / "stock")
    wanted = tokenise_question(ours.model.tokenizer, question, 400)
    place = [stock.network.config.image_token_id] * 16
    expected = [*wanted.before, *place, *wanted.after]
    assert stock.inputs(png((60, 60)), question)["input_ids"][0].tolist() == expected
    messages = [{"role": "user", "content": [{"type": "image", "image": picture((60, 60))}, {"type": "text", "text": question}]}]
    whole = stock.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    assert whole["input_ids"][0].tolist() == expected
    data = png((60, 60))
    assert (
        stock.prompt_logits(data, question)[:, : ours.prompt_logits(data, question).shape[1] - 1] - ours.prompt_logits(data, question)[:, :-1]
    ).abs().max() < TOLERANCE


def test_a_tokenizer_that_cannot_join_is_refused(encoders, tmp_path):
    """It marks where a text starts, and takes away the blank that would stand for the mark."""
    from tokenizers import normalizers

    tokenizer = sentencepiece_tokenizer("first")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" \n", "\n")
    ours = assemble(encoders["clip"], with_tokenizer(tmp_path / "model", tokenizer), FUSIONS["single"], "llava-hf", ViewSpec.slime())
    with pytest.raises(FoldingError, match="gives other tokens for a text behind <image> than for the same text by itself"):
        write_llava(tmp_path / "stock", "llava-hf", ours.model, encoder=ours.config.encoder, views=ours.config.views)


def test_conversations_with_strings_with_parts_and_with_several_turns(encoders, tiny_language_model_folder, tmp_path):
    ours = assemble(encoders["clip"], tiny_language_model_folder, FUSIONS["single"], "llava-hf", ViewSpec.slime())
    stock = written(ours, "llava-hf", tmp_path)
    plain = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>\nWhat?"},
        {"role": "assistant", "content": "seven"},
        {"role": "user", "content": "And now?"},
    ]
    parts = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "seven"}]},
        {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
    ]
    wanted = ours.model.tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    for messages in (plain, parts):
        assert stock.processor.apply_chat_template(messages, add_generation_prompt=True) == wanted
        assert stock.processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == wanted
    behind = [{"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image"}]}]
    assert stock.processor.apply_chat_template(behind) == stock.processor.apply_chat_template(parts[1:2])
    twice = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What?"}]}]
    with pytest.raises(Exception, match="one picture in a conversation"):
        stock.processor.apply_chat_template(twice)


def test_a_batch_of_unlike_prompts_gives_each_its_own_answer(encoders, tiny_language_model_folder, tmp_path):
    ours = assemble(encoders["clip"], tiny_language_model_folder, FUSIONS["dci"], "llava-next-hf", ViewSpec.anyres(grids=GRIDS))
    stock = written(ours, "llava-next-hf", tmp_path)
    texts, pictures, alone = [], [], []
    for size, question in zip(SIZES, ("What?", "Which number stands there?", "a", "b", "c d", "e"), strict=True):
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        texts.append(stock.processor.apply_chat_template(messages, add_generation_prompt=True))
        pictures.append([picture(size)])
        alone.append(stock.prompt_logits(png(size), question)[-1])
    batch = stock.processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    assert (stock.network(**batch).logits[:, -1] - torch.stack(alone)).abs().max() < TOLERANCE
