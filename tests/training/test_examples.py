"""Examples from files and tables, and encoded."""

from __future__ import annotations

import pickle

import pytest

from auxkern.model.text import TextFormat
from auxkern.training.examples import (
    EncodedExamples,
    Example,
    data_fingerprint,
    encode,
    read_jsonl,
    write_jsonl,
)
from tests.support.tiny import byte_tokenizer

EXAMPLES = [Example("key", "a text"), Example("ключ", 'line\nand "quote"\u2028', "start: "), Example("", "")]


class Table:
    """Rows by number, as a Hugging Face dataset gives them, with None where a prompt is missing."""

    def __len__(self) -> int:
        return len(EXAMPLES)

    def __getitem__(self, i: int) -> dict[str, str | None]:
        example = EXAMPLES[i]
        return {"condition": example.condition, "text": example.text, "prompt": example.prompt or None}


def test_a_file_gives_back_what_was_written(tmp_path):
    path = tmp_path / "examples.jsonl"
    write_jsonl(path, EXAMPLES)
    assert read_jsonl(path) == EXAMPLES
    assert path.read_bytes().count(b"\n") == len(EXAMPLES)
    assert b"prompt" not in path.read_bytes().splitlines()[0]


def test_empty_lines_count_for_nothing(tmp_path):
    path = tmp_path / "examples.jsonl"
    path.write_text('\n{"text": "t", "condition": "c", "prompt": null}\r\n  \n', encoding="utf-8")
    assert read_jsonl(path) == [Example("c", "t")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"condition": "c"}', "'text' is missing"),
        (b'{"text": "t"}', "'condition' is missing"),
        (b'{"condition": "c", "text": "t", "label": 1}', "'label' is unknown"),
        (b'{"condition": 3, "text": "t"}', "condition must be a str, got int: 3"),
        (b'["c", "t"]', "got a list"),
        (b'{"condition": "c", "text": "\xff"}', "utf-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "examples.jsonl"
    path.write_bytes(b'{"condition": "c", "text": "t"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"examples\.jsonl, line 3: .*{message}"):
        read_jsonl(path)


def test_a_line_that_is_no_json_is_named_with_the_place(tmp_path):
    path = tmp_path / "examples.jsonl"
    path.write_bytes(b'{"condition": "c", "text": "t"}\n{"condition": "c", "text": "t"\n')
    with pytest.raises(ValueError, match=r"examples\.jsonl, line 2 is not JSON: .* at character 32;"):
        read_jsonl(path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "examples.jsonl"
    write_jsonl(path, EXAMPLES)
    with pytest.raises(TypeError, match="holds a dict"):
        write_jsonl(path, [EXAMPLES[1], {"condition": "c", "text": "t"}])
    assert read_jsonl(path) == EXAMPLES
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_encoded_examples_are_those_of_the_format():
    text_format = TextFormat(byte_tokenizer())
    expected = [text_format.example(e.condition, e.text, e.prompt) for e in EXAMPLES]
    for source in (EXAMPLES, Table()):
        encoded = encode(source, text_format)
        assert [encoded[i] for i in range(len(encoded))] == expected
    assert encoded[-1] == expected[-1]
    assert list(pickle.loads(pickle.dumps(encoded))) == expected
    for outside in (len(expected), -len(expected) - 1):
        with pytest.raises(IndexError, match=f"no example {outside} among 3"):
            encoded[outside]


def test_more_examples_than_a_tokenizer_gets_at_once():
    text_format = TextFormat(byte_tokenizer())
    examples = [Example(str(i), f"text {i}") for i in range(1500)]
    encoded = encode(examples, text_format)
    assert len(encoded) == 1500
    assert encoded[1499] == text_format.example("1499", "text 1499")


@pytest.mark.parametrize(
    ("examples", "error", "message"),
    [
        ([], ValueError, "examples is empty"),
        ([EXAMPLES[0], {"condition": "c", "txt": "t"}], ValueError, "example 1: the field 'txt' is unknown"),
        ([EXAMPLES[0], "text"], TypeError, "example 1: an example is a mapping"),
        ([{"condition": "c", "text": None}], TypeError, "example 0: text must be a str, got NoneType"),
    ],
)
def test_encode_refuses(examples, error, message):
    with pytest.raises(error, match=message):
        encode(examples, TextFormat(byte_tokenizer()))


def test_labels_that_are_not_the_sequence_are_refused():
    item = {"input_ids": [5, 6, 7], "labels": [-100, 6, -100], "condition_ids": []}
    with pytest.raises(ValueError, match="item 0 has labels"):
        EncodedExamples([item])


def test_the_fingerprint_names_the_sequences_and_their_order():
    def of(*examples: Example) -> str:
        return data_fingerprint(encode(examples, TextFormat(byte_tokenizer())))

    one, two = Example("c", "one"), Example("c", "two")
    assert len(of(one, two)) == 64
    assert of(one, two) == of(Example("another", "one"), Example("c", "wo", "t"))
    # The last joins to the same ids as the first, in one sequence fewer.
    others = [of(two, one), of(one), of(one, two, two), of(Example("c", "one<end><start>two"))]
    assert len({of(one, two), *others}) == 5
