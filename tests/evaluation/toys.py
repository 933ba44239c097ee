"""Small language models whose every answer can be worked out: what the measures' tests run."""

import re
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.model.language_model import LanguageModel

VOCAB, PADDED = 90, 96


class Words:
    """A tokenizer of words, each with the one space before it; ids in order of appearance."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def tokenize(self, text: str) -> list[int]:
        pieces = re.findall(r" ?\w+|\s|[^\w\s]", text)
        for piece in pieces:
            if piece not in self.words:
                self.words.append(piece)
        assert len(self.words) <= VOCAB
        return [self.words.index(piece) for piece in pieces]

    def detokenize(self, tokens: list[int]) -> str:
        return "".join(self.words[token] for token in tokens)


def toy(
    logits: Callable[[Tensor], Tensor], *, words: Words | None = None, max_length: int = 2048
) -> LanguageModel:
    """A model of `logits`: int64 ``[batch, seq]`` -> fp32 ``[batch, seq, VOCAB]``.

    The vocabulary is padded with the largest logits of all, which must not count. Where
    torch.distributed is initialized, each rank gives its part of it.
    """

    def padded(tokens: Tensor) -> Tensor:
        whole = torch.nn.functional.pad(logits(tokens), (0, PADDED - VOCAB), value=1e4)
        if not dist.is_initialized():
            return whole
        return whole.chunk(dist.get_world_size(), dim=-1)[dist.get_rank()]

    group = dist.group.WORLD if dist.is_initialized() else None
    words = words or Words()
    return LanguageModel(padded, VOCAB, max_length, group, words.tokenize, words.detokenize)


def bigram(table: Tensor) -> Callable[[Tensor], Tensor]:
    """Logits that depend on the last token only: row `token` of `table`."""
    return lambda tokens: table[tokens]


def contextual(seed: int, *, noise: float = 0.0) -> Callable[[Tensor], Tensor]:
    """Logits that depend on every token so far, and on the last one more."""
    random = torch.Generator().manual_seed(seed)
    embedding = torch.randn(VOCAB, 16, generator=random)
    output = torch.randn(16, VOCAB, generator=random)
    output += noise * torch.randn(16, VOCAB, generator=random)

    def logits(tokens: Tensor) -> Tensor:
        seen = embedding[tokens].cumsum(dim=1) / (1 + torch.arange(tokens.shape[1]))[:, None]
        return (seen + embedding[tokens]) @ output

    return logits


def copying(reach: int) -> Callable[[Tensor], Tensor]:
    """Logits that repeat what followed the last three tokens' latest occurrence within `reach`."""

    def logits(tokens: Tensor) -> Tensor:
        result = torch.zeros(*tokens.shape, VOCAB)
        for row, sequence in enumerate(tokens.tolist()):
            latest = {}
            for place in range(2, len(sequence)):
                last = tuple(sequence[place - 2 : place + 1])
                if last in latest and place - latest[last] <= reach:
                    result[row, place, sequence[latest[last] + 1]] = 10
                latest[last] = place
        return result

    return logits
