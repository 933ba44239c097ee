"""A language model, as calibration and evaluation see it: logits of tokens, and its tokenizer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from megatron_lowbit.model.stages import WHOLE, Stages


@dataclass(frozen=True)
class LanguageModel:
    """What a loop over texts sees of a model.

    Attributes:
        logits: int64 ``[batch, seq]`` -> ``[batch, seq, vocabulary / ranks]``, this rank's part of
            the vocabulary. Attention is causal: what is padded on the right disturbs nothing.
        vocab_size: Without padding.
        max_length: Positions that the model has.
        tp_group: The ranks that share a sequence; every rank of it calls `logits` alike. None where
            torch.distributed is not in use: then `logits` gives the whole vocabulary.
        tokenize: Text to tokens, nothing added.
        detokenize: Tokens to text.
        prefix: Tokens that the tokenizer by default puts before every text, such as a
            begin-of-text; `tokenize` leaves them out.
        stages: The pipeline stages, which all call `logits` alike and get the same.
    """

    logits: Callable[[Tensor], Tensor]
    vocab_size: int
    max_length: int
    tp_group: dist.ProcessGroup | None
    tokenize: Callable[[str], list[int]]
    detokenize: Callable[[list[int]], str]
    prefix: Sequence[int] = ()
    stages: Stages = WHOLE
