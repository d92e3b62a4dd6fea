"""The page's three mixtures run as they stand there, and are the sums that their names say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from auxkern.generation import Engine, Member, Request
from auxkern.model import TextFormat
from tests.docs.pages import PAGES
from tests.support.tiny import DECODER, byte_tokenizer, tiny_lm_for, tiny_pair

TEXT = TextFormat(byte_tokenizer())
PROMPT = "A good story:"
SUMS: dict[str, tuple[Member, ...]] = {
    "guided": (Member(prompt=PROMPT, weight=1.5), Member(prompt="A bad story:", weight=-0.5)),
    "proxy": (
        Member(prompt="Once"),
        Member("tuned", prompt="Once"),
        Member("plain", prompt="Once", weight=-1.0),
    ),
    "both": (
        Member(prompt="Once"),
        Member("default", condition="glacier"),
        Member("length", condition="12", weight=0.7),
    ),
}


def examples() -> list[str]:
    page = PAGES["mixtures"].read_text(encoding="utf-8")
    section = page.partition("\n## Three of them\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)


def test_there_are_three_of_ten_lines_at_most() -> None:
    assert len(examples()) == len(SUMS)
    assert all(len(example.splitlines()) <= 10 for example in examples())


@pytest.mark.parametrize(("example", "id"), list(zip(examples(), SUMS, strict=False)), ids=SUMS)
def test_an_example_writes_the_sum(
    example: str, id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lm = tiny_lm_for(byte_tokenizer())
    tiny_pair("encoder-decoder", lm).save_pretrained("out/length")
    model = tiny_pair("own head", lm, auxiliary_config=DECODER)
    model.load_auxiliary("length", "out/length")
    small, tuned = (tiny_lm_for(byte_tokenizer(), seed=seed, num_hidden_layers=2) for seed in (7, 8))
    names: dict[str, Any] = {"model": model, "text": TEXT, "small": small, "tuned_small": tuned}
    exec(compile(example, f"mixtures.md, {id}", "exec"), names)
    story = names["story"]
    assert (story.id, story.error) == (id, None)
    engine = Engine(model, TEXT, models={"tuned": tuned, "plain": small})
    (want,) = engine.generate([Request(id, members=SUMS[id])])
    assert story.token_ids == want.token_ids
    assert len(story.token_ids) > 3
