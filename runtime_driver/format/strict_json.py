"""JSON as we write it: UTF-8, each key once, no NaN, no lone surrogates, not nested without end."""

from __future__ import annotations

import json
import re
from typing import Any

#: Deeper than anything that we write, and far below where Python's and pydantic's recursion ends.
MAX_DEPTH = 100
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class StrictJsonError(ValueError):
    """Text that is not JSON, or that two readers could understand in two ways."""


def loads(text: str | bytes) -> Any:
    """Parse one JSON document.

    Raises:
        StrictJsonError: not UTF-8, not JSON, a key given twice, NaN or Infinity, a lone surrogate, or more than
            ``MAX_DEPTH`` levels.
    """
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8-sig")
        value = json.loads(decoded, object_pairs_hook=_once_each, parse_constant=_no_constant)
    except StrictJsonError:
        raise
    except UnicodeDecodeError as error:
        raise StrictJsonError(f"not UTF-8 text: {error.reason} at byte {error.start}") from error
    except RecursionError as error:
        raise StrictJsonError(f"nested deeper than {MAX_DEPTH} levels") from error
    except ValueError as error:
        raise StrictJsonError(str(error)) from error
    _check_depth(decoded, value)
    if _ESCAPED_SURROGATE.search(decoded) or not _encodes(decoded):
        _check_characters(value)
    return value


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise StrictJsonError(f"the key {twice!r} is given twice")
    return result


def _no_constant(name: str) -> Any:
    raise StrictJsonError(f"{name} is not JSON")


def _check_depth(text: str, value: Any) -> None:
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH + 1:
            raise StrictJsonError(f"nested deeper than {MAX_DEPTH} levels")
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
        ]


def _check_characters(value: Any) -> None:
    # Without escapes every character of keys and strings stands in the text as itself.
    if not _encodes(json.dumps(value, ensure_ascii=False)):
        raise StrictJsonError("a lone surrogate, which is half of a character")


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
