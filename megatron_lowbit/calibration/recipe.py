"""Recipes: which codec, how many bits and how many BF16 features each sync point gets.

A recipe comes from a plan (`calibration.plan`) or is the same codec everywhere. A user's rules come
on top of it:

    [{"match": "30.mlp.*", "bits": 6},
     {"match": "*.self_attention.linear_proj", "codec": "rotated-hybrid", "bits": [3, 4]},
     {"match": "1.*", "codec": "native"}]

``match`` is a glob pattern over ``LAYER.NAME``; the first rule that matches a sync point counts, as
in Megatron's own quantization recipes. ``codec`` may be ``native``: Megatron's own reduction.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

from megatron_lowbit._moved import renamed
from megatron_lowbit.codecs import CALIBRATED_CODEC, Codec, codec_names, get_codec
from megatron_lowbit.codecs.bf16 import Bf16
from megatron_lowbit.errors import LowbitError
from megatron_lowbit.json_files import read_json, shown
from megatron_lowbit.model.summing import Placed, chains

NATIVE = "native"
# Of a chain's last sync point, where no plan says more: 0.03 bits on average over 60 of them.
END_BITS = 6
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

    def check(self, hidden: int | None = None) -> None:
        """Raise unless there is such a codec, with these bits and so many BF16 features.

        Args:
            hidden: Features of a token, where it is known.

        Raises:
            LowbitError: The message names the value.
        """
        codec = self.make()
        if self.bf16_features and not codec.takes_index:
            raise LowbitError(f"bf16_features mean nothing to {codec.name}")
        if self.bf16_features is not None and hidden is not None and self.bf16_features > hidden:
            raise LowbitError(f"bf16_features {self.bf16_features}: a token has {hidden} features")

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
    from megatron_lowbit.calibration.validation.index_schema import Rule
    from megatron_lowbit.schema import validated

    rules = read_json(Path(path))
    if not isinstance(rules, list) or not rules:
        raise LowbitError(f'{path} is not a list of rules such as {{"match": "1.*", "bits": 6}}')
    for number, rule in enumerate(rules, start=1):
        where = f"{path}, rule {number}"
        if not isinstance(rule, dict) or "match" not in rule:
            raise LowbitError(f'{where}: not an object with a "match" pattern such as "30.mlp.*"')
        validated(Rule, rule, where)
        _check_rule(rule, where)
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


def _check_rule(rule: dict, where: str) -> None:
    """Raise for what the types alone do not tell."""
    if len(rule) == 1:
        raise LowbitError(f"{where}: nothing but a match: give codec, bits or bf16_features")
    codec = rule.get("codec", NATIVE)
    if codec not in (NATIVE, *codec_names()):
        known = ", ".join((NATIVE, *codec_names()))
        raise LowbitError(f"{where}: unknown codec {shown(codec)}: choose one of {known}")
    if rule.get("codec") == NATIVE and len(rule) > 2:
        raise LowbitError(f"{where}: bits and BF16 features mean nothing to {NATIVE}")
    if codec != NATIVE:
        try:
            Assignment.from_json({key: rule[key] for key in rule if key != "match"}).check()
        except LowbitError as error:
            raise LowbitError(f"{where}: {error}") from None


def _apply(rule: dict, assignment: Assignment, where: str) -> Assignment:
    changes = {key: rule[key] for key in ("bits", "bf16_features") if key in rule}
    if isinstance(changes.get("bits"), list):
        changes["bits"] = tuple(changes["bits"])
    # Of another codec: nothing of the old one.
    if rule.get("codec", assignment.codec) != assignment.codec:
        assignment = Assignment(rule["codec"])
    assignment = replace(assignment, **changes)
    if assignment.is_native:
        if changes:
            raise LowbitError(f"{where}: bits and BF16 features mean nothing to {NATIVE}")
        return assignment
    try:
        assignment.check()
    except LowbitError as error:
        raise LowbitError(f"{where}: {error}") from None
    return assignment


def with_strong_ends(recipe: Recipe, points: Sequence[Placed]) -> Recipe:
    """`recipe` with more bits at the ends of chains, whose errors nobody repairs.

    Where all sync points are alike it gets `END_BITS`. A plan knows its own end, but not that a
    pipeline stage's last sync point is one, too: that gets what the last layer has at most, of
    partials and of sums.
    """
    known = {CALIBRATED_CODEC, Bf16.name}
    if not recipe or any(assignment.codec not in known for assignment in recipe.values()):
        return recipe
    depth = max(layer for layer, _ in recipe)
    strong = max((a for (layer, _), a in recipe.items() if layer == depth), key=_both_bits)
    is_planned = len(set(recipe.values())) > 1
    if not is_planned and strong.codec == CALIBRATED_CODEC:
        strong = replace(strong, bits=END_BITS)
    changed = dict(recipe)
    for end in (points[chain[-1]] for chain in chains(points)):
        key = (end.layer, end.name)
        if key in changed and not (is_planned and end.layer == depth):
            changed[key] = _raised(changed[key], strong)
    return changed


def _raised(assignment: Assignment, strong: Assignment) -> Assignment:
    """`assignment` with at least the bits of `strong`, of partials and of sums."""
    own, least = _both_bits(assignment), _both_bits(strong)
    bits = max(own[0], least[0]), max(own[1], least[1])
    if bits == own:
        return assignment
    if strong.codec != assignment.codec:
        return strong
    return replace(assignment, bits=bits[0] if bits[0] == bits[1] else bits)


def _both_bits(assignment: Assignment) -> tuple[int, int]:
    """Of partials and of sums."""
    codec = assignment.make()
    return codec.bits, codec.sum_bits


__getattr__ = renamed(__name__)
