"""Texts in pieces: the tokens are those of the whole text, and memory stays small."""

import tracemalloc
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from integration import tiny_tokenizers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from megatron_lowbit.calibration import pieces
from megatron_lowbit.calibration.pieces import tokenize_pieces

KINDS = ("gemma", "qwen", "metaspace", "wordpiece", "letters")


def _metaspace() -> Tokenizer:
    """A space before every text and a begin-of-text, as Llama 2 has them."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    _train(bpe, trainers.BpeTrainer, ["<unk>", "<s>"])
    bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return bpe


def _wordpiece() -> Tokenizer:
    """Something before and something behind every text, and lower case, as BERT has it."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    _train(made, trainers.WordPieceTrainer, ["[UNK]", "[CLS]", "[SEP]"])
    both = [("[CLS]", 1), ("[SEP]", 2)]
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=both)
    return made


def _train(tokenizer: Tokenizer, trainer: type, special: list[str]) -> None:
    lines = Path(pieces.__file__).read_text().splitlines()
    settings = trainer(vocab_size=600, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(lines, settings)


@cache
def _tokenize(kind: str):
    if kind == "letters":
        return lambda text: [ord(letter) for letter in text]
    made = {
        "gemma": lambda: tiny_tokenizers.gemma()[0],
        "qwen": lambda: tiny_tokenizers.qwen()[0],
        "metaspace": _metaspace,
        "wordpiece": _wordpiece,
    }[kind]()
    return lambda text: made.encode(text).ids


words = st.sampled_from(["the", "a", "text", "of", "42", "1234567", "it's", "naïve", "日本", "🙂"])
gaps = st.sampled_from([" ", "  ", "\n", "\n\n", " \n", ".\n", ".\n\n", ", ", "\t", "\r\n", ""])
texts = st.lists(st.tuples(words, gaps), min_size=300, max_size=700).map(
    lambda pairs: "".join(word + gap for word, gap in pairs)
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(texts, st.integers(1, 900))
def test_pieces_have_the_tokens_of_the_whole(kind, text, chunk):
    tokenize = _tokenize(kind)
    chunks = [text[start : start + chunk] for start in range(0, len(text), chunk)]
    assert tokenize_pieces(chunks, tokenize, piece=400).tolist() == list(tokenize(text))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["the " * 3000, "a text\n\nof it\n\n" * 400, "日本" * 3000, "x"])
def test_texts_with_few_seams(kind, text):
    tokenize = _tokenize(kind)
    assert tokenize_pieces([text], tokenize, piece=1000).tolist() == list(tokenize(text))


def test_a_long_text_is_never_tokenized_at_once():
    longest = 0

    def tokenize(text: str) -> list[int]:
        nonlocal longest
        longest = max(longest, len(text))
        return list(range(len(text.split())))

    chunks = ("a sentence of a long text.\n" * 100 for _ in range(2000))
    tracemalloc.start()
    tokens = tokenize_pieces(chunks, tokenize)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(tokens) == 1_200_000
    assert longest < 2 * pieces.PIECE
    assert peak < 3 * 8 * len(tokens), f"{peak:,} bytes for {8 * len(tokens):,} bytes of tokens"
