"""A tokenizer that was read from a GGUF file ends texts with the file's end token."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from auxkern.model import load_tokenizer, smollm2
from tests.support.tiny import tiny_lm_for, word_tokenizer


@pytest.fixture
def config() -> Any:
    return tiny_lm_for(word_tokenizer()).config


def test_start_and_end_are_the_files(config: Any) -> None:
    tokenizer = word_tokenizer()
    right = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert right[0] != right[1]
    tokenizer.eos_token = tokenizer.bos_token  # as transformers 5.17 reads a Llama's
    smollm2.set_start_and_end(tokenizer, config)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == right


def test_several_ends_leave_the_tokenizers_own(config: Any) -> None:
    tokenizer = word_tokenizer()
    end, config.eos_token_id = tokenizer.eos_token_id, [0, 1]
    smollm2.set_start_and_end(tokenizer, config)
    assert tokenizer.eos_token_id == end


def test_a_gguf_files_tokenizer_is_set_right(monkeypatch: pytest.MonkeyPatch, config: Any) -> None:
    wrong = word_tokenizer()
    right, wrong.eos_token = wrong.eos_token_id, wrong.bos_token
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: wrong)
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: config)
    assert load_tokenizer("folder").eos_token_id != right
    assert load_tokenizer("folder", gguf_file="a.gguf").eos_token_id == right
