"""Retrieval in a long text: are facts that were planted in it found at its end?

Several sentences of the form "The secret password of Alice is tiger copper." are planted at
several depths of a long text. At its end they are asked for, in random order, one after the other:
each answer is scored given the true answers to those before it. So one forward pass scores all of
them, and an answer whose every token is the model's first choice is the one that greedy decoding
would give after that prompt. The plain form, continued rather than answered, is one that small base
models can do by copying; the other sentences are what an inexact model confuses it with.
SmolLM2-135M-Instruct in bfloat16 found 25 of 30 in texts of 1,024 tokens and 10 of 15 in texts of
4,096. One needle alone, in similar words, it found 15 times of 15, at five times the cost.
"""

import random
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_lowbit.errors import LowbitError
from megatron_lowbit.evaluation.measures.long_context import log_probs, require_positions
from megatron_lowbit.evaluation.measures.measure import NATIVE, Record, Scores
from megatron_lowbit.evaluation.measures.tasks import encode_pair
from megatron_lowbit.evaluation.measures.uncertainty import mean, stderr
from megatron_lowbit.model import logits as lm
from megatron_lowbit.model.language_model import LanguageModel

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the text, as shares of its length
SEED = 1234
_QUESTION = "The secret password of {} is"
_NAMES = ("Alice", "Bruno", "Clara", "Daniel", "Emily")  # one for each depth
# Short and frequent, so that a tokenizer seldom splits them.
_WORDS = (
    "apple river tiger copper silver window garden purple orange winter summer doctor forest "
    "bridge candle dragon engine falcon guitar hammer island jacket kitten ladder mirror needle "
    "oyster pencil rabbit saddle"
).split()
_WORDS_IN_CODE = 2


class Needles:
    """A `Measure` of retrieval; its scores are by depth, for the needles of one long text.

    Args:
        texts: int64 ``[n, seq_length]``: what to plant into. The end of each is dropped to make
            room, so that a sequence has `seq_length` tokens.
        tokenize: Text to tokens, nothing added.
        source: What the texts are from, for the name.
        sha256: Of that.

    Raises:
        LowbitError: The texts are too short to plant needles in.
    """

    unit = "text"

    def __init__(
        self, texts: Tensor, *, tokenize: Callable[[str], list[int]], source: str, sha256: str
    ) -> None:
        count, length = texts.shape
        self.name = f"needles in {source}"
        self._source = source
        self.identity = {
            "sha256": sha256,
            "texts": count,
            "seq_length": length,
            "depths": list(DEPTHS),
            "seed": SEED,
        }
        self._planted = [
            Planted(text, seed=f"{SEED} {number}", tokenize=tokenize)
            for number, text in enumerate(texts.tolist())
        ]

    def __len__(self) -> int:
        return len(self._planted)

    def run(self, number: int, model: LanguageModel, native: None) -> tuple[Scores, None]:
        """Score text `number`: for each depth whether the code is found, and its log-likelihood.

        Raises:
            LowbitError: The text is longer than the model's positions.
        """
        planted = self._planted[number]
        require_positions(len(planted.tokens), model)
        sequence = torch.tensor(planted.tokens)
        logits = model.logits(sequence[None])[0]
        found, likelihoods = [], []
        for answer in planted.answers:
            scores = log_probs(logits[answer.start - 1 : answer.stop - 1], model)
            expected = sequence[answer].to(scores.device)
            nll = lm.negative_log_likelihood(scores, expected, group=model.tp_group)
            found.append(int(torch.equal(lm.top1(scores, group=model.tp_group), expected)))
            likelihoods.append(-nll.double().sum().item())
        return {"found": found, "log_likelihoods": likelihoods}, None

    def summarize(self, records: list[Record]) -> dict:
        """Share of needles found, over all depths and by depth, with standard errors over texts.

        Needles that the native model does not find count too. For a variant ``lost`` and ``gained``
        are how many it does not find though native does, and the other way round, and
        ``delta_log_likelihood`` is the code's log-likelihood less native's, in nats a needle.
        """
        return {
            "name": self._source,
            "needles": len(records) * len(DEPTHS),
            "depths": list(DEPTHS),
            "native": _rates(records, NATIVE),
            "results": [_result(records, variant) for variant in records[0] if variant != NATIVE],
        }


class Planted:
    """A text with needles and, at its end, the questions.

    Attributes:
        tokens: The whole sequence, questions and answers included.
        answers: For each depth, where the answer's tokens are.
    """

    def __init__(self, text: list[int], *, seed: str, tokenize: Callable[[str], list[int]]) -> None:
        rng = random.Random(seed)
        codes = [" ".join(rng.sample(_WORDS, _WORDS_IN_CODE)) for _ in DEPTHS]
        order = rng.sample(range(len(DEPTHS)), len(DEPTHS))
        questions = [_QUESTION.format(name) for name in rng.sample(_NAMES, len(DEPTHS))]
        pairs = [
            encode_pair(f"\n\n{question}", f" {code}", tokenize)
            for question, code in zip(questions, codes, strict=True)
        ]
        stop = tokenize(".")
        needles = [[*asked, *code, *stop, *tokenize("\n\n")] for asked, code in pairs]
        ends = sum(len(asked) + len(code) + len(stop) for asked, code in pairs)
        room = len(text) - ends - sum(map(len, needles))
        if room < len(text) // 2:
            raise LowbitError(
                f"{len(text)} tokens are too short a text: needles and questions take "
                f"{len(text) - room}; use at least twice as many"
            )
        self.tokens = _plant(text[:room], needles)
        self.answers = [slice(0)] * len(DEPTHS)
        for depth in order:
            asked, code = pairs[depth]
            start = len(self.tokens) + len(asked)
            self.tokens += [*asked, *code, *stop]
            self.answers[depth] = slice(start, start + len(code))


def _plant(text: list[int], needles: list[list[int]]) -> list[int]:
    tokens, done = [], 0
    for depth, needle in zip(DEPTHS, needles, strict=True):
        place = int(depth * len(text))
        tokens += text[done:place] + needle
        done = place
    return tokens + text[done:]


def _rates(records: list[Record], variant: str) -> dict:
    found = [record[variant]["found"] for record in records]
    per_text = [mean(one) for one in found]
    return {
        "retrieved": mean(per_text),
        "retrieved_stderr": stderr(per_text),
        "retrieved_by_depth": [mean(one) for one in zip(*found, strict=True)],
    }


def _result(records: list[Record], variant: str) -> dict:
    pairs = [
        (now, before)
        for record in records
        for now, before in zip(record[variant]["found"], record[NATIVE]["found"], strict=True)
    ]
    deltas = [
        mean(record[variant]["log_likelihoods"]) - mean(record[NATIVE]["log_likelihoods"])
        for record in records
    ]
    return {
        "variant": variant,
        **_rates(records, variant),
        "lost": sum(now < before for now, before in pairs),
        "gained": sum(now > before for now, before in pairs),
        "delta_log_likelihood": mean(deltas),
        "delta_log_likelihood_stderr": stderr(deltas),
    }
