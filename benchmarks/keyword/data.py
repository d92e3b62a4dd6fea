"""The study's data: sentences to train on, for the validation nll, and keywords that were never seen."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from auxkern.core.seeds import drawn
from auxkern.model.text import Example, TextFormat
from auxkern.tasks.registry import load_task
from auxkern.training.examples import EncodedExamples, encode
from benchmarks.keyword.presets import PROMPT, Method, Preset

# Written by hand; tune.py takes the one that does best on training keywords.
PROMPTS = (
    'Write one short sentence that contains "{keyword}".',
    'Use "{keyword}" in a short example sentence, as a dictionary does. Answer with the sentence only.',
    "Example sentences of a dictionary.\nearly: the early morning\ndrive: he drives me mad\n{keyword}:",
)


@dataclass(frozen=True)
class StudyData:
    """Examples whose conditions are keywords and whose texts contain them.

    Examples are trained and scored on only if ``written_alike``.

    Attributes:
        training: drawn from the task's training side, in the file's order.
        validation: drawn from its validation side: no keyword and no sentence was trained on.
        asked: an example of each of the keywords that texts are written for, from its test side.
        unigram_texts: every different sentence of the training side, to count words in.
    """

    training: list[Example]
    validation: list[Example]
    asked: list[Example]
    unigram_texts: list[str]


def study_data(preset: Preset) -> StudyData:
    """The data of a preset.

    Raises:
        OSError, ValueError: the task's source cannot be read, or has too few keywords.
    """
    training, validation, test = load_task("keyword", preset.task_source).split()
    of = {example.condition.casefold(): example for example in reversed(test)}
    if len(of) < preset.samples:
        raise ValueError(f"samples is {preset.samples}, but the test side has {len(of)} keywords")
    return StudyData(
        drawn([example for example in training if written_alike(example)], preset.training),
        drawn([example for example in validation if written_alike(example)], preset.validation),
        drawn(list(of.values()), preset.samples),
        list(dict.fromkeys(example.text for example in training)),
    )


def written_alike(example: Example) -> bool:
    """Whether the keyword stands in the sentence as it is given: in its case, after a space, whole.

    Otherwise its tokens are others ("Figure 2", "`score'"), which nothing in the keyword's own tells; such
    sentences, one in fifty, would teach that a text may end without them.
    """
    return re.search(rf"(?<!\S){re.escape(example.condition)}(?!\w)", example.text) is not None


def pair_format(preset: Preset, tokenizer: Any) -> TextFormat:
    """Of pairs: the keyword goes to the auxiliary only."""
    pair = preset.pair
    return TextFormat(tokenizer, pair["condition_template"], text_prefix=pair["text_prefix"])


def lm_format(preset: Preset, tokenizer: Any) -> TextFormat:
    """Of a language model by itself: the keyword, if it is told, is its prompt."""
    return TextFormat(tokenizer, text_prefix=preset.pair["text_prefix"])


def encoded_for_lm(examples: list[Example], text_format: TextFormat) -> EncodedExamples:
    """The same sentences with the keyword before them, from which nothing is learnt."""
    return encode([Example("", one.text, keyword_prefix(one.condition)) for one in examples], text_format)


def keyword_prefix(keyword: str) -> str:
    """What a fine-tuned LM reads before it writes."""
    return f" {keyword}:"


def prompt_ids(text_format: TextFormat, method: Method, keyword: str, prompt: int) -> list[int]:
    """What an LM reads before it writes a text for a keyword, the start token included.

    Args:
        text_format: of the LM's tokenizer.
        method: how the keyword is told: not at all, by a prefix, or by one of ``PROMPTS``.
        keyword: to be contained.
        prompt: index into ``PROMPTS``.
    """
    tokenizer = text_format.tokenizer
    prefix = keyword_prefix(keyword) if method.trained else ""
    if method.kind == PROMPT:
        asked = PROMPTS[prompt].format(keyword=keyword)
        if tokenizer.chat_template is not None:
            message = {"role": "user", "content": asked}
            return list(
                tokenizer.apply_chat_template([message], add_generation_prompt=True, return_dict=False)
            )
        prefix = f"{asked}\n"
    return [text_format.start_id, *tokenizer(prefix, add_special_tokens=False)["input_ids"]]
