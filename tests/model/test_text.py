"""Texts as token ids: what is learned, what is only read, and what comes back."""

from __future__ import annotations

import pytest
import torch

from auxkern.model.text import Example, TextFormat, padded
from tests.support.tiny import byte_tokenizer

IGNORED = -100


def ids_of(text: str) -> list[int]:
    return byte_tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_the_text_and_its_end_are_learned_and_the_prompt_is_not():
    tokenizer = byte_tokenizer()
    example = TextFormat(tokenizer).example("key", " sat", prompt="the cat")
    start, end = tokenizer.convert_tokens_to_ids(["<start>", "<end>"])
    assert example == {
        "input_ids": [start, *ids_of("the cat"), *ids_of(" sat"), end],
        "labels": [IGNORED] * 8 + [*ids_of(" sat"), end],
        "condition_ids": ids_of("key"),
    }


def test_the_prefix_is_part_of_every_text_and_of_nothing_else():
    tokenizer = byte_tokenizer()
    text_format = TextFormat(tokenizer, text_prefix=" ")
    assert text_format.example("key", "sat", "the cat") == TextFormat(tokenizer).example(
        "key", " sat", "the cat"
    )
    plain, prefixed = (one.prompts(["key"], ["the cat"]) for one in (TextFormat(tokenizer), text_format))
    assert all(torch.equal(plain[name], prefixed[name]) for name in plain)
    with pytest.raises(TypeError, match="text_prefix must be a str, got NoneType"):
        TextFormat(tokenizer, text_prefix=None)


def test_many_examples_are_the_single_ones():
    text_format = TextFormat(byte_tokenizer(), "<{condition}>", max_length=9, text_prefix="-")
    examples = [Example("a", "one"), Example("", "a longer text", "it"), Example("bcd", "")]
    singles = [text_format.example(e.condition, e.text, e.prompt) for e in examples]
    assert text_format.examples(examples) == singles
    assert len({len(single["input_ids"]) for single in singles}) == 3
    assert text_format.examples([]) == []


def test_without_a_start_token_the_end_token_begins():
    text_format = TextFormat(byte_tokenizer(start=None, padding=None))
    ids = text_format.example("c", "ab")["input_ids"]
    assert ids == [text_format.end_id, *ids_of("ab"), text_format.end_id]
    assert text_format.pad_id == text_format.end_id


@pytest.mark.parametrize("start", ["<start>", None], ids=["start token", "end token begins"])
def test_a_sequence_has_one_start_and_one_end(start):
    text_format = TextFormat(byte_tokenizer(start=start))
    begin, end = text_format.tokenizer.convert_ids_to_tokens([text_format.start_id, text_format.end_id])
    plain, prompted = text_format.example("c", "ab"), text_format.example("c", "ab", "hi")
    assert text_format.example("c", f"{begin}ab") == plain
    assert text_format.example("c", f"{begin}ab{end}") == plain
    assert text_format.example("c", f"ab{end}", f"{begin}hi") == prompted
    prompts = text_format.prompts(["c", "c"], ["hi", f"{begin}hi"])["input_ids"]
    assert torch.equal(prompts[0], prompts[1])
    assert text_format.prompts(["c"], [begin])["input_ids"].tolist() == [[text_format.start_id]]


def test_a_start_token_within_a_text_stays():
    text_format = TextFormat(byte_tokenizer())
    assert text_format.example("c", "<start>ab", "hi")["input_ids"].count(text_format.start_id) == 2
    assert text_format.example("c", "")["input_ids"] == [text_format.start_id, text_format.end_id]


def test_the_padding_token_is_its_own_where_there_is_one():
    text_format = TextFormat(byte_tokenizer())
    assert len({text_format.start_id, text_format.end_id, text_format.pad_id}) == 3


@pytest.mark.parametrize(
    ("max_length", "text", "ended"), [(6, "ab", True), (5, "ab", False), (4, "a", False)]
)
def test_a_long_text_loses_its_end(max_length, text, ended):
    text_format = TextFormat(byte_tokenizer(), max_length=max_length)
    example = text_format.example("c", "ab", prompt="xy")
    end = [text_format.end_id] * ended
    assert example["input_ids"] == [text_format.start_id, *ids_of("xy"), *ids_of(text), *end]
    assert example["labels"] == [IGNORED] * 3 + ids_of(text) + end


