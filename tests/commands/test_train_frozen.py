"""``auxkern train --frozen``: one auxiliary on top of others that were trained before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from auxkern import cli
from auxkern.commands.train import main
from auxkern.model import AuxTunedForCausalLM, load_base, load_tokenizer
from auxkern.model.text import TextFormat
from auxkern.training.checkpoint import checkpoint_steps
from auxkern.training.collator import AuxCollator
from auxkern.training.examples import encode, read_jsonl
from auxkern.training.frozen import hold_frozen
from tests.support.launching import launch, outputs
from tests.support.tiny import DECODER, tiny_lm, word_tokenizer

WORDS = [f"w{i}" for i in range(60)]
PAIR = {"auxiliary_config": {**DECODER, "num_hidden_layers": 1}, "pointer": True}
SETTINGS = {"steps": 4, "batch_size": 4, "learning_rate": 0.005, "eval_every": 2, "save_every": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, data, settings (run.yaml) and the auxiliary first/, trained on the base alone."""
    root = tmp_path_factory.mktemp("trained")
    word_tokenizer(WORDS, eos_token="<eos>", unk_token="<unk>").save_pretrained(root / "base")
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    tiny_lm(initializer_range=0.02, **ids).save_pretrained(root / "base")
    for name, count, start in (("train", 20, 0), ("validation", 9, 50)):
        lines = []
        for i in range(count):
            text = [WORDS[(start + i) % 60], *(WORDS[(i * j) % 60] for j in range(2, 3 + i % 5))]
            conditions = {"first": text[0], "unused": ""}
            lines.append({"condition": text[-1], "text": " ".join(text), "conditions": conditions})
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        # For the first auxiliary its word is the condition, in today's form.
        own = [{"condition": line["conditions"]["first"], "text": line["text"]} for line in lines]
        (root / f"{name}_first.jsonl").write_text("".join(json.dumps(line) + "\n" for line in own))
    settings = {
        **SETTINGS,
        "base": str(root / "base"),
        "train_file": str(root / "train.jsonl"),
        "validation_file": str(root / "validation.jsonl"),
        "pair": {**PAIR, "lm_layers": [1]},
    }
    first = {
        **settings,
        "output": str(root / "first"),
        "train_file": str(root / "train_first.jsonl"),
        "validation_file": str(root / "validation_first.jsonl"),
        "pair": {**PAIR, "lm_layers": [2]},
    }
    (root / "first.yaml").write_text(yaml.safe_dump(first))
    assert main(["--config", str(root / "first.yaml")]) == 0
    on_top = {**settings, "frozen": {"first": f"{root / 'first'}:0.5"}}
    (root / "run.yaml").write_text(yaml.safe_dump(on_top))
    return root


def evaluations(output: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line.get("evaluation")]


