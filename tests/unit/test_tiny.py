"""The tiny models are of the real classes and load from their folders."""

from pathlib import Path


def test_tiny_encoder_loads_and_gives_hidden_states(tiny_encoder_folder: Path) -> None:
    import torch
    from transformers import CLIPVisionModel

    from tests.tiny import TINY_BLOCKS, TINY_PATCH_PX, TINY_VIEW_PX, TINY_WIDTH

    model = CLIPVisionModel.from_pretrained(tiny_encoder_folder)
    with torch.no_grad():
        states = model(torch.zeros(1, 3, TINY_VIEW_PX, TINY_VIEW_PX), output_hidden_states=True).hidden_states
    assert len(states) == TINY_BLOCKS + 1
    assert states[0].shape == (1, 1 + (TINY_VIEW_PX // TINY_PATCH_PX) ** 2, TINY_WIDTH)


def test_tiny_language_model_round_trips_any_text(tiny_language_model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_language_model_folder)
    text = "What is 3 x 7?\nTwenty-one."
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert AutoModelForCausalLM.from_pretrained(tiny_language_model_folder).config.vocab_size == len(tokenizer)


def test_chat_template_marks_roles(tiny_tokenizer) -> None:
    text = tiny_tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>Hi<|end|><|assistant|>"
