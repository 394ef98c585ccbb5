"""Damage to files: seeded, each named, and never none. `mutate` for any bytes, `mutate_text` for lines of text."""

from __future__ import annotations

import random
from collections.abc import Callable

Damage = tuple[str, bytes]


def _place(data: bytes, chance: random.Random) -> int:
    # Ends are where headers, footers and torn writes are.
    near = chance.choice([None, "start", "end"])
    if near is None or len(data) < 128:
        return chance.randrange(len(data))
    offset = chance.randrange(128)
    return offset if near == "start" else len(data) - 1 - offset


def _length(data: bytes, place: int, chance: random.Random) -> int:
    return min(len(data) - place, chance.choice([1, 2, 4, 7, 16, 64, 512, 4096]))


def flip_bit(data: bytes, chance: random.Random) -> Damage:
    place, bit = _place(data, chance), chance.randrange(8)
    return f"bit {bit} of byte {place} flipped", _with(data, place, bytes([data[place] ^ 1 << bit]))


def set_byte(data: bytes, chance: random.Random) -> Damage:
    place, value = _place(data, chance), chance.choice([0, 0xFF, 0x7F, 0x80, 0x20, *range(256)])
    return f"byte {place} set to {value}", _with(data, place, bytes([value]))


def zero_range(data: bytes, chance: random.Random) -> Damage:
    place = _place(data, chance)
    length = _length(data, place, chance)
    return f"{length} zeros at {place}", _with(data, place, bytes(length))


def random_range(data: bytes, chance: random.Random) -> Damage:
    place = _place(data, chance)
    length = _length(data, place, chance)
    return f"{length} random bytes at {place}", _with(data, place, chance.randbytes(length))


def truncate(data: bytes, chance: random.Random) -> Damage:
    place = _place(data, chance)
    return f"cut at {place}", data[:place]


def drop_range(data: bytes, chance: random.Random) -> Damage:
    place = _place(data, chance)
    length = _length(data, place, chance)
    return f"{length} bytes dropped at {place}", data[:place] + data[place + length :]


def insert(data: bytes, chance: random.Random) -> Damage:
    place, more = _place(data, chance), chance.randbytes(chance.choice([1, 4, 64]))
    return f"{len(more)} random bytes put in at {place}", data[:place] + more + data[place:]


def repeat_range(data: bytes, chance: random.Random) -> Damage:
    place = _place(data, chance)
    length = _length(data, place, chance)
    again = data[place : place + length]
    return f"{length} bytes at {place} twice", data[: place + length] + again + data[place + length :]


def swap_ranges(data: bytes, chance: random.Random) -> Damage:
    length = min(len(data) // 2, chance.choice([1, 4, 64]))
    first = chance.randrange(len(data) - 2 * length + 1)
    second = chance.randrange(first + length, len(data) - length + 1)
    one, two = data[first : first + length], data[second : second + length]
    text = f"{length} bytes at {first} and {second} swapped"
    return text, _with(_with(data, first, two), second, one)


def append(data: bytes, chance: random.Random) -> Damage:
    more = chance.choice([b"\0", b"\n", b"{}\n", chance.randbytes(64), data[-64:]])
    return f"{len(more)} bytes at the end", data + more


def _with(data: bytes, place: int, new: bytes) -> bytes:
    return data[:place] + new + data[place + len(new) :]


# Lines and JSON


def swap_lines(data: bytes, chance: random.Random) -> Damage:
    lines = data.splitlines(keepends=True)
    first, second = chance.randrange(len(lines)), chance.randrange(len(lines))
    lines[first], lines[second] = lines[second], lines[first]
    return f"lines {first + 1} and {second + 1} swapped", b"".join(lines)


def drop_line(data: bytes, chance: random.Random) -> Damage:
    lines = data.splitlines(keepends=True)
    place = chance.randrange(len(lines))
    return f"line {place + 1} dropped", b"".join(lines[:place] + lines[place + 1 :])


def repeat_line(data: bytes, chance: random.Random) -> Damage:
    lines = data.splitlines(keepends=True)
    place = chance.randrange(len(lines))
    return f"line {place + 1} twice", b"".join(lines[: place + 1] + lines[place:])


def change_digit(data: bytes, chance: random.Random) -> Damage:
    digits = [place for place, byte in enumerate(data) if 48 <= byte < 58]
    if not digits:
        return flip_bit(data, chance)
    place, digit = chance.choice(digits), chance.randrange(10)
    return f"digit {digit} at {place}", _with(data, place, b"%d" % digit)


_WORDS = (b"true", b"null", b"NaN", b"-1", b"1e400", b'"\\ud800"', b"[" * 50_000, b"{}", b'"x"', b"\xff", b"\0")


def other_value(data: bytes, chance: random.Random) -> Damage:
    """What stands after some colon becomes something else."""
    colons = [place for place, byte in enumerate(data) if byte == 58]
    if not colons:
        return insert(data, chance)
    start = chance.choice(colons) + 1
    ends = [place for place in (data.find(mark, start) for mark in (b",", b"}", b"\n")) if place >= 0]
    word = chance.choice(_WORDS)
    return f"value at {start} replaced by {word[:10]!r}", data[:start] + word + data[min(ends, default=len(data)) :]


def repeat_key(data: bytes, chance: random.Random) -> Damage:
    commas = [place for place, byte in enumerate(data) if byte == 44]
    if len(commas) < 2:
        return repeat_range(data, chance)
    which = chance.randrange(len(commas) - 1)
    start, end = commas[which], commas[which + 1]
    return f"item at {start} twice", data[:end] + data[start:end] + data[end:]


ANY: tuple[Callable[[bytes, random.Random], Damage], ...] = (
    flip_bit,
    flip_bit,
    set_byte,
    zero_range,
    random_range,
    truncate,
    drop_range,
    insert,
    repeat_range,
    swap_ranges,
    append,
)
TEXT = (*ANY, swap_lines, drop_line, repeat_line, change_digit, other_value, repeat_key)


def mutate(data: bytes, chance: random.Random) -> Damage:
    """A description, and bytes that differ from ``data``."""
    return _drawn(ANY, data, chance)


def mutate_text(data: bytes, chance: random.Random) -> Damage:
    """As `mutate`, with changes that only lines and JSON know."""
    return _drawn(TEXT, data, chance)


def _drawn(kinds: tuple[Callable[[bytes, random.Random], Damage], ...], data: bytes, chance: random.Random) -> Damage:
    while True:
        text, changed = chance.choice(kinds)(data, chance) if data else append(data, chance)
        if changed != data:
            return text, changed
