"""JSON values with one thing in them changed, as tests of readers damage what they read."""

from collections.abc import Callable
from typing import Any

REMOVED = object()


def _same(value: object) -> object:
    return value


def put(content: Any, place: str, value: object) -> None:
    """Change what is at a place such as ``texts/0/results/1/kl``; `REMOVED` takes it away."""
    *path, last = place.split("/")
    for step in path:
        content = content[_key(content, step)]
    if value is REMOVED:
        del content[_key(content, last)]
    else:
        content[_key(content, last)] = value


def changed(content: Any, *, value: Callable = _same, key: Callable = _same) -> Any:
    """The same with `value` of each value, and `key` of each key of an object."""
    if isinstance(content, list):
        return [changed(one, value=value, key=key) for one in content]
    if isinstance(content, dict):
        return {key(k): changed(one, value=value, key=key) for k, one in content.items()}
    return value(content)


def _key(content: Any, step: str) -> str | int:
    return int(step) if isinstance(content, list) else step
