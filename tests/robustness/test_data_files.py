"""Data files as people have them: what is ambiguous is an error with file, line and column, before any training."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobizo_cli.data import Example, ExampleBatches, load_examples, remarks
from mobizo_cli.errors import DataError
from mobizo_cli.task import TextTask
from mobizo_cli.text import PromptEncoder

TASK = TextTask("{text} It was", "label", ("0", "1"), (" a", " b"), (1, 2), "label-words", 8, "t")
DEEP = '{"text":' + "[" * 100_000


def written(directory: Path, name: str, content: str | bytes) -> Path:
    path = directory / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    ("content", "words"),
    [
        # Unquoted commas, with the label first, last, and in a line after a text over several lines.
        ("label,text\n1,I liked it, though, not at first\n", "line 2: the row has 4 cells, the header 2 columns"),
        ("text,label\nI liked it, though,1\n", "line 2: the row has 3 cells"),
        ('text,label\n"two\n\nlines",1\r\na,b,0\n', "line 5: the row has 3 cells"),
        ("text,label\na,0,\n", "line 2: the row has 3 cells"),
        ("text,label,more\na,0\n", "line 2: no column 'more': the row has 2 cells"),
        # Two columns of one name.
        ("text,text,label\ngood,other,1\n", "line 1: 2 columns are named 'text'"),
        ("text,label,label\ngood,0,1\n", "line 1: 2 columns are named 'label'"),
        ("text,label,x,x\ngood,0,1,2\n", "line 1: 2 columns are named 'x'"),
        # Other separators, other encodings.
        ("text\tlabel\ngood\t1\n", r"no column 'text'; found \['text\\tlabel'\]. The file seems to be .* by tabs"),
        ("text;label\ngood;1\n", "separated by semicolons"),
        ("text,label\ngood,1\n".encode("utf-16"), "line 1: not UTF-8"),
        ("text,label\ngood,1\n".encode("utf-16-le"), "line 1: holds a zero byte"),
        (b"text,label\n" + b"a,0\n" * 5000 + b"\xff,0\n", "line 5002: not UTF-8"),
        ("text,label\na\0b,1\n", "line 2: holds a zero byte"),
        ('text,label\n"a" b,1\n', "line 2: not CSV"),
        ('text,label\n"a\nb,1\n', "line 2: not CSV"),
        ("text,label\na,\n", "line 2: the label '' has no word"),
    ],
)
def test_csv_faults(tmp_path: Path, content: str | bytes, words: str):
    with pytest.raises(DataError, match=words) as caught:
        load_examples(written(tmp_path, "d.csv", content), TASK)
    assert "d.csv" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": null, "label": 0}', "column 'text' is null, expected text"),
        ('{"text": true, "label": 0}', "column 'text' is true, expected text"),
        ('{"text": ["a"], "label": 0}', "column 'text' is a list, expected text"),
        ('{"text": {"a": 1}, "label": 0}', "column 'text' is an object, expected text"),
        ('{"text": NaN, "label": 0}', "NaN is not a JSON value"),
        ('{"text": "a", "label": -Infinity}', "-Infinity is not a JSON value"),
        ('{"text": "a", "label": null}', "the label, column 'label', is null"),
        ('{"text": "a", "label": [0]}', "the label, column 'label', is a list"),
        ('{"text": 1.50, "label": 0}', "column 'text' is the number 1.50; write text in double quotes"),
        ('{"text": 1e999, "label": 0}', "column 'text' is the number 1e999"),
        ('{"text": -0, "label": 0}', "column 'text' is the number -0"),
        ('{"text": "a", "text": "b", "label": 0}', "the key 'text' occurs twice"),
        ('{"text": "a", "label": 0, "label": 1}', "the key 'label' occurs twice"),
        ('{"other": "a", "label": 0}', r"no column 'text'; found \['label', 'other'\]"),
        (r'{"text": "a\ud800", "label": 0}', r"column 'text' holds '\\ud800', half of a surrogate pair"),
        (r'{"text": "a", "label": "\udfff"}', r"column 'label' holds '\\udfff'"),
        (r'{"text": "a\u0000b", "label": 0}', "column 'text' holds a zero byte"),
        (DEEP, "nested too deeply|not JSON"),
        ('"text"', "expected a JSON object, found str"),
        ("1", "expected a JSON object, found number"),
        ('{"text": "a", "label": 0} {}', "not JSON"),
    ],
)
def test_jsonl_faults(tmp_path: Path, line: str, words: str):
    path = written(tmp_path, "d.jsonl", '\ufeff{"text": "a", "label": 0}\r\n\r\n' + line + "\n")
    with pytest.raises(DataError, match=rf"d\.jsonl, line 3: .*({words})"):
        load_examples(path, TASK)


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("d.csv", '\ufefftext,label\r\n\r\n"a, b",0\r\n"c\n""d""",1\r\n   \r\n', ["a, b", 'c\n"d"']),
        ("d.csv", ",text,label\n0,a,0\n1,nan,1\n", ["a", "nan"]),
        ("d.csv", "text,label\n" + "x" * 200_000 + ",1\n", ["x" * 200_000]),
        ("d.jsonl", '{"text": 10000000000000000000000000, "label": 0}', ["10000000000000000000000000"]),
        ("d.jsonl", '{"text": 2.5, "label": "1", "more": null}\n{"label": 1, "text": "null"}', ["2.5", "null"]),
        ("d.jsonl", r'{"text": "\ud83d\ude00", "label": 1}', ["\U0001f600"]),
    ],
)
def test_what_is_clear_is_read_as_it_stands(tmp_path: Path, name: str, content: str, texts: list[str]):
    examples = load_examples(written(tmp_path, name, content), TASK)
    assert [example.prompt for example in examples] == [f"{text} It was" for text in texts]


