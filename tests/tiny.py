"""Tiny models of the real classes: seconds on one core, real hidden states, real gradients. Random weights, fixed seeds."""

from pathlib import Path
from typing import Any

TINY_VIEW_PX = 56
TINY_PATCH_PX = 14
TINY_WIDTH = 32
TINY_BLOCKS = 6
TINY_HIDDEN = 64

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def write_tiny_encoder(folder: Path, *, num_blocks: int = TINY_BLOCKS, seed: int = 0) -> Path:
    """Write a CLIPVisionModel folder: config.json and model.safetensors."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=TINY_WIDTH,
        intermediate_size=2 * TINY_WIDTH,
        num_hidden_layers=num_blocks,
        num_attention_heads=2,
        image_size=TINY_VIEW_PX,
        patch_size=TINY_PATCH_PX,
        projection_dim=TINY_WIDTH,
    )
    CLIPVisionModel(config).save_pretrained(folder)
    return folder


def tiny_tokenizer() -> Any:
    """A byte-level tokenizer: 256 bytes and the special tokens, nothing unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|pad|>", "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|begin|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def write_tiny_language_model(folder: Path, *, seed: int = 0) -> Path:
    """Write a LlamaForCausalLM folder with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=TINY_HIDDEN,
        intermediate_size=2 * TINY_HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_recipe(encoder: Path, language_model: Path, *, seeds: str = "[0, 1]", steps: int = 3) -> str:
    """A recipe over the tiny models, as TOML: two families of eight pictures, two phases."""
    return f"""
name = "tiny"
description = "Small enough for a test."
seeds = {seeds}

[dataset]
sources = [{{ kind = "rendered", family = "charts", num_images = 8 }}, {{ kind = "rendered", family = "pages", num_images = 8 }}]
held_out_fraction = 0.4
turns_per_image = 3
legibility = {{ local_min_px = 3.0, global_max_px = 3.0 }}

[encoder]
model = "{encoder}"

[connector.global]
fusion = {{ kind = "dci", groups = 2 }}
adapters = {{ kind = "gated_mixture" }}

[connector.local]
fusion = {{ kind = "dci", groups = 2 }}
compression = {{ queries = 4 }}

[language_model]
model = "{language_model}"

[[schedule.align]]
train = ["global_mlp"]
branch = "global"
steps = {steps}
batch_size = 4
learning_rate = 1e-3

[schedule.sft]
train = ["connector", "language_model"]
branch = "both"
steps = {steps}
batch_size = 4
learning_rate = 1e-3
"""
