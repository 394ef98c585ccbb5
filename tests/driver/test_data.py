"""The command line's data: files, prompts, order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mobizo_cli.data import Example, ExampleBatches, in_order, load_examples
from mobizo_cli.errors import DataError, ModelError, OptionError
from mobizo_cli.task import LossKind, TextTask, parse_labels, parse_layers, template_columns
from mobizo_cli.text import PromptEncoder, label_ids
from tests.driver.text_model import WORDS

TASK = TextTask(
    template="{text} It was",
    label_column="label",
    label_values=("0", "1"),
    label_words=("terrible", "great"),
    label_ids=(4, 5),
    loss="label-words",
    max_length=6,
    tokenizer="tokenizer",
)


def word_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def encoder(loss: LossKind = "label-words", tokenizer: Tokenizer | None = None) -> PromptEncoder:
    return PromptEncoder(tokenizer or word_tokenizer(), TASK.label_ids, loss, TASK.max_length)


def words(row) -> str:
    return " ".join(WORDS[token] for token in row.tolist())


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "a film", "label": 0}\n\n{"text": " the best ", "label": "1", "more": null}\n'),
        ("a.csv", 'text,label\n"a film",0\nthe best,1\n'),
        ("a.CSV", "\ufefflabel,text\r\n0,a film\r\n1,the best\r\n"),
    ],
)
def test_formats(tmp_path: Path, name: str, content: str):
    assert load_examples(write(tmp_path / name, content), TASK) == [
        Example("a film It was", 0),
        Example("the best It was", 1),
    ]


def test_several_columns_and_word_labels(tmp_path: Path):
    task = replace(TASK, template="{a} and {b}, {a}:", label_column="y", label_values=("true", "false"))
    path = write(tmp_path / "a.jsonl", '{"a": 1, "b": 2.5, "y": false}')
    assert load_examples(path, task) == [Example("1 and 2.5, 1:", 1)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "a", r"expected a file that ends in \.jsonl or \.csv"),
        ("a.jsonl", "", "holds no rows"),
        ("a.csv", "text,label\n", "holds no rows"),
        ("a.jsonl", '{"text": "a", "label": 0}\n{"text": ', "line 2: not JSON"),
        ("a.jsonl", "[1]", "line 1: expected a JSON object, found list"),
        ("a.jsonl", '{"txt": "a", "label": 0}', r"line 1: no column 'text'; found \['label', 'txt'\]"),
        ("a.csv", "text,gold\na,0\n", r"line 2: no column 'label'; found \['gold', 'text'\]"),
        ("a.csv", "text,label\na,0\nb\n", "line 3: no column 'label'"),
        ("a.csv", 'text,label\na,0\n"b,1\n', "line 3: not CSV"),
        (
            "a.jsonl",
            '{"text": "a", "label": 0}\n{"text": "a", "label": 2}',
            r"line 2: the label '2' has no word; .*'0'",
        ),
        ("a.jsonl", b'{"text": "\xff", "label": 0}', "not UTF-8"),
    ],
)
def test_faults(tmp_path: Path, name: str, content: str | bytes, message: str):
    with pytest.raises(DataError, match=message):
        load_examples(write(tmp_path / name, content), TASK)


def test_missing_file(tmp_path: Path):
    with pytest.raises(DataError, match="no such file"):
        load_examples(tmp_path / "a.jsonl", TASK)
    (tmp_path / "b.csv").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        load_examples(tmp_path / "b.csv", TASK)


def test_prompts_are_padded_and_cut_on_the_left():
    batch = encoder().batch(["a It was", "the worst a film ever ever It was"], [0, 1])
    assert words(batch["input_ids"][0]).endswith("[UNK] [UNK] a It was")
    assert batch["attention_mask"].tolist() == [[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]]
    assert words(batch["input_ids"][1]) == "a film ever ever It was"
    assert batch["label"].tolist() == [0, 1]


def test_a_beginning_of_text_token_survives_and_an_appended_one_is_dropped():
    tokenizer = word_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[PAD] $A [UNK]", special_tokens=[("[PAD]", 1), ("[UNK]", 0)]
    )
    batch = encoder(tokenizer=tokenizer).prompts(["a It was", "the worst a film ever ever It was"])
    assert words(batch["input_ids"][0]).endswith("[PAD] a It was")
    assert words(batch["input_ids"][1]) == "[PAD] film ever ever It was"


def test_vocabulary_loss_appends_the_word():
    batch = encoder("vocabulary").batch(["a It was", "the worst a film ever ever It was"], [0, 1])
    assert words(batch["input_ids"][0]).endswith("a It was terrible")
    assert words(batch["input_ids"][1]) == "film ever ever It was great"
    assert batch["attention_mask"][0].tolist() == [0, 0, 1, 1, 1, 1]
    assert batch["labels"].tolist() == [[-100] * 5 + [4], [-100] * 5 + [5]]


@given(count=st.integers(1, 40), size=st.integers(1, 7), seed=st.integers(0, 2**40))
def test_every_epoch_visits_every_example_once(count: int, size: int, seed: int):
    batches = ExampleBatches([Example(str(i), 0) for i in range(count)], encoder(), size, seed)
    steps = 3 * count
    seen = [index for step in range(steps) for index in batches.indices(step)]
    for epoch in range(steps * size // count):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))


@given(step=st.integers(0, 500), seed=st.integers(0, 5))
def test_order_depends_on_seed_and_step_alone(step: int, seed: int):
    examples = [Example(str(i), 0) for i in range(30)]
    fresh, used = ExampleBatches(examples, encoder(), 4, seed), ExampleBatches(examples, encoder(), 4, seed)
    for other in (7, 499, 0):
        used.indices(other)
    assert used.indices(step) == fresh.indices(step)


def test_order_does_not_change_between_releases():
    batches = ExampleBatches([Example(str(i), 0) for i in range(10)], encoder(), 5, 0)
    # Journals of users depend on these orders.
    assert [batches.indices(step) for step in range(4)] == [
        [8, 4, 2, 6, 0],
        [7, 5, 1, 9, 3],
        [1, 3, 4, 0, 7],
        [5, 8, 9, 6, 2],
    ]


def test_fingerprint_tells_data_apart():
    examples = [Example("a", 0), Example("b", 1)]
    prints = {ExampleBatches(e, encoder(), 2, 0).fingerprint for e in (examples, examples[::-1], [examples[0]] * 2)}
    assert len(prints) == 3


def test_in_order_keeps_the_rest():
    assert [len(group) for group in in_order([Example("a", 0)] * 10, 4)] == [4, 4, 2]


@pytest.mark.parametrize("bad", [["great", "a film"], ["great", "great"], ["great", ""], ["great", "lovely"]])
def test_label_words_are_one_token_each(bad: list[str]):
    with pytest.raises(ModelError, match=r"expected one|are the same token|not in the tokenizer's vocabulary"):
        label_ids(word_tokenizer(), bad)


def test_parsing_of_options():
    assert parse_labels("0= terrible,1= great") == {"0": " terrible", "1": " great"}
    assert parse_layers("0,3,15-17") == [0, 3, 15, 16, 17]
    assert template_columns("{a} {{x}} {b} {a}") == ("a", "b")


@pytest.mark.parametrize("text", ["", "0", "0=a", "0=a,1", "0=a,0=b", "0= ,1=b", "=a,1=b"])
def test_bad_labels(text: str):
    with pytest.raises(OptionError, match="--labels"):
        parse_labels(text)


@pytest.mark.parametrize("text", ["", "a", "3-", "-3", "5-3", "1,,2", "1.5"])
def test_bad_layers(text: str):
    with pytest.raises(OptionError, match="--layers"):
        parse_layers(text)


@pytest.mark.parametrize("text", ["It was", "{", "{text", "{} It", "{0}", "{a.b}", "{a[0]}"])
def test_bad_templates(text: str):
    with pytest.raises(OptionError, match="--template"):
        template_columns(text)
