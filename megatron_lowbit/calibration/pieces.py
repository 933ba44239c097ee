"""Tokenizing a long text piece by piece: the same tokens as of the whole text, in little memory.

A tokenizer of the tokenizers package takes 135 MB for a MB of text. A text is therefore cut at
seams, such as a single line end between two words, where no token of the whole text crosses. That
is not believed but tried: the tokens of the 256 characters before a seam must be the first tokens
of these and the 256 after it. Each piece is tokenized with the characters before it, whose tokens
are left out again; so what a tokenizer puts before and behind every text (begin-of-text, a space)
comes once. A text with no such place is tokenized whole.
"""

import re
from array import array
from collections.abc import Callable, Iterable, Iterator

Tokenize = Callable[[str], list[int]]

PIECE = 1 << 16  # characters
_CONTEXT = 256  # characters on each side that a seam is tried with
_TRIES = 8  # of each kind of place
_MOST_BEHIND = 4  # tokens that a tokenizer puts behind a text
# A line end, a space, the first of several line ends, the start of a word.
_PLACES = [
    re.compile(pattern)
    for pattern in (r"(?<=\S)\n(?=\S)()", r"(?<=\w)()(?= \w)", r"(?<=\S)()(?=\n)", r"(?<=\W)()\b")
]


def tokenize_pieces(chunks: Iterable[str], tokenize: Tokenize, *, piece: int = PIECE) -> array:
    """The tokens of a text that comes in chunks: int64.

    Args:
        chunks: The text.
        tokenize: Text to tokens.
        piece: Characters that are tokenized at once, about.
    """
    assert piece >= _CONTEXT
    tokens = array("q")
    text, before, known, start = "", "", 0, piece
    for chunk in chunks:
        text += chunk
        while len(text) >= start + 2 * _CONTEXT:
            seam = _seam(text, start, tokenize)
            if seam is None:
                start = len(text) - _CONTEXT
                continue
            end, of_context, behind = seam
            found = tokenize(before + text[:end])
            tokens.extend(found[known : len(found) - behind])
            before, known = text[end - _CONTEXT : end], of_context
            text, start = text[end:], piece
    if text or not before:
        tokens.extend(tokenize(before + text)[known:])
    return tokens


def _seam(text: str, start: int, tokenize: Tokenize) -> tuple[int, int, int] | None:
    """The first place after `start` where a text can be cut.

    Returns:
        Where, the tokens of the context before it, and how many the tokenizer puts behind them.
    """
    for end in _places(text, start):
        before, after = text[end - _CONTEXT : end], text[end : end + _CONTEXT]
        try:
            alone, both = tokenize(before), tokenize(before + after)
        except ValueError:  # not a text to it, as half a number
            continue
        for behind in range(_MOST_BEHIND + 1):
            count = len(alone) - behind
            if count > 0 and alone[:count] == both[:count]:
                return end, count, behind
    return None


def _places(text: str, start: int) -> Iterator[int]:
    stop = len(text) - _CONTEXT
    for pattern in _PLACES:
        for number, match in enumerate(pattern.finditer(text, start, stop)):
            if number == _TRIES:
                break
            yield match.start(1)