def test_an_auxiliary_is_trained_on_top_of_another(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (trained / "first" / "model.safetensors").read_bytes()
    out = tmp_path / "out"
    assert main(["--config", str(trained / "run.yaml"), "--output", str(out)]) == 0
    assert f"on top of   first ({trained / 'first'}, weight 0.5)" in capsys.readouterr().out
    assert (trained / "first" / "model.safetensors").read_bytes() == before

    # What was saved, beside what it was trained on, gives the best evaluation again.
    lm, tokenizer = load_base(str(trained / "base")), load_tokenizer(str(trained / "base"))
    with pytest.warns(UserWarning, match="was trained in a sum with other auxiliaries"):
        model = AuxTunedForCausalLM.from_pretrained(out, lm=lm).eval()
    text_format = TextFormat(tokenizer)
    model.config.on_top_of = {}
    formats = hold_frozen(model, {"first": f"{trained / 'first'}:0.5"}, text_format)
    batch = AuxCollator(0)([*encode(read_jsonl(trained / "validation.jsonl"), text_format, frozen=formats)])
    best = min(line["nll"] for line in evaluations(out))
    with torch.no_grad():
        assert model(**batch).loss.item() == pytest.approx(best, rel=1e-5)
        del batch["frozen"]
        assert model(**batch).loss.item() != pytest.approx(best, rel=1e-5)


def test_the_flag_beats_the_file_name_by_name(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--frozen", "first=a/b:-2", "--frozen", "second=c", "--output", "o"]
    assert main(["--config", str(trained / "run.yaml"), *flags, "--show"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["frozen"] == {"first": "a/b:-2", "second": "c"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--frozen", "first=missing"], "frozen 'first': there is no folder missing"),
        (["--frozen", "first={root}/base"], "holds a model of type 'llama', not an auxiliary"),
        (["--frozen", "a={root}/first", "--frozen", "a={root}/first"], "frozen has 'a' twice"),
        (["--frozen", "first={root}/first:nan"], "frozen 'first' has the weight nan; give a finite number"),
        (["--frozen", "first"], "'first' is not NAME=VALUE"),
        (["--output", "{root}/first", "--resume"], "where this run writes to"),
        (["--frozen", "second={root}/first"], "train.jsonl, line 1: there is no condition for 'second'"),
        (["--pair", "text_prefix=' '"], "was trained with text_prefix '', but here it is ' '"),
    ],
)
def test_bad_frozen_auxiliaries_are_refused_before_anything_is_written(
    flags: list[str], message: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [flag.format(root=trained) for flag in flags]
    try:
        status = main(["--config", str(trained / "run.yaml"), "--output", str(tmp_path / "out"), *given])
    except SystemExit as exit:
        status = exit.code  # type: ignore[assignment]
    assert status == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_a_frozen_auxiliary_of_another_base_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(trained / "base", tmp_path / "base")
    lm = load_base(str(other))
    lm.lm_head.weight.data[5, 3] += 0.5
    lm.save_pretrained(other)
    flags = ["--config", str(trained / "run.yaml"), "--output", str(tmp_path / "out"), "--base", str(other)]
    assert main(flags) == 2
    assert "the auxiliary was made for a base with fingerprint" in capsys.readouterr().err


def test_a_run_on_top_of_another_is_resumed_where_the_other_has_moved(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, moved = tmp_path / "out", shutil.copytree(trained / "first", tmp_path / "moved")
    flags = ["--config", str(trained / "run.yaml"), "--output", str(out), "--schedule", "constant"]
    assert main(flags) == 0
    on = [*flags, "--resume", "--steps", "6"]
    assert main([*on, "--frozen", f"first={moved}:0.6"]) == 2
    assert "is of another model: on_top_of.first is {'weight': 0.6} but was" in capsys.readouterr().err
    assert main([*on, "--frozen", f"first={moved}:0.5"]) == 0
    assert checkpoint_steps(out)[-1] == 6


def test_cached_states_train_the_same_and_run_nothing_that_is_frozen(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--config", str(trained / "run.yaml"), "--states-folder", str(tmp_path / "states")]
    stored = [*flags, "--cache-states", "--states-dtype", "float32"]
    assert main([*flags, "--output", str(tmp_path / "plain")]) == 0
    assert main([*stored, "--output", str(tmp_path / "stored")]) == 0
    said = capsys.readouterr().out
    for what in ("the base", "first"):
        for side in ("training", "validation"):
            assert f"states of {what} for {side}: " in said
    for a, b in zip(*(evaluations(tmp_path / name) for name in ("plain", "stored")), strict=True):
        # Batches of other shapes: float32 sums in another order, through four steps of AdamW.
        assert b["nll"] == pytest.approx(a["nll"], rel=1e-4)
        assert b["lm_nll"] == pytest.approx(a["lm_nll"], rel=1e-5)

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("what is frozen has run")

    for module in ("auxkern.model.frozen.frozen_output", "auxkern.training.lm_states.run_base"):
        monkeypatch.setattr(module, refused)
    assert main([*stored, "--output", str(tmp_path / "again")]) == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("stored", "again"))
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items())


@pytest.mark.parametrize("more", ["--cache-states", "--no-cache-states"])
def test_processes_that_share_a_run_on_top_of_another_make_the_run_of_one(
    trained: Path, tmp_path: Path, more: str
) -> None:
    batches = ["--batch-size", "2", "--gradient-accumulation", "3", "--device", "cpu"]
    command = ["train", "--config", str(trained / "run.yaml"), *batches, more]
    two = ["--output", str(tmp_path / "two"), "--states-folder", str(tmp_path / "states of two")]
    process = launch(2, ["-m", "auxkern", *command, *two])
    one = ["--output", str(tmp_path / "one"), "--states-folder", str(tmp_path / "states")]
    assert cli.main([*command, *one]) == 0
    outputs(process)
    nlls = [[line["nll"] for line in evaluations(tmp_path / name)] for name in ("one", "two")]
    # Sums in another order; AdamW divides by roots of tiny squares.
    assert nlls[1] == pytest.approx(nlls[0], rel=1e-3)
    assert len(nlls[0]) == 3  # one before the first step
