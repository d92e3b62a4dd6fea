"""Text as it comes, and files that a killed run goes on with."""

from __future__ import annotations

import errno
import json
import random
import resource
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from auxkern.generation import stream
from auxkern.generation.completion import Completion
from auxkern.generation.request import Request
from auxkern.generation.stops import TextStream
from auxkern.generation.stream import BadLine, CompletionWriter, file_fingerprint, read_requests
from auxkern.model.text import TextFormat
from tests.support.killing import killed_sizes
from tests.support.tiny import byte_tokenizer

SENTENCES = [
    "the cat sat on the mat",
    "naïve café, 50 € — 你好世界",
    "emoji 👩‍👩‍👧 and 🙂🙃",
    "a.b, c! d? e; <s> f",
]


def bytes_format() -> TextFormat:
    return TextFormat(byte_tokenizer())


def trained_format() -> TextFormat:
    """Byte-level BPE whose tokens hold parts of characters, several characters, and words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<end>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return TextFormat(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>"))


def spaced_format() -> TextFormat:
    """In the manner of Llama 2: a space before each word, bytes for what has no token."""
    words = ["▁", "a", "▁b", "c", "▁word", "€", "�"]
    tokens = ["<unk>", "<end>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return TextFormat(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")
    )


def words_format() -> TextFormat:
    """Whole words and their parts, with spaces that the decoder writes."""
    tokens = ["[UNK]", "[END]", "cat", "##s", "dog", ".", "do", "n't"]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return TextFormat(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[END]"))


def torn_format() -> TextFormat:
    """Bytes, and tokens that hold the end of one character and the beginning of the next."""
    tokenizer = byte_tokenizer()
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # The letters that stand for the bytes of an emoji.
    ((first, second, third, fourth), _) = letters.pre_tokenize_str("🙂")[0]
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]
    for token in (second + third + fourth + first, third + fourth + first + second, fourth + first):
        vocabulary[token] = len(vocabulary)
    torn = Tokenizer(models.BPE(vocabulary, []))
    torn.decoder = decoders.ByteLevel()
    return TextFormat(PreTrainedTokenizerFast(tokenizer_object=torn, eos_token="<end>"))


FORMATS = {
    "bytes": bytes_format(),
    "trained": trained_format(),
    "spaced": spaced_format(),
    "words": words_format(),
    "torn": torn_format(),
}


def sizes(name: str) -> int:
    return len(FORMATS[name].tokenizer)


def whole_text(text_format: TextFormat, prompt_ids: list[int], ids: list[int]) -> str:
    """What follows the prompt, from one decoding of everything."""
    return text_format.decode(prompt_ids + ids)[len(text_format.decode(prompt_ids)) :]


def streamed(text: TextStream, ids: list[int]) -> list[str]:
    """The pieces of a text, up to its end."""
    pieces = []
    for token in ids:
        if text.stopped is None:
            pieces.append(text.push(token))
    return [*pieces, text.finish()]


def ended_at_once(text: TextStream, ids: list[int]) -> TextStream:
    """The text whose last half comes with its end."""
    for token in ids[: len(ids) // 2]:
        if text.stopped is None:
            text.push(token)
    text.finish(ids[len(ids) // 2 :])
    return text


def real_tokens(name: str) -> list[list[int]]:
    """Tokens of real text, characters spelled in bytes, characters torn."""
    tokenizer = FORMATS[name].tokenizer
    if name in ("bytes", "trained"):
        return [tokenizer(text)["input_ids"] for text in SENTENCES]
    if name == "spaced":
        first = tokenizer.convert_tokens_to_ids("<0x00>")
        return [[first + byte for byte in text.encode()] for text in ("€", "🙂", "aé")]
    if name == "torn":
        return [[token] * count for token in (256, 257, 258) for count in (1, 9, 30)]
    return [[2, 3], [4, 5]]


def token_streams(name: str) -> st.SearchStrategy[list[int]]:
    """Random tokens, with real ones among them, so that characters are whole now and then."""
    parts = st.lists(st.integers(0, sizes(name) - 1), max_size=30) | st.sampled_from(real_tokens(name))
    return st.lists(parts, max_size=8).map(lambda parts: [token for part in parts for token in part])


@pytest.mark.parametrize("name", FORMATS)
def test_pieces_make_the_whole_text(name: str) -> None:
    @settings(max_examples=150)
    @given(ids=token_streams(name), prompt=st.sampled_from([0, 1, 20]))
    def check(ids: list[int], prompt: int) -> None:
        text_format = FORMATS[name]
        prompt_ids = [2 + 40 % (sizes(name) - 3)] * prompt
        if name == "spaced" and prompt:
            prompt_ids[-1] = sizes(name) - 3  # a prompt that ends in bytes has no certain text
        text = TextStream(text_format, prompt_ids=prompt_ids)
        assert "".join(streamed(text, ids)) == whole_text(text_format, prompt_ids, ids) == text.text
        assert ended_at_once(TextStream(text_format, prompt_ids=prompt_ids), ids).text == text.text

    check()


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_out_stays(name: str) -> None:
    """After each token, what came so far is a beginning of every text that the tokens may become."""

    @settings(max_examples=100)
    @given(ids=token_streams(name), other=token_streams(name))
    def check(ids: list[int], other: list[int]) -> None:
        text = TextStream(FORMATS[name])
        for token in ids:
            text.push(token)
        assert FORMATS[name].decode(ids + other).startswith(text.text)

    check()


def test_characters_come_whole() -> None:
    ids = FORMATS["bytes"].tokenizer("a€🙂")["input_ids"]
    assert streamed(TextStream(FORMATS["bytes"]), ids) == ["a", "", "", "€", "", "", "", "🙂", ""]


def test_half_a_character_at_the_end_is_told() -> None:
    ids = FORMATS["bytes"].tokenizer("a🙂")["input_ids"][:-1]
    assert streamed(TextStream(FORMATS["bytes"]), ids) == ["a", "", "", "", "�"]


def test_the_space_after_a_prompt_is_kept() -> None:
    word = FORMATS["spaced"].tokenizer.convert_tokens_to_ids("▁word")
    assert "".join(streamed(TextStream(FORMATS["spaced"]), [word, word])) == "word word"
    with_prompt = TextStream(FORMATS["spaced"], prompt_ids=[1, word])
    assert "".join(streamed(with_prompt, [word, word])) == " word word"


def test_special_tokens_separate_nothing() -> None:
    spaced, plain = FORMATS["spaced"].tokenizer, FORMATS["bytes"].tokenizer
    word, end = spaced.convert_tokens_to_ids("▁word"), spaced.eos_token_id
    many = [word, *[end] * 30, word, word]
    assert "".join(streamed(TextStream(FORMATS["spaced"]), many)) == "word word word"
    first, *rest = plain("€")["input_ids"]
    parts = [first, *[plain.eos_token_id] * 30, *rest, first, *rest]
    assert "".join(streamed(TextStream(FORMATS["bytes"]), parts)) == "€€"


class CountingFormat(TextFormat):
    """Counts the tokens that are decoded."""

    count = 0

    def decode(self, ids: Any) -> str:
        self.count += len(ids)
        return super().decode(ids)


@pytest.mark.parametrize(
    ("tokens", "most"),
    [
        ("text", 20),
        ("no character at all", 20),  # 0x80, which continues nothing
        ("torn", 20),  # the end of one character and the beginning of the next in each token
        ("nothing", 20),  # special tokens
    ],
)
def test_a_long_text_costs_no_more_for_each_token(tokens: str, most: int) -> None:
    plain = FORMATS["bytes"].tokenizer
    continuation = plain.convert_tokens_to_ids("Ģ")  # ByteLevel's letter for 0x80
    tokenizer, ids = {
        "text": (plain, plain("ab cd€ 🙂")["input_ids"] * 400),
        "no character at all": (plain, [continuation] * 5000),
        "torn": (FORMATS["torn"].tokenizer, [256] * 5000),
        "nothing": (plain, [256] * 5000),
    }[tokens]
    counting = CountingFormat(tokenizer)
    expected = counting.decode(ids)
    counting.count = 0
    assert "".join(streamed(TextStream(counting), ids)) == expected
    assert counting.count <= most * len(ids)


def by_hand(text: str, stop: list[str]) -> str:
    """The text a character at a time, until it ends with a stop string."""
    for end in range(1, len(text) + 1):
        ending = [len(one) for one in stop if text[:end].endswith(one)]
        if ending:
            return text[: end - max(ending)]
    return text


@st.composite
def parts_of_text(draw: st.DrawFn) -> str:
    """A few characters of a sentence that trained tokens hold several of at a time."""
    start = draw(st.integers(0, len(SENTENCES[0]) - 1))
    return SENTENCES[0][start : start + draw(st.integers(1, 5))]


@pytest.mark.parametrize("name", ["bytes", "trained"])
def test_stop_strings_end_the_text(name: str) -> None:
    @settings(max_examples=200)
    @given(
        parts=st.lists(st.sampled_from([SENTENCES[0], "€", "at t"]) | parts_of_text(), max_size=8),
        stop=st.lists(parts_of_text() | st.sampled_from(["€a", "at€"]), max_size=4),
    )
    def check(parts: list[str], stop: list[str]) -> None:
        text = "".join(parts)
        ids = FORMATS[name].tokenizer(text)["input_ids"]
        out = TextStream(FORMATS[name], stop)
        assert "".join(streamed(out, ids)) == by_hand(text, stop) == out.text
        assert (out.stopped is not None) == (by_hand(text, stop) != text)
        at_once = ended_at_once(TextStream(FORMATS[name], stop), ids)
        assert (at_once.text, at_once.stopped) == (out.text, out.stopped)

    check()


def test_the_first_complete_stop_string_counts() -> None:
    ids = FORMATS["trained"].tokenizer("the cat sat on the mat")["input_ids"]
    assert len(ids) < 4  # " cat sat" is complete after " cat", in the same token
    for stop, left in ((("cat sat on", "sat"), "the cat "), (("t sat", "cat sat"), "the ")):
        out = TextStream(FORMATS["trained"], stop)
        assert "".join(streamed(out, ids)) == left


def test_nothing_of_a_stop_string_comes_out() -> None:
    ids = FORMATS["bytes"].tokenizer("ab end.")["input_ids"]
    out = TextStream(FORMATS["bytes"], (" end", "zzz"))
    assert [out.push(token) for token in ids[:-1]] == ["a", "b", "", "", "", ""]
    assert (out.stopped, out.text, out.finish()) == (" end", "ab", "")
    with pytest.raises(ValueError, match="after the end of the text"):
        out.push(ids[-1])


def test_what_only_looked_like_a_stop_string_comes_later() -> None:
    ids = FORMATS["bytes"].tokenizer("a ene")["input_ids"]
    assert streamed(TextStream(FORMATS["bytes"], ("ene!", "nb")), ids) == ["a", " ", "", "", "", "ene"]


def special(tokens: str) -> list[int]:
    """Ids of letters, with | for the end token."""
    plain = FORMATS["bytes"].tokenizer
    return [plain.eos_token_id if one == "|" else plain.convert_tokens_to_ids(one) for one in tokens]


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("<end>", "ab"),
        ("b<en", "a"),
        ("nd>c", "ab"),
        ("b<end>c", "a"),
        ("<end>cd<end>", "ab"),
        ("bc", "abcde"),
        ("<end><end>", "abcd"),
    ],
)
def test_stop_strings_see_special_tokens_and_the_text_does_not(stop: str, text: str) -> None:
    out = TextStream(FORMATS["bytes"], (stop,))
    assert "".join(streamed(out, special("ab|cd||e"))) == text == out.text
    assert (out.stopped is not None) == (text != "abcde")


def test_a_special_token_that_stops_leaves_what_was_spelled_in_bytes() -> None:
    spaced = FORMATS["spaced"].tokenizer
    first, end = spaced.convert_tokens_to_ids("<0x00>"), spaced.eos_token_id
    out = TextStream(FORMATS["spaced"], ("<end>",))
    assert "".join(streamed(out, [*(first + byte for byte in "🙂".encode()), end])) == "🙂"
    going_on = TextStream(FORMATS["spaced"], ("<end>!",))
    euro = [first + byte for byte in "€".encode()]
    assert "".join(streamed(going_on, [euro[0], end, *euro[1:]])) == "€"


def test_bad_stop_strings_are_refused() -> None:
    with pytest.raises(ValueError, match="empty str"):
        TextStream(FORMATS["bytes"], ("a", ""))
    with pytest.raises(TypeError, match="got the str 'end'"):
        TextStream(FORMATS["bytes"], "end")


def write_lines(path: Path, *lines: Any) -> Path:
    """Lines as they are, or as JSON."""
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def completion(request: Request, sample: int = 0) -> Completion:
    return Completion(request.id, sample, f"text of {request.prompt!r} €\n", (1, 2), "end", 1, seed=3)


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_requests_have_the_numbers_of_their_lines(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in", {"prompt": "a"}, b"", {"prompt": "b", "id": "x"}, {"prompt": "€"})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().rstrip())
    found = list(read_requests(path, Request(0, max_new_tokens=5)))
    assert [(one.id, one.prompt, one.max_new_tokens) for one in found] == [
        (1, "a", 5),
        ("x", "b", 5),
        (4, "€", 5),
    ]


def test_requests_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in", {"prompt": "a"}, b"no json")
    requests = read_requests(path)
    assert next(requests).prompt == "a"
    with pytest.raises(ValueError, match=r"in, line 2: it is not JSON"):
        next(requests)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a"', "it is not JSON: Expecting"),
        (b"[1]", "it is a JSON list; write an object"),
        (b'{"prompt": "\xff"}', "can't decode byte 0xff"),
        (b'{"prompt": "a", "prompt": "b"}', "the field 'prompt' is there twice"),
        (b'{"promt": "a"}', "did you mean 'prompt'"),
        (b'{"id": "x"}', "its id 'x' is that of line 3"),
        (b'{"id": 1}', "its id 1 is that of line 1"),
        (b'{"prompt": "' + b"a" * 200 + b'"}', "it is longer than 150 bytes"),
        (b"[" * 100_000, "longer than 150"),
        (b'{"prompt": 3}', "prompt must be a str, got int"),
        (b'{"top_k": 1' + b"0" * 100 + b"}", "a whole number has 101 digits, at most 100 are read"),
    ],
)
def test_bad_lines_are_told_and_left_out(
    tmp_path: Path, line: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "LONGEST_LINE", 150)
    bad_first = {"id": "x", "seed": -1}  # it has no right to the id
    path = write_lines(tmp_path / "in", {}, bad_first, {"id": "x"}, line, {"prompt": "last"})
    bad: list[BadLine] = []
    assert [one.id for one in read_requests(path, on_error=bad.append)] == [1, "x", 5]
    assert [one.line for one in bad] == [2, 4]
    assert message in bad[1].error


def test_deep_nesting_is_a_bad_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in", b'{"stop": ' + b"[" * 200_000, {})
    bad: list[BadLine] = []
    assert [one.id for one in read_requests(path, on_error=bad.append)] == [2]
    assert "nested too deeply" in bad[0].error


def test_numbers_of_lines_and_ids_do_not_meet(tmp_path: Path) -> None:
    lines: list[Any] = [{}, {"id": 7}, {}, {"id": 2}, {}, {"id": 5}, {}, {"id": "3"}, {"id": 3}, {"id": 100}]
    bad: list[BadLine] = []
    path = write_lines(tmp_path / "in", *lines)
    assert [one.id for one in read_requests(path, on_error=bad.append)] == [1, 7, 3, 2, 5, "3", 100]
    assert [(one.line, one.error.split("of line ")[1][0]) for one in bad] == [(6, "5"), (7, "2"), (9, "3")]


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        next(read_requests(tmp_path / "none"))


def test_lines_are_there_as_soon_as_they_are_written(tmp_path: Path) -> None:
    with CompletionWriter(tmp_path / "out", run={}) as writer:
        for number in range(3):
            writer.write(completion(Request(number)))
            assert len(records(tmp_path / "out")) == number + 1


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    requests = [Request("a", samples=3), Request(1), Request("1")]
    with CompletionWriter(tmp_path / "out", run={"seed": 1}) as writer:
        assert list(writer.pending(requests)) == [
            (requests[0], (0, 1, 2)),
            (requests[1], (0,)),
            (requests[2], (0,)),
        ]
        writer.write(completion(requests[0], 1))
        writer.write(completion(requests[1]))
    with CompletionWriter(tmp_path / "out", run={"seed": 1}) as writer:
        assert writer.done == 2
        assert list(writer.pending(requests)) == [(requests[0], (0, 2)), (requests[2], (0,))]


def test_a_run_goes_on_wherever_its_output_was_cut(tmp_path: Path) -> None:
    requests = [Request(number, prompt=f"€{number}") for number in range(2)]
    path = tmp_path / "out"

    def run() -> None:
        with CompletionWriter(path, tmp_path / "errors", run={}) as writer:
            for request, samples in writer.pending(requests):
                for sample in samples:
                    writer.write(completion(request, sample))
            for line in (3, 8):
                writer.report(BadLine(line, "é"))

    run()
    whole, errors = path.read_bytes(), (tmp_path / "errors").read_bytes()
    assert len(records(path)) == 2
    assert records(tmp_path / "errors") == [{"line": 3, "error": "é"}, {"line": 8, "error": "é"}]
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        (tmp_path / "errors").write_bytes(errors[: size % len(errors)])
        run()
        assert path.read_bytes() == whole
        assert (tmp_path / "errors").read_bytes() == errors


def test_an_output_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with CompletionWriter(path, run={"model": "m", "defaults": {"seed": 1}}):
        pass  # it holds no line, so another run may take it
    with CompletionWriter(path, run={"model": "m", "defaults": {"seed": 2}}) as writer:
        writer.write(completion(Request(1)))
    kept = path.read_bytes()
    with pytest.raises(ValueError, match=r"begun with defaults\.seed 2, but this run has 3"):
        CompletionWriter(path, run={"model": "m", "defaults": {"seed": 3}})
    with pytest.raises(ValueError, match=r"begun with model 'm', but this run has None"):
        CompletionWriter(path, run={"defaults": {"seed": 2}})
    (tmp_path / "out.run.json").write_text("{")
    with pytest.raises(ValueError, match=r"out.run.json is not JSON"):
        CompletionWriter(path, run={})
    (tmp_path / "out.run.json").unlink()
    with pytest.raises(ValueError, match=r"out.run.json is missing"):
        CompletionWriter(path, run={})
    assert path.read_bytes() == kept


def test_the_run_is_known_by_its_input(tmp_path: Path) -> None:
    first, second = write_lines(tmp_path / "a", {"id": 1}), write_lines(tmp_path / "b", {"id": 2})
    assert file_fingerprint(first) != file_fingerprint(second)
    # sha256sum's figure for the line {"id": 1}
    assert file_fingerprint(first) == "82b0cf5da91b6a7e02f031e2da2fa5ed1261dce4c85ae20d63db9d1e84a4c384"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"\0\0\0", "line 2 is damaged"),
        (b"[]", "line 2 is no object"),
        (b'{"id": 5}', "line 2, field 'sample'"),
        (b'{"id": {}, "sample": 0}', "line 2, field 'id'"),
        (b'{"id": 1, "sample": 0}', "line 2: sample 0 of request 1 is there twice"),
    ],
)
def test_a_damaged_output_is_refused(tmp_path: Path, line: bytes, message: str) -> None:
    with CompletionWriter(tmp_path / "out", run={}) as writer:
        writer.write(completion(Request(1)))
    whole = (tmp_path / "out").read_bytes()
    (tmp_path / "out").write_bytes(whole + line + b"\n")
    with pytest.raises(ValueError, match=message):
        CompletionWriter(tmp_path / "out", run={})
    assert (tmp_path / "out").read_bytes() == whole + line + b"\n"


def test_one_process_writes(tmp_path: Path) -> None:
    with (
        CompletionWriter(tmp_path / "out", run={}),
        pytest.raises(ValueError, match="another process writes"),
    ):
        CompletionWriter(tmp_path / "out", run={})
    CompletionWriter(tmp_path / "out", run={}).close()


def test_errors_need_a_file_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="path and errors_path are both"):
        CompletionWriter(tmp_path / "out", tmp_path / "out", run={})
    with (
        CompletionWriter(tmp_path / "out", run={}) as writer,
        pytest.raises(ValueError, match="no errors_path"),
    ):
        writer.report(BadLine(1, "bad"))


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    requests = [Request(number) for number in range(9)]
    path = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with CompletionWriter(path, run={}) as writer:
        writer.write(completion(requests[0]))
        size = path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size * 7 // 2, hard))
        try:
            for request in requests[1:3]:
                writer.write(completion(request))
            with pytest.raises(OSError, match="all lines before are whole: make room") as caught:
                writer.write(completion(requests[3]))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert caught.value.errno == errno.EFBIG
        assert caught.value.filename == str(path)
        assert path.stat().st_size == 3 * size
        with pytest.raises(ValueError, match="is closed"):
            writer.write(completion(requests[3]))
    with CompletionWriter(path, run={}) as writer:
        for request, _ in writer.pending(requests):
            writer.write(completion(request))
    assert [record["id"] for record in records(path)] == list(range(9))


KILLED = """
    import time
    from auxkern.generation import Completion, CompletionWriter, Request, read_requests

    def run(folder, order):
        out, errors = folder / "out", folder / "errors"
        with CompletionWriter(out, errors, run={"seed": 1}, sync_seconds=0.05) as writer:
            ready = []
            for request, samples in writer.pending(read_requests(folder / "in", on_error=writer.report)):
                ready += [(request, sample) for sample in samples]
                while len(ready) > 20:  # they end in another order than they began
                    answer(writer, *ready.pop(order.randrange(len(ready))))
            for one in ready:
                answer(writer, *one)

    def answer(writer, request, sample):
        time.sleep(2e-4)
        text = request.prompt * (request.seed % 50)
        writer.write(Completion(request.id, sample, text, (1, sample), "end", 1, seed=request.seed))
"""


def test_killed_runs_write_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    draw = random.Random(0)
    lines: list[Any] = []
    for number in range(1, 2001):
        line: Any = {"prompt": f"{number}€ ", "samples": draw.choice([1, 1, 2])}
        if draw.random() < 0.3:
            line["id"] = f"r{number}"
        lines.append(line if draw.random() > 0.01 else b'{"prompt": 1}')
    folders = [tmp_path / "once", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
        write_lines(folder / "in", *lines)
    assert len(killed_sizes(KILLED, *folders, kills=10)) >= 5  # they were in the middle
    outputs = [sorted((folder / "out").read_bytes().splitlines()) for folder in folders]
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) > 2000
    errors = [(folder / "errors").read_bytes().splitlines() for folder in folders]
    assert errors[0] == errors[1]
    assert len(errors[0]) == lines.count(b'{"prompt": 1}') > 0
