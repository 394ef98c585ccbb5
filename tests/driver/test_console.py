"""Diffs on a terminal: colored and within its width; nothing of that in a file."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mobizo_cli import console

DIFF = "--- before p\n+++ after p\n@@ line 1 @@\n-%a: f32[1] = x()\n+%a: f32[2] = x([1, 2])\n~%b: f32[1] → f32[2] = y()"


def printed(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> tuple[str, int | None]:
    file = io.StringIO()
    colors = "standard" if terminal else "auto"
    fake = Console(file=file, force_terminal=terminal, width=72, soft_wrap=True, highlight=False, color_system=colors)
    monkeypatch.setattr(console, "out", fake)
    console.diff(DIFF)
    return file.getvalue(), console.terminal_width()


def test_a_terminal_gets_colours_and_a_width(monkeypatch: pytest.MonkeyPatch) -> None:
    text, width = printed(monkeypatch, terminal=True)
    assert width == 72
    assert "\x1b[1m--- before p\x1b[0m\n\x1b[1m+++ after p\x1b[0m\n" in text
    # Red, green and yellow, as everybody's diff has it.
    assert "\x1b[31m-%a: f32[1] = x()\x1b[0m" in text
    assert "\x1b[32m+%a: f32[2] = x([1, 2])\x1b[0m" in text
    assert "\x1b[33m~%b: f32[1] → f32[2] = y()\x1b[0m" in text


def test_a_file_gets_the_text_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert printed(monkeypatch, terminal=False) == (DIFF + "\n", None)
