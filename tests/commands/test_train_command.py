"""``auxkern train`` with a tiny random base: settings, refusals, cached states, resumption."""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from auxkern import cli
from auxkern.commands.train import main
from auxkern.model import AuxTunedForCausalLM, load_base, load_tokenizer
from auxkern.model.text import TextFormat
from auxkern.training.checkpoint import checkpoint_steps
from auxkern.training.collator import AuxCollator
from auxkern.training.examples import encode, read_jsonl
from auxkern.training.loop import train
from auxkern.training.settings import LoopSettings, TrainSettings, settings_from
from tests.support.launching import launch, outputs
from tests.support.tiny import DECODER, tiny_lm, word_tokenizer

WORDS = [f"w{i}" for i in range(60)]
PAIR = {
    "auxiliary_config": {**DECODER, "num_hidden_layers": 1},
    "lm_layers": [1],
    "dropout": 0.1,
    "pointer": True,
}
DATA = {"base": "b", "output": "o", "train_file": "t", "validation_file": "v"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    word_tokenizer(WORDS, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    tiny_lm(initializer_range=0.02, **ids).save_pretrained(folder)
    return folder


@pytest.fixture
def config(base: Path, tmp_path: Path) -> Path:
    """A YAML file for a small run; each text begins with its condition."""
    for name, count, start in (("train", 40, 0), ("validation", 9, 50)):
        lines = []
        for i in range(count):
            text = [WORDS[(start + i) % 60], *(WORDS[(i * j) % 60] for j in range(2, 3 + i % 5))]
            lines.append(
                json.dumps({"condition": text[0], "text": " ".join(text), "prompt": "w1" if i % 2 else ""})
            )
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    settings = {
        "base": str(base),
        "output": str(tmp_path / "out"),
        "train_file": str(tmp_path / "train.jsonl"),
        "validation_file": str(tmp_path / "validation.jsonl"),
        "states_folder": str(tmp_path / "states"),
        "pair": PAIR,
        "steps": 8,
        "batch_size": 4,
        "learning_rate": "5e-3",  # YAML reads 5e-3 as text
        "eval_every": 4,
        "save_every": 3,
        "log_every": 2,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings).replace("'5e-3'", "5e-3"))
    return path


def weights(output: Path) -> dict[str, bytes]:
    last = output / f"checkpoint-{checkpoint_steps(output)[-1]}"
    return {name: (last / name).read_bytes() for name in ("model.safetensors", "optimizer.safetensors")}


def log(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


# --------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"learning_rat": 1}, ValueError, "no setting 'learning_rat'; did you mean 'learning_rate'"),
        ({"base": None}, TypeError, "base must be text, got None"),
        ({"steps": 0}, ValueError, "steps must be 1 or more, got 0"),
        ({"steps": 1.5}, TypeError, "steps must be an integer, got 1.5"),
        ({"steps": True}, TypeError, "steps must be an integer, got True"),
        ({"steps": 5, "warmup_steps": 6}, ValueError, "warmup_steps is 6 but steps is 5"),
        ({"learning_rate": 0}, ValueError, "learning_rate must be above 0"),
        ({"learning_rate": "fast"}, TypeError, "learning_rate must be a number, got 'fast'"),
        ({"weight_decay": float("nan")}, ValueError, "weight_decay must be finite"),
        ({"schedule": "cosin"}, ValueError, "schedule must be one of constant, linear, cosine, got 'cosin'"),
        ({"betas": [0.9]}, TypeError, r"betas must be 2 numbers, got \[0.9\]"),
        ({"betas": [0.9, 1.0]}, ValueError, "betas must be below 1.0, got 1.0"),
        ({"shuffle": "yes"}, TypeError, "shuffle must be true or false, got 'yes'"),
        ({"pair": ["pointer"]}, TypeError, "pair must be a mapping"),
        ({"pair": {"condition_template": "x"}}, ValueError, "a setting of its own; use condition_template"),
        ({"pair": {"base_model_name_or_path": "x"}}, ValueError, "a setting of its own; use base"),
        ({"task": "wordnet-keywords"}, ValueError, "leave train_file and validation_file out"),
        ({"validation_file": None}, ValueError, "no validation data: pass validation_file"),
        ({"train_file": None}, ValueError, "no training data: pass train_file or task"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TrainSettings.from_mapping({**DATA, **changes})


def test_a_required_setting_is_named() -> None:
    with pytest.raises(ValueError, match="the setting 'base' is missing: frozen language model"):
        TrainSettings.from_mapping({name: value for name, value in DATA.items() if name != "base"})


def test_the_yaml_that_is_shown_reads_back_as_the_same_settings(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ["--betas", "0.8", "0.9", "--pair", "lm_layers=[3, 1]", "--pair", "head=shared", "--no-shuffle"]
    arguments = [part for name, value in DATA.items() for part in (f"--{name.replace('_', '-')}", value)]
    assert main([*arguments, *flags, "--learning-rate", "1e-5", "--show"]) == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    expected = TrainSettings(
        **DATA,
        betas=(0.8, 0.9),
        pair={"lm_layers": [3, 1], "head": "shared"},
        shuffle=False,
        learning_rate=1e-5,
    )
    assert settings_from(argparse.Namespace(), tmp_path / "shown.yaml") == expected


def test_a_flag_beats_the_file_and_pair_is_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        yaml.safe_dump({**DATA, "steps": 7, "seed": 3, "pair": {"pointer": True, "dropout": 0.5}})
    )
    assert main(["--config", str(path), "--steps", "9", "--pair", "dropout=0", "--show"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["steps"], shown["seed"], shown["pair"]) == (9, 3, {"pointer": True, "dropout": 0})


def test_what_depends_on_the_data_is_shown_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [part for name, value in DATA.items() for part in (f"--{name.replace('_', '-')}", value)]
    assert main([*arguments, "--show"]) == 0
    shown = capsys.readouterr().out
    for name in ("steps", "learning_rate", "warmup_steps", "weight_decay", "eval_every"):
        assert f"(default: from the amount of data)\n{name}: null\n" in shown


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config", "missing.yaml"], "missing.yaml does not exist"),
        (["--train-file", "missing.jsonl"], "train_file: missing.jsonl does not exist"),
        (["--base", "."], "the base '.' cannot be loaded: "),
        (["--base", "pip:other"], "'pip:other'"),
        (["--pair", "pointr=true"], "AuxTunedConfig has no field 'pointr'; did you mean 'pointer'?"),
        (["--pair", "auxiliary={}"], "AuxTunedConfig has no field 'auxiliary'"),
        (["--pair", "dropout=much"], "a value in pair"),
        (["--pair", "lm_layers=[9]"], "lm_layers"),
        (["--condition-template", "keyword"], "condition_template"),
        (["--task", "wordnet-keywords"], "leave train_file and validation_file out"),
        (["--stepz", "3"], "unrecognized arguments: --stepz"),
        (["--steps", "many"], "argument --steps"),
    ],
)
def test_bad_options_give_one_line_and_leave_nothing(
    flags: list[str],
    message: str,
    config: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = sorted(tmp_path.rglob("*"))
    arguments = flags if "--config" in flags else ["--config", str(config), *flags]
    try:
        status = main(arguments)
    except SystemExit as exit:
        status = exit.code  # type: ignore[assignment]
    assert status == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("auxkern train: ")]
    assert len(said) == 1
    assert message in said[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_line_of_data_that_is_wrong_is_named(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "train.jsonl").open("a") as lines:
        lines.write('{"condition": "w1"}\n')
    assert main(["--config", str(config)]) == 2
    assert "train.jsonl" in (said := capsys.readouterr().err)
    assert "41" in said
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------- whole runs


def test_it_trains_saves_and_says_what_came_of_it(
    config: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (base / "model.safetensors").read_bytes()
    assert cli.main(["train", "--config", str(config)]) == 0
    said = capsys.readouterr().out
    out = tmp_path / "out"
    assert "40 examples" in said
    assert f"auxkern generate {out} --condition w50" in said
    lines = log(out)
    assert [line["step"] for line in lines] == [0, 2, 4, 4, 6, 8, 8]
    final = next(line for line in lines[::-1] if line.get("evaluation"))

    lm, tokenizer = load_base(str(base)), load_tokenizer(str(base))
    model = AuxTunedForCausalLM.from_pretrained(out, lm=lm).eval()
    batch = AuxCollator(0)([*encode(read_jsonl(tmp_path / "validation.jsonl"), TextFormat(tokenizer))])
    best = min(line["nll"] for line in lines if line.get("evaluation"))
    with torch.no_grad():
        assert model(**batch).loss.item() == pytest.approx(best, rel=1e-5)
        logits = lm(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    alone = F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), batch["labels"][:, 1:].flatten()).item()
    assert final["lm_nll"] == pytest.approx(alone, rel=1e-5)
    assert best < alone - 0.1
    assert f"{alone:.4f}" in said
    assert f"{best:.4f}" in said
    assert "gain over the base " in said
    assert "9 validation examples tell little" in said
    assert (base / "model.safetensors").read_bytes() == before
    assert not [path for path in out.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_what_is_left_open_is_chosen_once_from_the_amount_of_data(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = yaml.safe_load(config.read_text())
    for name in ("steps", "learning_rate", "eval_every"):
        del given[name]
    del given["pair"]["dropout"]
    config.write_text(yaml.safe_dump(given))
    assert main(["--config", str(config), "--train-examples", "30"]) == 0
    said = capsys.readouterr().out
    newest = tmp_path / "out" / f"checkpoint-{checkpoint_steps(tmp_path / 'out')[-1]}" / "trainer.json"
    saved = json.loads(newest.read_text())["settings"]
    assert saved["pair"]["dropout"] > 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dropout"] == saved["pair"]["dropout"]
    written = {**saved, "dropout": saved["pair"]["dropout"]}
    names = ("steps", "learning_rate", "warmup_steps", "weight_decay", "eval_every", "dropout")
    chosen = ", ".join(f"{name} {written[name]:g}" for name in names)
    assert f"defaults    {chosen}, from the amount of data" in said
    # As an older version wrote it: the run keeps what it was begun with.
    trainer = json.loads(newest.read_text())
    del trainer["settings"]["pair"]["dropout"], trainer["settings"]["patience"]
    trainer["settings"]["weight_decay"] = 0.125
    trainer["model"]["dropout"] = 0.0
    newest.write_text(json.dumps(trainer))
    assert main(["--config", str(config), "--train-examples", "30", "--resume"]) == 0
    assert "weight_decay 0.125, " in capsys.readouterr().out


def test_a_run_that_learns_nothing_ends_as_the_base_and_says_so(
    config: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(config), "--learning-rate", "2", "--eval-every", "100"]) == 0
    out = capsys.readouterr().out
    assert "no gain over the base; no step was better than step 0, whose weights the model has" in out
    assert "try a lower learning_rate (it is 2)" in out
    model = AuxTunedForCausalLM.from_pretrained(tmp_path / "out", lm=load_base(str(base))).eval()
    assert not model.head.weight.any()
    before = weights(tmp_path / "out"), log(tmp_path / "out")
    assert main(["--config", str(config), "--learning-rate", "2", "--eval-every", "100", "--resume"]) == 0
    assert (weights(tmp_path / "out"), log(tmp_path / "out")) == before
    assert "no gain over the base; no step was better than step 0" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_is_said_and_leaves_the_best_weights(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--learning-rate", "1e30", "--max-grad-norm", "0", "--eval-every", "100"]
    assert main(["--config", str(config), *flags]) == 1
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("auxkern train: ")]
    assert "try a lower learning_rate (it is 1e+30)" in said
    assert f"{tmp_path / 'out'} holds the best weights so far, of step 0" in said
    assert not load_file(tmp_path / "out" / "model.safetensors")["head.weight"].any()


def test_validation_examples_that_are_trained_on_are_said(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained_on = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    with (tmp_path / "validation.jsonl").open("a") as lines:
        lines.writelines([trained_on[7], trained_on[3]])
    assert main(["--config", str(config)]) == 0
    said = (
        f"2 of 11 validation examples also stand in the training set, such as {tmp_path / 'validation.jsonl'}"
    )
    assert f"{said}, line 10: " in capsys.readouterr().err


@pytest.mark.parametrize("layers", ["[1]", "[]", "[1,3]"])
def test_cached_states_train_the_same_and_run_the_base_once(
    layers: str, config: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    forward = LlamaForCausalLM.forward
    body = type(
        LlamaForCausalLM(LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).model
    )
    body_forward = body.forward

    @functools.wraps(body_forward)  # a base's signature says how it takes its cache
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.config.hidden_size == 32:  # the base's, not the auxiliary's
            calls.append(kwargs["input_ids"].shape)
        return body_forward(self, *args, **kwargs)

    monkeypatch.setattr(body, "forward", counted)
    flags = ["--config", str(config), "--pair", f"lm_layers={layers}"]
    assert main([*flags, "--output", str(tmp_path / "plain")]) == 0
    cached = [*flags, "--cache-states", "--states-dtype", "float32"]
    calls.clear()
    assert main([*cached, "--output", str(tmp_path / "cached")]) == 0
    first = len(calls)
    calls.clear()
    assert main([*cached, "--output", str(tmp_path / "again"), "--steps", "40"]) == 0
    assert 0 < len(calls) < first  # a pair tries its base when it is made; no step's
    again = list(calls)
    calls.clear()
    AuxTunedForCausalLM.from_lm(load_base(str(base)), **{**PAIR, "lm_layers": json.loads(layers)})
    assert again == calls
    assert LlamaForCausalLM.forward is forward
    plain, states = (
        load_file(tmp_path / name / "checkpoint-8" / "model.safetensors") for name in ("plain", "cached")
    )
    for name, tensor in plain.items():
        # Batches of other shapes: float32 sums in another order, through eight steps of AdamW.
        torch.testing.assert_close(states[name], tensor, rtol=0, atol=2e-3)
    for a, b in zip(log(tmp_path / "plain"), log(tmp_path / "cached"), strict=True):
        name = "nll" if a.get("evaluation") else "loss"
        alone = "lm_nll" if a.get("evaluation") else "lm_loss"
        assert b[name] == pytest.approx(a[name], rel=1e-4)
        assert b[alone] == pytest.approx(a[alone], rel=1e-5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_process_that_was_stopped_resumes_to_the_same_weights(
    number: signal.Signals, config: Path, tmp_path: Path
) -> None:
    steps = ["--config", str(config), "--steps", "40", "--save-every", "5", "--schedule", "linear"]
    killed, whole = tmp_path / "killed out", tmp_path / "whole"
    command = [sys.executable, "-m", "auxkern.cli", "train", *steps, "--output", str(killed)]
    # One thread, as many as the run that it is compared with.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment
    )
    deadline = time.monotonic() + 120
    while not checkpoint_steps(killed) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    assert checkpoint_steps(killed), said
    assert checkpoint_steps(killed)[-1] < 40, said
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 130
        assert f"--output '{killed}' --resume" in said
        assert f"it is saved in {killed}/checkpoint-{checkpoint_steps(killed)[-1]}" in said
    assert main([*steps, "--output", str(killed), "--resume"]) == 0
    assert main([*steps, "--output", str(whole)]) == 0
    assert weights(killed) == weights(whole)
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_ctrl_c_while_states_are_cached_says_how_to_resume(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from auxkern.training import lm_states

    run, calls = lm_states.run_base, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return run(*args, **kwargs)

    monkeypatch.setattr(lm_states, "run_base", interrupted)
    flags = ["--config", str(config), "--cache-states"]
    assert main(flags) == 130
    said = capsys.readouterr().err
    assert f"auxkern train --config {config} --cache-states --resume" in said
    assert not (tmp_path / "out").exists()
    assert main([*flags, "--resume"]) == 0
    assert len(calls) > 1


def test_resuming_with_another_setting_is_refused_before_anything_is_computed(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(config)]) == 0
    changes = ["--resume", "--cache-states", "--pair", "dropout=0.2"]
    assert main(["--config", str(config), *changes]) == 2
    said = capsys.readouterr().err
    assert "made with other settings: pair is" in said
    assert "cache_states is True but was False" in said
    assert not (tmp_path / "states").exists()
    assert main(["--config", str(config)]) == 2
    assert "holds a run with checkpoint-8 already; resume it" in capsys.readouterr().err


def test_resuming_on_another_base_or_model_is_refused(
    config: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = shutil.copytree(base, tmp_path / "base")
    assert main(["--config", str(config), "--base", str(own)]) == 0
    lm = load_base(str(own))
    lm.lm_head.weight.data[5, 3] += 0.5
    lm.save_pretrained(own)
    assert main(["--config", str(config), "--base", str(own), "--resume"]) == 2
    assert "is of another model: base_fingerprint is" in capsys.readouterr().err

    pair = AuxTunedForCausalLM.from_lm(load_base(str(base)), **{**PAIR, "dropout": 0.3})
    examples = encode(read_jsonl(tmp_path / "train.jsonl"), TextFormat(load_tokenizer(str(base))))
    settings = {"output": str(tmp_path / "library"), "steps": 1}
    train(pair, examples, LoopSettings(**settings), collate=AuxCollator(0))
    pair = AuxTunedForCausalLM.from_lm(load_base(str(base)), **{**PAIR, "dropout": 0.2})
    with pytest.raises(ValueError, match=r"is of another model: dropout is 0.2 but was 0.3"):
        train(pair, examples, LoopSettings(**settings, resume=True), collate=AuxCollator(0))


def test_a_limit_draws_examples_that_no_seed_changes(
    config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    runs = []
    for seed in ("0", "1"):
        output = tmp_path / seed
        limits = ["--train-examples", "7", "--validation-examples", "3", "--seed", seed]
        assert main(["--config", str(config), "--output", str(output), *limits]) == 0
        runs.append(json.loads((output / "checkpoint-8" / "trainer.json").read_text()))
        said = capsys.readouterr().out
        assert "training    7 examples" in said
        assert "validation  3 examples" in said
    assert runs[0]["training"] == runs[1]["training"]
    assert runs[0]["validation"] == runs[1]["validation"]
    assert runs[0]["nll"] != runs[1]["nll"]


@pytest.mark.parametrize("more", ["--cache-states", "--shard-base"])
def test_processes_that_share_a_run_make_the_run_of_one(config: Path, tmp_path: Path, more: str) -> None:
    batches = ["--batch-size", "2", "--gradient-accumulation", "3"]
    command = ["train", "--config", str(config), *batches, "--device", "cpu"]
    process = launch(2, ["-m", "auxkern", *command, "--output", str(tmp_path / "two"), more])
    alone = [more, "--states-folder", str(tmp_path / "other")] if more == "--cache-states" else []
    assert cli.main([*command, "--output", str(tmp_path / "one"), *alone]) == 0
    out, _ = outputs(process)
    assert out.count("validation nll") >= 2
    assert len(set(out.splitlines())) == len(out.splitlines()), "only the first process prints"
    one, two = (load_file(tmp_path / name / "checkpoint-8" / "model.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        # Sums in another order; AdamW divides by roots of tiny squares.
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=5e-4)
    nlls = [[line["nll"] for line in log(tmp_path / name) if "nll" in line] for name in ("one", "two")]
    assert nlls[1] == pytest.approx(nlls[0], rel=1e-3)


def test_a_base_is_sharded_over_processes_only(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(config), "--shard-base"]) == 2
    assert "shard_base is for several processes" in capsys.readouterr().err


# ------------------------------------------------------------------------------- what the base is told


def _within(some: list[int], ids: list[int]) -> bool:
    return any(ids[i : i + len(some)] == some for i in range(len(ids)))


TOLD = ["--base-prompt", "{condition} w2", "--base-examples", "3"]


@pytest.mark.parametrize("kind", [PAIR, {"architecture": "last-layers", "last_layers": 2, "lora_rank": 2}])
def test_a_base_that_is_told_conditions(config: Path, tmp_path: Path, kind: dict[str, Any]) -> None:
    if "last_layers" in kind:
        pytest.importorskip("peft")
    settings = {**yaml.safe_load(config.read_text()), "pair": kind, "cache_states": True}
    config.write_text(yaml.safe_dump(settings))
    out = tmp_path / "out"
    assert main(["--config", str(config), *TOLD]) == 0
    model = AuxTunedForCausalLM.from_pretrained(out)
    tokenizer = load_tokenizer(settings["base"])
    text = TextFormat.of(model.config, tokenizer)
    every = read_jsonl(tmp_path / "train.jsonl")
    ids = model.config.base_prefix_ids
    told = [one for one in every if _within(text.base_prefix([one])[1:], ids)]
    assert len(told) >= 3
    first = next(line for line in log(out) if line.get("evaluation"))
    encoded = encode(read_jsonl(tmp_path / "validation.jsonl"), text)
    with torch.no_grad():
        batch = AuxCollator(text.pad_id)([encoded[i] for i in range(len(encoded))])
        assert float(model.eval()(**batch, aux_scale=0.0).loss) == pytest.approx(first["lm_nll"], rel=1e-4)


def test_a_run_that_is_told_goes_on_to_the_same_weights(config: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert main(["--config", str(config), *TOLD, "--output", str(once)]) == 0
    stopped = ["--config", str(config), *TOLD, "--output", str(twice), "--schedule", "constant"]
    whole = ["--config", str(config), *TOLD, "--output", str(once / "c"), "--schedule", "constant"]
    assert main(whole) == 0
    assert main([*stopped, "--steps", "3"]) == 0
    assert main([*stopped, "--steps", "8", "--resume"]) == 0
    assert weights(twice) == weights(once / "c")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--base-examples", "3"], "base_examples is 3, but there is no base_prompt"),
        ([*TOLD[:3], "40"], "base_examples is 40, which leaves none of 40 training examples"),
        (["--base-prompt", "no field"], "base_prompt is 'no field': it has no field"),
        (["--pair", "base_prompt=x"], "pair holds 'base_prompt', which is a setting of its own"),
        (
            ["--pair", "base_prefix_ids=[1]"],
            "pair holds 'base_prefix_ids', which is a setting of its own; use base_",
        ),
    ],
)
def test_what_a_base_cannot_be_told(
    config: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["--config", str(config), *flags]) == 2
    assert message in capsys.readouterr().err
