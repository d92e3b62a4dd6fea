"""Sources of texts: what they read, and what they say about files that they cannot."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from auxkern.tasks.sources import Austen, HubDataset, JsonLines, Record, TextFile, WordNet, source_from
from auxkern.tasks.wordnet import FILES


def texts(source):
    return [(record.text, record.condition) for record in source.records()]


def test_a_text_file_has_a_text_a_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone  text\r\n\n \t\nnaïve\u2028end\nlast".encode())
    place = f"{path}, line"
    assert list(TextFile(path).records()) == [
        Record("one  text", None, f"{place} 1"),
        Record("naïve\u2028end", None, f"{place} 4"),
        Record("last", None, f"{place} 5"),
    ]


def test_json_lines_have_fields(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"word": " cat ", "gloss": "an animal\n", "id": 3}, {"word": "dog", "gloss": "  "}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert texts(JsonLines(path, text="gloss", condition="word")) == [("an animal", "cat")]
    assert texts(JsonLines(path, text="gloss")) == [("an animal", None)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"}', r"line 2 has no field 'word' but 'text'; name the field with \?condition=FIELD"),
        (b"{}", r"line 2 has no field 'text' but none; name the field with \?text=FIELD"),
        (b"[1]", "line 2 holds a list"),
        (b"{", "line 2 is not JSON"),
        (b'{"text": 3, "word": "a"}', "line 2: the field 'text' holds 3; text must be a string"),
        (b'{"text": "a", "word": " "}', "line 2: the field 'word' is blank"),
        (b'{"text": "\xff"}', "line 2 is not UTF-8"),
    ],
)
def test_a_bad_line_is_named(line, message, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a", "word": "b"}\n' + line)
    with pytest.raises(ValueError, match=message):
        texts(JsonLines(path, condition="word"))


def test_wordnet_gives_each_usage_example_once(tmp_path):
    for name in FILES:
        (tmp_path / name).write_text('00001740 03 n 01 kit 0 000 | a case; "his kit"; "her kit"  \n')
    assert texts(WordNet(tmp_path)) == [("his kit", None), ("her kit", None)]


def test_a_spelling_names_a_source():
    assert source_from("wordnet") == WordNet()
    assert source_from("wordnet:/a/b") == WordNet(Path("/a/b"))
    assert source_from("austen") == Austen()
    assert source_from("austen:/a/b") == Austen(Path("/a/b"))
    assert source_from("text:what? a&b.txt") == TextFile(Path("what? a&b.txt"))
    assert source_from("jsonl:a.jsonl") == JsonLines(Path("a.jsonl"))
    assert source_from("jsonl:a:b.jsonl?text=the%20gloss&condition=word") == JsonLines(
        Path("a:b.jsonl"), text="the gloss", condition="word"
    )
    assert source_from("datasets:owner/name?split=test&config=en&text=sentence") == HubDataset(
        "owner/name", config="en", split="test", text="sentence"
    )


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("", "source is ''; write wordnet"),
        ("a.txt", "source is 'a.txt'"),
        ("text:", "source is 'text:'"),
        ("wordnet:", "source is 'wordnet:'"),
        ("austen:", "source is 'austen:'"),
        ("csv:a.csv", "source is 'csv:a.csv'"),
        ("jsonl:?text=a", "source is 'jsonl:"),
        ("jsonl:a?field=a", "the option 'field' is unknown; known are text, condition"),
        ("jsonl:a?split=a", "the option 'split' is unknown"),
        ("jsonl:a?path=b", "the option 'path' is unknown"),
        ("jsonl:a?text=", "the option 'text' has no value"),
        ("jsonl:a?text", "bad query field"),
        ("jsonl:a?text=a&text=b", "an option stands twice"),
    ],
)
def test_other_spellings_are_refused(spelling, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        source_from(spelling)


def test_a_source_that_is_no_string_is_refused():
    with pytest.raises(TypeError, match="source must be a str, got PosixPath"):
        source_from(Path("a.txt"))


def test_datasets_is_imported_when_records_are_asked_for(monkeypatch):
    # None makes an import fail even where the package is installed.
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    source = source_from("datasets:some")
    with pytest.raises(ModuleNotFoundError, match="datasets:some needs the package datasets; pip install"):
        next(source.records())


@pytest.fixture
def datasets(monkeypatch):
    """A stand-in for the package, which remembers how it was called."""
    module = types.ModuleType("datasets")
    module.__spec__ = types.SimpleNamespace(name="datasets")
    rows = [{"sentence": "a text", "word": "text"}]
    module.calls = []

    def load_dataset(*args, **options):
        module.calls.append((args, options))
        return rows

    def load_from_disk(path):
        module.calls.append(path)
        return rows if Path(path, "state.json").is_file() else {"test": rows}

    module.load_dataset, module.load_from_disk = load_dataset, load_from_disk
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_a_dataset_is_loaded_by_name(datasets):
    source = HubDataset("owner/name", config="en", split="dev", text="sentence", condition="word")
    assert list(source.records()) == [Record("a text", "text", "owner/name, split dev, row 0")]
    assert datasets.calls == [(("owner/name", "en"), {"split": "dev"})]
    with pytest.raises(ValueError, match="row 0 has no field 'text' but 'sentence', 'word'"):
        texts(HubDataset("owner/name"))


def test_a_saved_dataset_is_read_from_its_folder(datasets, tmp_path):
    (tmp_path / "state.json").write_text("{}")
    assert texts(HubDataset(str(tmp_path), text="sentence")) == [("a text", None)]
    (tmp_path / "state.json").rename(tmp_path / "dataset_dict.json")
    assert texts(HubDataset(str(tmp_path), split="test", text="sentence")) == [("a text", None)]
    with pytest.raises(ValueError, match="has the splits test, not 'train'"):
        texts(HubDataset(str(tmp_path)))
    assert datasets.calls == [str(tmp_path)] * 3
