"""The notebook runs from top to bottom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.launching import ROOT
from tests.support.tiny import byte_tokenizer, tiny_lm_for

PATH = ROOT / "examples" / "auxiliary_tuning.ipynb"


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    cells = [cell for cell in json.loads(PATH.read_text())["cells"] if cell["cell_type"] == "code"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the auxiliary's first weights
        for number, cell in enumerate(cells):
            exec(compile("".join(cell["source"]), f"{PATH.name}, cell {number}", "exec"), names)
            if number == 0:
                # transformers looks for a folder of the name before it asks the Hub.
                tiny_lm_for(byte_tokenizer()).save_pretrained(names["MODEL"])
                byte_tokenizer().save_pretrained(names["MODEL"])
                names["STEPS"] = 10  # after two, texts of one condition at two weights are often the same
    assert names["result"].state.best_nll < names["result"].state.lm_nll
    texts = {one.id: one.text for one in names["texts"]}
    assert texts.pop("harbour, weight 0") == texts["window, weight 0"]  # of the base alone
    assert len(set(texts.values())) == len(texts) == 5
    # What is committed has no outputs, which would be some machine's.
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
