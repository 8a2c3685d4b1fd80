"""Small fast tokenizers of the kinds that language models bring: SentencePiece with and without pieces of words, byte-level BPE as Llama 3 has it."""

import json
import re
from typing import Any

BYTES = [f"<0x{number:02X}>" for number in range(256)]

WORDS = re.findall(
    r"\w+",
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, polite answers to the questions. "
    "USER ASSISTANT What is it cat How many Two Where On mat red bar shows not far from",
)
"""What the SentencePiece models know as words."""

LLAMA3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Llama 3 cuts text before it merges: line breaks stick together, and to punctuation before them."""


def _fast(tokenizer: Any, **special: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def _sentencepiece(model: Any, *, split: bool) -> Any:
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always", split=split)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return _fast(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def sentencepiece_unigram() -> Any:
    """SentencePiece's unigram model over a few whole words, letters and bytes; every encoded text begins with a blank, as Vicuna's do."""
    from tokenizers import models

    letters = sorted({letter for word in WORDS for letter in word} | set(".,:?'"))
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((byte, -50.0) for byte in BYTES)]
    pieces += [("\u2581" + word, -1.0) for word in dict.fromkeys(WORDS)] + [("USER", -2.0), ("\u2581", -5.0), ("\u2581\u2581", -6.0)]
    pieces += [(letter, -20.0) for letter in letters if letter not in {piece for piece, _ in pieces}]
    return _sentencepiece(models.Unigram(pieces, unk_id=0, byte_fallback=True), split=True)


def sentencepiece_bpe() -> Any:
    """SentencePiece's BPE without a cut at blanks, as Llama 2 and Vicuna have it: merges learned from a sentence, else bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always")
    learner.train_from_iterator(
        [" ".join(WORDS)] * 4, trainers.BpeTrainer(vocab_size=160, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    )
    learned = json.loads(learner.to_str())["model"]
    vocabulary = {**learned["vocab"]}
    vocabulary |= {piece: len(vocabulary) + number for number, piece in enumerate([*BYTES, "\u2581\u2581"])}
    merges = [tuple(merge) for merge in learned["merges"]] + [("\u2581", "\u2581")]
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    return _sentencepiece(model, split=False)


def byte_level(special: tuple[str, ...], *, begin: str | None, end: str) -> Any:
    """Byte-level BPE with Llama 3's cuts. Line breaks merge up to three, blanks up to two, and a few words are tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("\u010a", "\u010a"), ("\u010a\u010a", "\u010a"), ("\u0120", "\u0120"), (".", "\u010a"), ("?", "\u010a")]
    for word in ("What", "cat", "Two", "user", "assistant"):
        merges += [(word[:length], word[length]) for length in range(1, len(word))]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*special, *alphabet, *("".join(merge) for merge in merges)]))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return _fast(tokenizer, eos_token=end, **({} if begin is None else {"bos_token": begin}))


CHATML_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def llama3_like() -> Any:
    """Llama 3's special tokens over byte-level BPE; as released, its end token is not the one that ends a turn."""
    return byte_level(LLAMA3_SPECIAL, begin="<|begin_of_text|>", end="<|end_of_text|>")


def chatml_like() -> Any:
    """ChatML's marks over byte-level BPE, without a begin token."""
    return byte_level(CHATML_SPECIAL, begin=None, end="<|endoftext|>")


def spelled(tokenizer: Any, ids: Any) -> str:
    """The text that tokens stand for, exactly: a decoder would take blanks away."""
    text = b""
    for token in tokenizer.convert_ids_to_tokens(list(ids)):
        if token in tokenizer.all_special_tokens or token in {added.content for added in tokenizer.added_tokens_decoder.values()}:
            text += token.encode()
        elif token in BYTES:
            text += bytes([int(token[3:5], 16)])
        elif "\u2581" in token or tokenizer.convert_tokens_to_ids("<0x0A>") not in (None, tokenizer.unk_token_id):
            text += token.replace("\u2581", " ").encode()
        else:
            text += bytes(_BYTE_OF[letter] for letter in token)
    return text.decode()


def _bytes_of_letters() -> dict[str, int]:
    """The byte that each letter of a byte-level alphabet stands for."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + number): byte for number, byte in enumerate(shifted)}


_BYTE_OF = _bytes_of_letters()
