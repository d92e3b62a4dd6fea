"""Choices of speed that were measured: from a file to the launches of a plan. No GPU needed."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from auxkern import env
from auxkern.backends.triton import Triton, configs, tuned
from auxkern.backends.triton.cases import logits_of, target_of
from auxkern.backends.triton.configs import Config, Configs
from auxkern.backends.triton.logits_loss import launches as logits_loss
from auxkern.backends.triton.tuned import Tuned
from auxkern.core.loss import Loss

NAME = "NVIDIA H100 80GB HBM3"
GPU = torch.device("cuda", 0)
H = torch.float16


def measured(choices: Any, **changes: Any) -> dict[str, Any]:
    """What a file holds."""
    content = {"device": NAME, "capability": 9, "versions": {"triton": "3.7"}, "date": "2030-01-01"}
    return content | {"command": "make gpu", "choices": choices} | changes


@pytest.fixture
def an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(
        name=NAME, major=9, minor=0, multi_processor_count=132, L2_cache_size=50 << 20
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, an_h100: None) -> Path:
    """Where dispatch looks for choices; nothing is there, and nothing came with the package."""
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path))
    monkeypatch.setattr(tuned, "PACKAGED", tmp_path / "nothing")
    return tmp_path / "NVIDIA_H100_80GB_HBM3.json"


def forward_constants(backend: Triton) -> dict[str, Any]:
    launches = logits_loss.forward(logits_of(8192, 50257, (H, H)), target_of(8192), Loss(), backend.gpu(GPU))
    return launches[1][0].constants


def test_a_plan_is_made_of_the_numbers_in_the_file(file):
    assert forward_constants(Triton())["BLOCK"] == 2 * 4 * 32 * 8
    tuned_ = Tuned(**measured({"forward.2": {"vectors": 1, "warps": 8, "programs": 2}, "cache_share": 0.1}))
    file.write_text(tuned_.to_json())
    assert Tuned.read(file) == tuned_
    backend = Triton()
    assert forward_constants(backend)["BLOCK"] == 1 * 8 * 32 * 8
    gpu = backend.gpu(GPU)
    # The other choices are the defaults of that GPU.
    defaults = Configs.of(9)
    forward = {**defaults.forward, 2: Config(1, 8, 2)}
    assert gpu.configs == replace(defaults, forward=forward, cache_share=0.1)
    assert "10% of a cache" in str(logits_loss.one_pass_refusal(logits_of(8192, 50257, (H, H)), Loss(), gpu))
    # It is read once.
    file.unlink()
    assert backend.gpu(GPU) is gpu


def test_without_a_file_for_the_device_the_defaults_hold(file, monkeypatch, tmp_path):
    (file.parent / "NVIDIA_A100.json").write_text("{}")
    assert Triton().gpu(GPU).configs == Configs.of(9)
    # One that came with the package, unless the folder that is named has one.
    monkeypatch.setattr(tuned, "PACKAGED", tmp_path / "packaged")
    tuned.PACKAGED.mkdir()
    (tuned.PACKAGED / file.name).write_text(json.dumps(measured({"recomputed_width": 99})))
    assert Triton().gpu(GPU).configs.recomputed_width == 99
    file.write_text(json.dumps(measured({"recomputed_width": 7})))
    assert Triton().gpu(GPU).configs.recomputed_width == 7


def test_what_came_with_the_package_holds_for_its_gpu(an_h100, monkeypatch):
    monkeypatch.delenv(tuned.VARIABLE, raising=False)
    gpu = Triton().gpu(GPU)
    assert gpu.configs.draw_tiles != Configs.of(9).draw_tiles
    assert str(tuned.PACKAGED / tuned.file_name(NAME)) in gpu.origin


def test_every_choice_has_a_key_and_comes_back_from_it():
    defaults = Configs.of(9)
    table = tuned.keys(defaults)
    assert table["tiles.half.1.roomy"] == defaults.tiles[configs.HALF, 1].roomy
    assert table["draw_tiles.float.2.crowded"] == defaults.draw_tiles[configs.FLOAT, 2].crowded
    assert table["sample"] == defaults.sample
    written = json.loads(json.dumps({key: tuned.written(choice) for key, choice in table.items()}))
    assert tuned.chosen(Configs(), written) == defaults != Configs()


FORWARD = {"vectors": 1, "warps": 8, "programs": 2}
FILTER = tuned.written(configs.DEFAULT.filter)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "is no JSON"),
        ("[1]", "must hold device, capability, versions, date, command, choices, not [1]"),
        ({"device": NAME}, "must hold device"),
        (measured({}, capability="9"), "capability is '9'; it must be of type int"),
        (measured([]), "choices is []; it must be of type dict"),
        (measured({}, device="another"), "is for 'another' of compute capability 9"),
        (measured({}, capability=8), "and the device is"),
        (measured({"forwards.2": FORWARD}), "'forwards.2' is no choice; there are forward.1, forward.2"),
        (measured({"forward.3": FORWARD}), "'forward.3' is no choice"),
        (measured({"forward.2": {"vectors": 1}}), "must hold vectors, warps, programs and nothing else"),
        (measured({"forward.2": FORWARD | {"lanes": 1}}), "and nothing else"),
        (measured({"forward.2": 4}), "forward.2 is 4; it must hold"),
        (measured({"forward.2": FORWARD | {"warps": 3}}), "warps is 3; it must be a power of 2 from 1 to 32"),
        (measured({"forward.2": FORWARD | {"warps": 64}}), "warps is 64"),
        (measured({"forward.2": FORWARD | {"warps": "8"}}), "warps is '8'"),
        (measured({"forward.2": FORWARD | {"warps": True}}), "warps is True"),
        (measured({"forward.2": FORWARD | {"programs": 2.5}}), "programs is 2.5; it must be a whole number"),
        (measured({"cache_share": 1.5}), "cache_share is 1.5; it must be a number from 0 to 1"),
        (measured({"recomputed_width": {}}), "recomputed_width is {}"),
        (measured({"filter": FILTER | {"block": 4096}}), "sample.block is 2048; filter.block, 4096, must"),
        (measured({"filter": FILTER | {"bins": 512}}), "filter.bins is 512; filter.block is 1024"),
        (
            measured({"draw_tiles.half.1.roomy": tuned.written(Configs.of(9).tiles["half", 1].roomy)}),
            "a draw takes 64 at most",
        ),
    ],
)  # fmt: skip
def test_a_bad_file_is_told_with_what_to_do(file, content, problem):
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(problem)) as raised:
        Triton().gpu(GPU)
    message = str(raised.value)
    assert str(file) in message
    assert "delete it" in message
    # `auxkern env` says it, and goes on.
    assert env._configs(GPU) == f"none, {message}"


def test_a_variable_that_names_no_folder(file, monkeypatch):
    monkeypatch.setenv(tuned.VARIABLE, str(file))
    with pytest.raises(ValueError, match=r"AUXKERN_GPU_CONFIGS=.* is no folder; name one with NVIDIA_H100"):
        Triton().gpu(GPU)


def test_env_says_where_choices_come_from(file):
    assert env._configs(GPU) == "defaults, by the model"
    file.write_text(json.dumps(measured({})))
    assert env._configs(GPU) == f"measured on 2030-01-01, {file}"
