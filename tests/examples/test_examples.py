"""Every example runs on tiny models, and does what it says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from auxkern.generation import Engine, Member, Mixture, Request
from auxkern.model import AuxTunedForCausalLM, TextFormat, load_base, load_tokenizer
from tests.support.launching import ROOT, run_ranks
from tests.support.tiny import byte_tokenizer, tiny_lm_for, tiny_pair

FOLDER = ROOT / "examples"
SCRIPTS = sorted(FOLDER.glob("*.py"))
WORDS = ["glacier", "harbour", "letter", "river", "window", "garden", "engine", "mirror", "copper", "winter"]
SENTENCES = [
    f"The {word} was {how} by the {other}."
    for word in WORDS
    for how, other in (("seen", "sea"), ("lost", "road"), ("kept", "door"))
]


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save_lm(path: Path, seed: int) -> str:
    tiny_lm_for(byte_tokenizer(), seed=seed).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_lm(tmp_path_factory.mktemp("base"), 0)


def save_pair(path: Path, base: str) -> str:
    lm = load_base(base, native=False)
    tiny_pair("own head", lm, base_model_name_or_path=base).save_pretrained(path)
    return str(path)


def text_format(base: str) -> TextFormat:
    return TextFormat(load_tokenizer(base))


def lm_nll(base: str, texts: tuple[str, ...]) -> float:
    """Mean nll of the tokens of texts, the first ones left out, and the end."""
    lm, tokenizer = AutoModelForCausalLM.from_pretrained(base), load_tokenizer(base)
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text + tokenizer.eos_token)["input_ids"]])
        total += lm(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_is_short_and_named_here(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
    assert f'example("{path.stem}")' in Path(__file__).read_text(encoding="utf-8")


def test_loss_in_a_loop(base: str) -> None:
    script = example("loss_in_a_loop")
    losses = script.main(["--model", base, "--steps", "3"])
    assert losses[0] == pytest.approx(lm_nll(base, script.TEXTS), rel=1e-5)
    assert losses == sorted(losses, reverse=True)


def test_loss_in_the_trainer(base: str, tmp_path: Path) -> None:
    script = example("loss_in_the_trainer")
    log = script.main(["--model", base, "--steps", "3", "--output", str(tmp_path)])
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[0] == pytest.approx(lm_nll(base, script.TEXTS), rel=1e-3)  # of four digits in the log
    assert losses == sorted(losses, reverse=True)


def test_keyword(base: str, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(SENTENCES))
    output = tmp_path / "out"
    options = ["--model", base, "--source", f"text:{texts}", "--steps", "2", "--output", str(output)]
    assert 0 <= example("keyword").main(options) <= 1
    # What it wrote names its base, and writes as it was trained.
    model = AuxTunedForCausalLM.from_pretrained(output)
    assert (model.config.text_prefix, model.config.condition_template) == (" ", " {condition}")


def test_batch_file(base: str, tmp_path: Path) -> None:
    pair = save_pair(tmp_path / "pair", base)
    asked, written = tmp_path / "requests.jsonl", tmp_path / "texts.jsonl"
    lines = [{"id": i, "condition": word, "max_new_tokens": 5} for i, word in enumerate(WORDS)]
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    script = example("batch_file")
    script.AT_ONCE = 2
    options = [str(asked), str(written), "--pair", pair]
    assert script.main(options) == len(WORDS)
    first = written.read_text()
    assert sorted(json.loads(line)["id"] for line in first.splitlines()) == list(range(len(WORDS)))
    # As if it had been killed within the third line.
    written.write_text("".join(first.splitlines(keepends=True)[:2]) + '{"id"')
    assert script.main(options) == len(WORDS) - 2
    assert sorted(written.read_text().splitlines()) == sorted(first.splitlines())


def one_text(engine: Engine, mixture: Mixture, id: str, tokens: int) -> str:
    (done,) = engine.generate([Request(id, max_new_tokens=tokens, **mixture._asdict())])
    return done.text


def test_guidance(base: str) -> None:
    options = ["--model", base, "--prompt", "Good:", "--away-from", "Bad:", "--scale", "2", "--number", "2"]
    texts = example("guidance").main(options)
    assert len(set(texts)) == 2
    engine = Engine(AuxTunedForCausalLM.from_lm(base), text_format(base))
    want = Mixture((Member(prompt="Good:", weight=2.0), Member(prompt="Bad:", weight=-1.0)))
    assert texts[0] == one_text(engine, want, "led", 48)


def test_proxy_tuning(base: str, tmp_path: Path) -> None:
    names = {name: save_lm(tmp_path / name, seed) for seed, name in enumerate(("tuned", "plain"), 7)}
    flags = [part for name, path in names.items() for part in (f"--{name}", path)]
    texts = example("proxy_tuning").main(["Once", "--model", base, *flags, "--alpha", "0.5"])
    models = {name: load_base(path) for name, path in names.items()}
    engine = Engine(AuxTunedForCausalLM.from_lm(base), text_format(base), models=models)
    tuned, plain = (Member(name, "Once", weight=w) for name, w in (("tuned", 0.5), ("plain", -0.5)))
    assert texts["steered"] == one_text(engine, Mixture((Member(prompt="Once"), tuned, plain)), "steered", 64)
    assert texts["alone"] == one_text(engine, Mixture((Member(prompt="Once"),)), "alone", 64)


def test_two_auxiliaries(base: str, tmp_path: Path) -> None:
    keyword, length = (save_pair(tmp_path / name, base) for name in ("keyword", "length"))
    texts = example("two_auxiliaries").main(["--keyword-pair", keyword, "--length-pair", length])
    assert len(set(texts)) == 3


def parallel(folder: Path, rank: int, world: int) -> tuple[float, float]:
    return example("vocabulary_parallel").main(["--model", str(folder / "base")])


@pytest.mark.slow
def test_vocabulary_parallel(tmp_path: Path) -> None:
    save_lm(tmp_path / "base", 0)
    for of_parts, of_whole in run_ranks(parallel, tmp_path, 2):
        assert of_parts == pytest.approx(of_whole, rel=1e-6)


@pytest.mark.slow
def test_ray_texts(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray: Any = pytest.importorskip("ray", reason="pip install auxkern[ray]")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    pair, asked = save_pair(tmp_path / "pair", base), tmp_path / "requests.jsonl"
    lines = [{"id": f"r{i}", "condition": word, "max_new_tokens": 5} for i, word in enumerate(WORDS)]
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    here = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ray.init(num_cpus=3, include_dashboard=False, runtime_env={"env_vars": here})
    try:
        texts = tmp_path / "texts"
        count = example("ray_texts").main([str(asked), str(texts), "--pair", pair, "--workers", "1"])
    finally:
        ray.shutdown()
    rows = [json.loads(line) for file in texts.glob("*.json") for line in file.read_text().splitlines()]
    assert count == len(rows) == len(WORDS)
    assert all(row["text"] and not row["error"] for row in rows)
