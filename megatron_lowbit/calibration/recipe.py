"""Recipes: which codec, how many bits and how many BF16 features each sync point gets.

A recipe comes from a plan (`calibration.plan`) or is the same codec everywhere. A user's rules come
on top of it:

    [{"match": "30.mlp.*", "bits": 6},
     {"match": "*.self_attention.linear_proj", "codec": "rotated-hybrid", "bits": [3, 4]},
     {"match": "1.*", "codec": "native"}]

``match`` is a glob pattern over ``LAYER.NAME``; the first rule that matches a sync point counts, as
in Megatron's own quantization recipes. ``codec`` may be ``native``: Megatron's own reduction.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from megatron_lowbit._moved import renamed
from megatron_lowbit.codecs import CODECS, Codec, get_codec
from megatron_lowbit.errors import LowbitError

NATIVE = "native"
Key = tuple[int, str]  # layer, sync point's name


@dataclass(frozen=True)
class Assignment:
    """What one sync point gets.

    Attributes:
        codec: A codec's name, or ``native``.
        bits: Of a body value, or a pair: of partials, and of sums; the codec's default if None.
        bf16_features: How many features travel in BF16; what the index or the codec says if None.
    """

    codec: str
    bits: int | tuple[int, int] | None = None
    bf16_features: int | None = None

    @property
    def is_native(self) -> bool:
        return self.codec == NATIVE

    def make(self) -> Codec:
        """The codec itself."""
        return get_codec(self.codec, bits=self.bits)

    @classmethod
    def from_json(cls, value: dict) -> "Assignment":
        """Of what `to_json` gave, a pair of bits as JSON's list."""
        bits = value.get("bits")
        return cls(**{**value, "bits": tuple(bits) if isinstance(bits, list) else bits})

    def to_json(self) -> dict:
        """For JSON, without what is left to defaults."""
        return {key: value for key, value in asdict(self).items() if value is not None}


Recipe = dict[Key, Assignment]


def read_rules(path: Path) -> list[dict]:
    """Read and check a recipe file.

    Raises:
        LowbitError: It cannot be read, is no JSON list of rules, has an unknown key, codec or
            number of bits; the message names the rule.
    """
    try:
        rules = json.loads(Path(path).read_text())
    except OSError as error:
        raise LowbitError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise LowbitError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(rules, list) or not rules:
        raise LowbitError(f'{path} is not a list of rules such as {{"match": "1.*", "bits": 6}}')
    for number, rule in enumerate(rules, start=1):
        _check_rule(rule, f"{path}, rule {number}")
    return rules


def override(recipe: Recipe, rules: Iterable[dict], *, origin: str) -> Recipe:
    """`recipe` with the first rule that matches each sync point applied to it.

    Args:
        recipe: An assignment for every sync point of the model.
        rules: From `read_rules`.
        origin: Where the rules are from, for messages.

    Raises:
        LowbitError: A rule is the first to match nowhere, or asks for bits that a codec lacks.
    """
    result, unused = dict(recipe), {rule["match"]: None for rule in rules}
    for key, assignment in recipe.items():
        name = f"{key[0]}.{key[1]}"
        rule = next((rule for rule in rules if fnmatchcase(name, rule["match"])), None)
        if rule is None:
            continue
        unused.pop(rule["match"], None)
        result[key] = _apply(rule, assignment, f"{origin}, {rule['match']!r} at {name}")
    if unused:
        layers = sorted({layer for layer, _ in recipe})
        names = ", ".join(sorted({name for _, name in recipe}))
        raise LowbitError(
            f"{origin}: {', '.join(map(repr, unused))} matches no sync point that an earlier rule "
            f"left: there are layers {layers[0]} to {layers[-1]} with {names}"
        )
    return result


_KEYS = {"match": str, "codec": str, "bits": (int, list), "bf16_features": int}


def _check_rule(rule: object, where: str) -> None:
    if not isinstance(rule, dict) or not isinstance(rule.get("match"), str):
        raise LowbitError(f'{where}: not an object with a "match" pattern such as "30.mlp.*"')
    for key, value in rule.items():
        if key not in _KEYS:
            raise LowbitError(f"{where}: unknown key {key!r}: known are {', '.join(_KEYS)}")
        if not isinstance(value, _KEYS[key]) or isinstance(value, bool):
            raise LowbitError(f"{where}: {key} cannot be {value!r}")
    if len(rule) == 1:
        raise LowbitError(f"{where}: nothing but a match: give codec, bits or bf16_features")
    codec = rule.get("codec", NATIVE)
    if codec != NATIVE and codec not in CODECS:
        known = ", ".join((NATIVE, *CODECS))
        raise LowbitError(f"{where}: unknown codec {codec!r}: choose one of {known}")
    if rule.get("codec") == NATIVE and len(rule) > 2:
        raise LowbitError(f"{where}: bits and BF16 features mean nothing to {NATIVE}")
    if isinstance(rule.get("bits"), list) and [type(b) for b in rule["bits"]] != [int, int]:
        raise LowbitError(f"{where}: bits cannot be {rule['bits']!r}: a number, or two of them")
    if rule.get("bf16_features", 0) < 0:
        raise LowbitError(f"{where}: bf16_features cannot be {rule['bf16_features']}")


def _apply(rule: dict, assignment: Assignment, where: str) -> Assignment:
    changes = {key: rule[key] for key in ("bits", "bf16_features") if key in rule}
    if isinstance(changes.get("bits"), list):
        changes["bits"] = tuple(changes["bits"])
    if (
        rule.get("codec", assignment.codec) != assignment.codec
    ):  # another codec: nothing of the old one
        assignment = Assignment(rule["codec"])
    assignment = replace(assignment, **changes)
    if assignment.is_native:
        if changes:
            raise LowbitError(f"{where}: bits and BF16 features mean nothing to {NATIVE}")
        return assignment
    try:
        codec = assignment.make()
    except LowbitError as error:
        raise LowbitError(f"{where}: {error}") from None
    if assignment.bf16_features and not codec.takes_index:
        raise LowbitError(f"{where}: bf16_features mean nothing to {codec.name}")
    return assignment


__getattr__ = renamed(__name__)