def test_a_prompt_that_leaves_no_room_is_refused():
    with pytest.raises(ValueError, match=r"'xyz' takes 4 tokens .* max_length=4"):
        TextFormat(byte_tokenizer(), max_length=4).example("c", "ab", prompt="xyz")


def test_prompts_end_where_new_tokens_begin():
    text_format = TextFormat(byte_tokenizer())
    start, pad = text_format.start_id, text_format.pad_id
    (a, b), (c, d, e) = ids_of("ab"), ids_of("cde")
    batch = text_format.prompts(["ab", "cde"], ["", "ab"])
    expected = {
        "input_ids": [[pad, pad, start], [start, a, b]],
        "attention_mask": [[0, 0, 1], [1, 1, 1]],
        "condition_ids": [[a, b, pad], [c, d, e]],
        "condition_mask": [[1, 1, 0], [1, 1, 1]],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_without_prompts_there_is_the_start_token():
    text_format = TextFormat(byte_tokenizer())
    assert text_format.prompts(["a", "b"])["input_ids"].tolist() == [[text_format.start_id]] * 2


@pytest.mark.parametrize(
    ("conditions", "prompts", "error", "message"),
    [
        ("ab", None, TypeError, "conditions must be a sequence of str"),
        (["a", "b"], "ab", TypeError, "prompts must be a sequence of str"),
        (["a", "b"], ["x"], ValueError, "2 conditions and 1 prompts"),
        ([], None, ValueError, "0 conditions"),
    ],
)
def test_prompts_refuses(conditions, prompts, error, message):
    with pytest.raises(error, match=message):
        TextFormat(byte_tokenizer()).prompts(conditions, prompts)


def test_the_template_surrounds_the_condition_only():
    text_format = TextFormat(byte_tokenizer(), "word: {condition} {{}}")
    assert text_format.example("{x}", "ab")["condition_ids"] == ids_of("word: {x} {}")
    assert text_format.prompts(["{x}"])["condition_ids"].tolist() == [ids_of("word: {x} {}")]


@pytest.mark.parametrize(
    "template",
    ["", "word", "{}", "{0}", "{other}", "{condition} {other}", "{condition.real}", "{condition[0]}",
     "{condition!r}", "{condition:>9}", "{condition", "{condition} }"],
)  # fmt: skip
def test_other_templates_are_refused(template):
    with pytest.raises(ValueError, match=r"condition_template is .* write \{condition\}"):
        TextFormat(byte_tokenizer(), template)


@pytest.mark.parametrize("text", [" a  b ", "line\n\n end .", "don ' t , you ?", "Ünïcode — ❤", ""])
def test_decoding_gives_the_text_to_the_last_space(text):
    text_format = TextFormat(byte_tokenizer())
    ids = text_format.example("c", text)["input_ids"]
    assert text_format.decode(ids) == text
    assert text_format.decode(torch.tensor([*ids, text_format.pad_id])) == text


def test_decoding_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"\(1, 3\).*one row"):
        TextFormat(byte_tokenizer()).decode(torch.zeros(1, 3, dtype=torch.int64))


def test_a_tokenizer_without_an_end_is_refused():
    with pytest.raises(ValueError, match="no end token"):
        TextFormat(byte_tokenizer(end=None))


def test_a_length_that_holds_no_text_is_refused():
    with pytest.raises(ValueError, match="max_length is 1"):
        TextFormat(byte_tokenizer(), max_length=1)


@pytest.mark.parametrize("field", ["condition", "text", "prompt"])
def test_an_example_holds_strings(field):
    with pytest.raises(TypeError, match=f"{field} must be a str, got int: 3"):
        Example(**{"condition": "a", "text": "b", field: 3})


def test_padding_goes_to_a_known_side():
    with pytest.raises(ValueError, match="side is 'middle'"):
        padded([[1]], 0, side="middle")
