"""What tools/robustness.py calibrates on, compares, and measures on."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_lowbit.benchmark.quality.texts import write_texts
from megatron_lowbit.calibration.corpus import Corpus, read_corpus
from megatron_lowbit.evaluation.measures.text import Text

SEQ_LENGTH = 128
BUDGET = 4.2  # bits a value, of the recipes
_HELD_OUT_SEED = 1
CODECS = ["static-hybrid", "rotated-hybrid", "shaped-hybrid", "recipe"]


@dataclass(frozen=True)
class Calibration:
    """What a calibration is made on.

    Attributes:
        kind: Of text: ``prose``, ``bible``, ``code`` or ``dialogue``.
        sequences: Of `SEQ_LENGTH` tokens.
        seed: Of the choice of sequences.
    """

    kind: str
    sequences: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.sequences}-{self.seed}"

    def variant(self, codec: str) -> str:
        """What `codec` with this calibration is called in the evaluation."""
        return f"{self.name} {codec}"


# The first one is what the others are compared with.
CALIBRATIONS = [
    *(Calibration("prose", 128, seed) for seed in (1, 2, 3)),
    *(Calibration(kind, 128, 1) for kind in ("bible", "code", "dialogue")),
    *(Calibration("prose", sequences, 1) for sequences in (8, 32, 512)),
]


@dataclass(frozen=True)
class Texts:
    """What was read: by kind what to calibrate on, and what to measure on."""

    corpora: dict[str, Corpus]
    held_out: list[Text]

    @property
    def digests(self) -> list[str]:
        """Of all that was read: ranks must have read the same."""
        held_out = [text.identity["sha256"] for text in self.held_out]
        return [corpus.sha256 for corpus in self.corpora.values()] + held_out

    def sample(self, calibration: Calibration) -> Tensor:
        """int64 ``[sequences, SEQ_LENGTH]``; `CorpusError` if the text is too short."""
        corpus = self.corpora[calibration.kind]
        return corpus.sample(calibration.sequences, SEQ_LENGTH, seed=calibration.seed)


def read_texts(tokenize: Callable[[str], list[int]], examples: Path, *, tokens: int) -> Texts:
    """Read and tokenize all texts: prose and the Bible, and those of `benchmark.quality.texts`.

    Args:
        tokenize: Text to tokens.
        examples: The directory of emma.txt, persuasion.txt and kjv.txt.
        tokens: To measure on, of each text, rounded up to whole sequences.

    Raises:
        LowbitError: A text or a package is missing, or a text is too short.
    """
    paths = {"prose": examples / "emma.txt", "bible": examples / "kjv.txt"}
    held_out = {"prose": examples / "persuasion.txt"}
    with tempfile.TemporaryDirectory() as directory:
        written = write_texts(Path(directory))
        for kind in ("code", "dialogue"):
            paths[kind], held_out[kind] = written[kind], written[f"{kind}_held_out"]
        corpora = {kind: read_corpus([path], tokenize) for kind, path in paths.items()}
        unseen = {kind: read_corpus([path], tokenize) for kind, path in held_out.items()}
    return Texts(corpora, [_held_out(kind, corpus, tokens) for kind, corpus in unseen.items()])


def _held_out(kind: str, corpus: Corpus, tokens: int) -> Text:
    # One token more: each but the first is predicted.
    chosen = corpus.sample(-(-tokens // SEQ_LENGTH), SEQ_LENGTH + 1, seed=_HELD_OUT_SEED)
    return Text(kind, chosen, sha256=corpus.sha256)
