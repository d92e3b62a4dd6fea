"""``python -m auxkern.bench --op generate`` on a tiny pair."""

import json

import pytest
import torch
from pairs import tiny_lm_for, tiny_pair
from tiny import byte_tokenizer

from auxkern.bench import __main__ as bench
from auxkern.bench import generate, generate_peers
from auxkern.model import TextFormat


@pytest.fixture
def work():
    tokenizer = byte_tokenizer()
    lm = tiny_lm_for(tokenizer)
    model = tiny_pair("shared head, features, pointer", lm, lm_layers=[])
    conditions, prompts = [*"abcdef"], ["", "x", "", "yy", "", "z"]
    lengths = [3, 9, 1, 5, 7, 2]
    return generate_peers.Work(
        model, TextFormat(tokenizer), conditions, prompts, lengths, model.lm, model.auxiliary
    )


def test_every_way_is_measured_and_written_down(work, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(generate, "made_work", lambda count, device: work)
    path = tmp_path / "generate.json"
    arguments = ["--op", "generate", "--batch", "2", "4", "--json", str(path), "--device", "cpu"]
    assert bench.main(arguments) == 0
    record = json.loads(path.read_text())
    names = ["engine", "two-model loop", "generate, LM alone", "generate, pair"]
    found = [(one["implementation"], one["batch"]) for one in record["results"]]
    assert found == [(name, batch) for batch in (2, 4) for name in names]
    for one in record["results"]:
        assert one["tokens"] == sum(work.lengths)
        assert one["seconds"] > 0
    shares = record["results"][0]["shares"]
    assert set(shares) == {"LM", "heads", "auxiliary", "sampling", "rest"}
    assert sum(shares.values()) == pytest.approx(1)
    assert all(share >= 0 for share in shares.values())
    out = capsys.readouterr().out
    assert "two-model loop" in out
    assert "continuous batching of the LM alone does not run here" in out


def test_wrong_texts_are_not_timed(work, monkeypatch, tmp_path, capsys):
    real = generate.engine

    def wrong(work, slots):
        made = real(work, slots)
        made._table.advance, advance = lambda: None, made._table.advance  # columns are written over
        assert advance is not None
        return made

    monkeypatch.setattr(generate, "made_work", lambda count, device: work)
    monkeypatch.setattr(generate, "engine", wrong)
    assert generate.main(["--json", str(tmp_path / "x.json"), "--device", "cpu"]) == 1
    assert "are wrong" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_the_loop_computes_the_pairs_logits(work, monkeypatch):
    """The peer is given its due: its logits are the sum, and it stops where the longest text does."""
    seen = []

    def first(scores, count):
        seen.append(scores)
        return scores.argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", first)
    monkeypatch.setattr(generate_peers, "FILTERS", {"temperature": 1.0, "top_k": 1, "top_p": 1.0})
    rows = [1, 3]
    generate_peers.two_model_loop(work, rows)
    greedy = work.model.generate(
        **generate_peers.encoded(work, rows), do_sample=False, max_new_tokens=9, eos_token_id=None
    )
    drawn = torch.stack([scores.argmax(-1) for scores in seen], 1)
    assert torch.equal(drawn, greedy[:, -9:])