cell = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.lists(st.none()))


@given(text=cell, label=cell)
def test_no_value_becomes_a_word_that_is_not_in_the_file(tmp_path_factory: pytest.TempPathFactory, text, label):
    import json

    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    line = json.dumps({"text": text, "label": label})
    path.write_text(line)
    try:
        (example,) = load_examples(path, TASK)
    except DataError:
        return
    assert isinstance(text, (str, int, float))
    assert not isinstance(text, bool)
    assert example.prompt == f"{str(text).strip()} It was"


class Words:
    """A tokenizer of one token a word, which counts its calls."""

    calls = 0

    def encode(self, text: str):
        from types import SimpleNamespace

        self.calls += 1
        ids = [sum(word.encode()) for word in text.split()]
        return SimpleNamespace(ids=ids, special_tokens_mask=[0] * len(ids))


def test_a_long_line_is_tokenized_once():
    words = Words()
    encoder = PromptEncoder(words, (1, 2), "label-words", 8)  # pyright: ignore[reportArgumentType]
    examples = [Example("word " * 200_000 + "It was", 0), Example("a It was", 1)]
    batches = ExampleBatches(examples, encoder, 2, 0)
    found = [batches.batch(step)["input_ids"] for step in range(5)]
    assert words.calls == 2
    assert all(batch.shape == (2, 8) for batch in found)


def test_cut_and_empty_texts_are_counted():
    encoder = PromptEncoder(Words(), (1, 2), "vocabulary", 4)  # pyright: ignore[reportArgumentType]
    examples = [Example(text, 0) for text in ("a It was", "a b It was", "a b c d It was", " It was")]
    assert remarks(Path("d.csv"), examples, TASK, encoder) == [
        "d.csv: 2 of 4 texts were cut to 3 tokens",
        "d.csv: 1 of 4 rows have no text",
    ]


def test_the_fingerprint_covers_tokens_labels_and_batch_size():
    class Other(Words):
        def encode(self, text: str):
            found = super().encode(text)
            found.ids = [token + 1 for token in found.ids]
            return found

    own_words = Words()

    def prints(tokenizer: Words = own_words, ids: tuple[int, int] = (1, 2), size: int = 2, label: int = 0) -> set[str]:
        encoder = PromptEncoder(tokenizer, ids, "label-words", 8)  # pyright: ignore[reportArgumentType]
        batches = ExampleBatches([Example("a It was", label)], encoder, size, 0)
        return {batches.fingerprint, batches.former_fingerprint}

    own = prints()
    assert prints() == own
    # What version 0.1 wrote knew nothing of the tokens, and is still there for its journals.
    assert [len(own | other) for other in (prints(Other()), prints(ids=(2, 1)), prints(size=3))] == [3, 3, 3]
    assert not own & prints(label=1)
