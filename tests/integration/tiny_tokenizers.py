"""Tokenizers of the kinds that model families come with, trained on this file, as Hub files."""

import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import ByteLevel, TemplateProcessing

SIZE = 900


def gemma() -> tuple[Tokenizer, dict]:
    """SentencePiece's pieces with bytes behind them, and a begin-of-text; spaces stay spaces."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    bpe.decoder = decoders.Sequence(parts)
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    _train(bpe, special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)])
    bpe.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return bpe, {"tokenizer_class": "GemmaTokenizer", **names}


def qwen() -> tuple[Tokenizer, dict]:
    """Bytes as letters, digits one by one, and no begin-of-text."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    words = Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), letters])
    bpe.decoder, bpe.post_processor = decoders.ByteLevel(), ByteLevel(trim_offsets=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    _train(bpe, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return bpe, {"tokenizer_class": "Qwen2Tokenizer", **names}


def _train(tokenizer: Tokenizer, **settings) -> None:
    trainer = trainers.BpeTrainer(vocab_size=SIZE, show_progress=False, **settings)
    tokenizer.train_from_iterator(Path(__file__).read_text().splitlines(), trainer)


def save(make: Callable[[], tuple[Tokenizer, dict]], directory: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    tokenizer, settings = make()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
