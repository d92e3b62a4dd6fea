"""Data that models cannot take is refused by file and line; and how it is written for a pointer to copy."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from auxkern.commands.train import main
from auxkern.evaluation.bootstrap import bootstrap_mean
from auxkern.evaluation.diversity import distinct_n, self_bleu
from auxkern.evaluation.perplexity import evaluate_nll
from auxkern.model.text import Example, TextFormat
from auxkern.tasks.sources import JsonLines
from auxkern.tasks.task import split_by_condition
from auxkern.training.collator import AuxCollator
from auxkern.training.examples import encode, read_jsonl
from auxkern.training.loop import train
from auxkern.training.settings import LoopSettings, TrainSettings, read_yaml
from auxkern.training.wording import PLAIN, SPACED, wording_of
from tests.support.tiny import DECODER, EOS, PAD, T5, V, byte_tokenizer, tiny_lm_for, tiny_pair

WORDS = ("rain", "river", "stone", "light", "garden", "window", "winter", "summer")
SENTENCES = [
    Example(word, f"{start} {word} {end}")
    for word in WORDS
    for start, end in (("they like the", "very much"), ("this", "is old"), ("it was a", "of the city"))
]
LINE = {"condition": "rain", "text": "it is rain"}


def word_tokenizer() -> Any:
    """Byte-level BPE, like GPT-2's: a word after a space is one token, and another one than alone."""
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<end>"]
    )
    tokens.train_from_iterator([one.text for one in SENTENCES] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>", bos_token="<end>")


def save_base(folder: Path, tokenizer: Any, **options: Any) -> None:
    logging.disable_progress_bar()  # standard error belongs to the command
    settings = {"max_position_embeddings": 64, "pad_token_id": None, **options}
    tiny_lm_for(tokenizer, **settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """Of a small run on a base with a tokenizer of bytes."""
    save_base(tmp_path / "base", byte_tokenizer())
    write(tmp_path / "train.jsonl", *[LINE] * 4)
    write(tmp_path / "held.jsonl", {**LINE, "text": "rain again"})
    pair = [f"--pair=auxiliary_config={json.dumps(DECODER)}", "--steps=2", "--batch-size=2"]
    names = {"base": "base", "train-file": "train.jsonl", "validation-file": "held.jsonl", "output": "out"}
    return [*pair, *(f"--{name}={tmp_path / file}" for name, file in names.items())]


def said_by(capsys: pytest.CaptureFixture[str]) -> str:
    """The only line on standard error."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


# -------------------------------------------------------------------------------- written to be copied


def test_the_wording_is_the_one_whose_ids_stand_in_the_texts() -> None:
    tokenizer = word_tokenizer()
    first, second = wording_of(tokenizer, SENTENCES, None, None)
    assert (first.condition_template, first.text_prefix, first.copied) == (SPACED, " ", 1.0)
    assert (second.condition_template, second.copied, second.held) == (PLAIN, 0.0, 1.0)


def test_the_plain_wording_stays_where_a_tokenizer_does_not_care() -> None:
    first = wording_of(byte_tokenizer(), SENTENCES, None, None)[0]
    assert (first.condition_template, first.text_prefix) == (PLAIN, "")


def test_the_users_wording_is_kept() -> None:
    assert [one.condition_template for one in wording_of(word_tokenizer(), SENTENCES, PLAIN, None)] == [
        PLAIN
    ] * 2
    (only,) = wording_of(word_tokenizer(), SENTENCES, PLAIN, "")
    assert only.copied == 0.0


@pytest.mark.parametrize("set_by_user", [False, True])
def test_train_finds_the_wording_or_says_that_the_users_is_of_little_use(
    set_by_user: bool, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_base(tmp_path / "base", word_tokenizer())
    records = [{"condition": one.condition, "text": one.text} for one in SENTENCES]
    write(tmp_path / "train.jsonl", *records)
    fixed = ["--condition-template", PLAIN, "--pair", "text_prefix=''"] if set_by_user else []
    assert main([*flags, "--pair", "pointer=true", *fixed]) == 0
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    said = capsys.readouterr()
    if set_by_user:
        assert (saved["condition_template"], saved.get("text_prefix", "")) == (PLAIN, "")
        assert "0% stand in their text" in said.out
        assert "as written 100% do: the pointer, which copies ids, is of little use" in said.err
    else:
        assert (saved["condition_template"], saved["text_prefix"]) == (SPACED, " ")
        assert "100% stand in their text" in said.out
        assert "of little use" not in said.err
        assert main([*flags, "--pair", "pointer=true", "--resume"]) == 0


def test_without_a_pointer_conditions_stay_as_they_are(flags: list[str], tmp_path: Path) -> None:
    save_base(tmp_path / "base", word_tokenizer())
    assert main(flags) == 0
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (saved["condition_template"], saved.get("text_prefix", "")) == (PLAIN, "")


# ----------------------------------------------------------------------------------- lines and fields


def test_a_file_may_begin_with_a_mark_of_its_byte_order(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(LINE).encode() + b"\n")
    assert read_jsonl(path) == [Example(**LINE)]


@pytest.mark.parametrize("field", ["condition", "text", "prompt"])
def test_half_a_character_is_refused_by_line(field: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", LINE, {**LINE, field: "ab\ud800c"})
    with pytest.raises(ValueError, match=rf"a.jsonl, line 2: {field} has half a character, '\\ud800', at 2"):
        read_jsonl(path)
    with pytest.raises(ValueError, match=rf"example 0: {field} has half a character"):
        encode([Example(**{**LINE, field: "ab\ud800c"})], TextFormat(byte_tokenizer()))


def test_a_source_of_texts_refuses_half_a_character_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "\udc00"})
    with pytest.raises(ValueError, match=r"line 1: the field 'text' has half a character"):
        list(JsonLines(path).records())


def test_an_unknown_field_is_named_with_what_to_do(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {**LINE, "id": 7})
    with pytest.raises(ValueError, match=r"line 1: the field 'id' is unknown.*take them out"):
        read_jsonl(path)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"text": "x" * 70}, {}, "72 tokens, but the base has positions for 64; pass max_length"),
        (
            {"text": "a<new>"},
            {"token": "<new>"},
            "prompt and text have the id 259, but the base has 0 to 258",
        ),
        ({"prompt": "x" * 40}, {"more": ["--max-length=20"]}, "the prompt 'xxxx"),
        (
            {"condition": "x" * 40},
            {"auxiliary": {**DECODER, "max_position_embeddings": 50}},
            "40 tokens of the condition and 12 of prompt and text, but the auxiliary has positions for 50",
        ),
        (
            {"condition": ""},
            {"auxiliary": T5, "more": ["--pair=architecture=encoder-decoder"]},
            "the condition is empty, and the auxiliary's encoder has nothing to read",
        ),
    ],
    ids=["positions", "ids", "prompt", "auxiliary", "empty"],
)
def test_an_example_that_does_not_fit_is_named_by_line(
    changes: dict[str, str],
    options: dict[str, Any],
    message: str,
    flags: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = list(options.pop("more", []))
    if "auxiliary" in options:
        more.append(f"--pair=auxiliary_config={json.dumps(options.pop('auxiliary'))}")
    if "token" in options:
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens([options["token"]])
        save_base(tmp_path / "base", tokenizer, vocab_size=len(tokenizer) - 1)
    lines = [json.dumps(LINE), "", json.dumps(LINE), json.dumps({**LINE, **changes})]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    assert main([*flags, *more]) == 2
    said = said_by(capsys)
    assert "train.jsonl, line 4: " in said
    assert message in said
    assert not (tmp_path / "out").exists()


def test_a_padding_id_beyond_the_base_is_refused(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = byte_tokenizer()
    save_base(tmp_path / "base", tokenizer, vocab_size=tokenizer.pad_token_id)
    assert main(flags) == 2
    assert "padding token has the id 258, but the base has 0 to 257; make pad_token one" in said_by(capsys)


@pytest.mark.parametrize("name", ["train-file", "validation-file"])
def test_a_file_without_examples_is_refused(
    name: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags, f"--{name}=/dev/null"]) == 2
    assert "/dev/null has no examples" in said_by(capsys)


def test_a_library_run_refuses_what_does_not_fit(tmp_path: Path) -> None:
    item = {"input_ids": [1, 5, EOS], "labels": [-100, 5, EOS], "condition_ids": [5]}
    model, settings = tiny_pair("own head", trained=False), LoopSettings(output=str(tmp_path / "o"), steps=1)
    for change, message in (
        ({"input_ids": [1, V, EOS]}, "training example 1: prompt and text have the id 97"),
        ({"condition_ids": [-1]}, "training example 1: the condition have the id -1"),
    ):
        with pytest.raises(ValueError, match=message):
            train(model, [item, {**item, **change}], settings, collate=AuxCollator(PAD))
    ignored = {**item, "labels": [7, -100, -100]}
    with pytest.raises(ValueError, match="nothing is to be learnt from 2 examples"):
        train(model, [ignored, ignored], settings, collate=AuxCollator(PAD))
    assert not (tmp_path / "o").exists()


# ------------------------------------------------------------------------------------------- pipes


def test_files_may_be_pipes(flags: list[str], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    feeding = threading.Thread(target=lambda: write(tmp_path / "pipe", *[LINE] * 4))
    feeding.start()
    assert main([*flags, f"--train-file={tmp_path / 'pipe'}"]) == 0
    feeding.join()


@pytest.mark.parametrize("output", ["", "-", "/dev/null", "/dev/stdout"])
def test_an_output_that_is_no_folder_is_refused(
    output: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(os.listdir("/dev"))
    assert main([*flags, f"--output={output}"]) == 2
    assert "output" in said_by(capsys)
    assert set(os.listdir("/dev")) == before


# ----------------------------------------------------------------------------------------- numbers


def test_numbers_of_numpy_are_numbers() -> None:
    given = {
        "output": "o",
        "steps": np.int64(5),
        "learning_rate": np.float32(0.5),
        "betas": (np.float64(0.5), 0),
        "shuffle": np.bool_(False),
        "seed": np.uint8(3),
    }
    settings = LoopSettings(**given)
    assert settings == LoopSettings.from_mapping({name: value for name, value in given.items()})
    assert json.loads(json.dumps(settings.as_json()))["learning_rate"] == 0.5
    assert [type(one) for one in (settings.steps, *settings.betas, settings.shuffle)] == [
        int,
        float,
        float,
        bool,
    ]
    pair = TrainSettings(
        output="o", base="b", task="keyword", pair={"lm_layers": np.arange(2), "d": np.float32(0.5)}
    )
    assert pair.pair == {"lm_layers": [0, 1], "d": 0.5}
    with pytest.raises(TypeError, match="steps must be an integer"):
        LoopSettings(output="o", steps=np.bool_(True))


def test_numbers_of_numpy_serve_in_data_tasks_and_measures() -> None:
    item = {
        "input_ids": np.array([1, 5, EOS]),
        "labels": np.array([-100, 5, EOS]),
        "condition_ids": np.array([5]),
    }
    assert AuxCollator(np.int64(PAD))([item])["input_ids"].tolist() == [[1, 5, EOS]]
    report = evaluate_nll(tiny_pair("own head"), [item], batch_tokens=np.int32(8), aux_scale=np.float32(0.5))
    assert report.tokens == 2
    examples = [Example(str(i), str(i)) for i in range(20)]
    splits = split_by_condition(examples, validation=np.float32(0.25), test=np.float64(0.25))
    assert splits == split_by_condition(examples, validation=0.25, test=0.25)
    values = np.arange(6, dtype=np.float32)
    one, other = (
        bootstrap_mean(v, confidence=c, resamples=r, seed=s)
        for v, c, r, s in (
            (values, np.float32(0.5), np.int64(50), np.int64(1)),
            (values.tolist(), 0.5, 50, 1),
        )
    )
    assert one == other
    assert distinct_n(["a b c"], np.int64(2)) == distinct_n(["a b c"], 2)
    assert self_bleu(["a b c", "a b d"], np.int64(2)) == self_bleu(["a b c", "a b d"], 2)


def test_yaml_reads_numbers_with_an_exponent_wherever_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("\ufefflearning_rate: 1e-3\nbetas: [9e-1, .5]\npair:\n  dropout: 1e-1\n  name: e1\n")
    assert read_yaml(path) == {
        "learning_rate": 1e-3,
        "betas": [0.9, 0.5],
        "pair": {"dropout": 0.1, "name": "e1"},
    }
    path.write_text("steps: 1\nsteps: 2\n")
    with pytest.raises(ValueError, match="'steps' stands twice"):
        read_yaml(path)


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, object, "\ud800"])
def test_a_pair_holds_what_a_checkpoint_can_give_back(value: Any) -> None:
    with pytest.raises(ValueError, match=r"pair is .*JSON cannot hold all"):
        TrainSettings(output="o", base="b", task="keyword", pair={"dropout": value})


def test_a_resumed_run_names_the_field_that_differs(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 0
    capsys.readouterr()
    other = json.dumps({**DECODER, "hidden_size": 32})
    assert main([*flags, f"--pair=auxiliary_config={other}", "--resume"]) == 2
    said = said_by(capsys)
    assert "pair.auxiliary_config is {'hidden_size': 32} but was {'hidden_size': 16}" in said
    assert "num_hidden_layers" not in said


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--device=nope", "device is 'nope', which PyTorch does not know"),
        ("--device=cuda:99", "device is 'cuda:99', but PyTorch"),
        ("--pair=auxiliary_config=3", "a value in pair {'auxiliary_config': 3, 'dropout': 0.0} is wrong"),
        ('--pair=auxiliary_config={"model_type": "llama", "hidden_size": 15}', "is wrong: Class validation"),
    ],
)
def test_a_setting_that_no_model_takes_is_one_line(
    flag: str, message: str, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags, flag]) == 2
    assert message in said_by(capsys)


def test_a_damaged_base_is_one_line(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "base" / "model.safetensors").write_bytes(b"{}")
    assert main(flags) == 2
    assert "base' cannot be loaded: " in said_by(capsys)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer.json"])
def test_a_damaged_checkpoint_is_named_with_what_to_do(
    name: str, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 0
    capsys.readouterr()
    (tmp_path / "out" / "checkpoint-2" / name).write_bytes(b"{")
    assert main([*flags, "--resume"]) == 2
    said = said_by(capsys)
    assert "checkpoint-2" in said
    assert "is damaged" in said
    assert "remove that folder to go on from the checkpoint before" in said
