"""Text into token ids and back, in the shape that a pair is trained on and prompted with."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # label of a position that no loss counts, as in torch and transformers


@dataclass(frozen=True)
class Example:
    """A text to learn, and the condition that it answers.

    Attributes:
        condition: what the auxiliary sees beside the text: a keyword, a label, a document.
        text: what the pair learns to write.
        prompt: what the text continues; both models read it, and nothing is learned from it.
        conditions: what other auxiliaries see, by their names: those that are held frozen in training.

    Raises:
        TypeError: one of them is not a str, or the conditions are no mapping of them.
    """

    condition: str
    text: str
    prompt: str = ""
    conditions: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.conditions, Mapping) or not all(map(_is_str, self.conditions)):
            raise TypeError(
                f"conditions must be a mapping from names of auxiliaries to str, got {self.conditions!r:.60}"
            )
        for name, value in self.parts().items():
            if not _is_str(value):
                raise TypeError(f"{name} must be a str, got {type(value).__name__}: {value!r:.60}")

    def parts(self) -> dict[str, str]:
        """Every str of it, under what a message calls it."""
        of_others = {f"conditions[{name!r}]": value for name, value in self.conditions.items()}
        return {"condition": self.condition, "text": self.text, "prompt": self.prompt, **of_others}


def _is_str(value: object) -> bool:
    return isinstance(value, str)


def check_condition_template(template: str, name: str = "condition_template") -> None:
    """Refuses a template that does not hold the field {condition}, or holds anything else in braces.

    Args:
        template: to be checked.
        name: what a message calls it.

    Raises:
        TypeError: it is not a str.
        ValueError: another field, a conversion, a format or a lone brace; a literal one is doubled.
    """
    if not isinstance(template, str):
        raise TypeError(f"{name} must be a str, got {type(template).__name__}")
    problem = None
    try:
        written = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        problem = str(error)
    else:
        if not written:
            problem = "it has no field"
        elif any(field != ("condition", "", None) for field in written):
            problem = "it has another field, or a format"
    if problem:
        raise ValueError(
            f"{name} is {template!r}: {problem}; write {{condition}} where the condition goes, "
            "and double a brace that is part of the text"
        )


class TextFormat:
    """How conditions, prompts and texts become token ids: the same in training and in generation.

    A sequence is [start] prompt text [end]. A prompt that begins with the start token, as one from a chat
    template may, gets no second one, and a text that ends with the end token none either. Prompt and text
    are tokenised apart and joined, so a text that continues a word of its prompt has other ids than the
    joined string; a tokenizer that marks the beginning of words gives the same ids when the text begins
    with the space before a word.

    With a base prompt a sequence is base_prompt prompt text [end]: the base is told the condition in words.
    The start token then stands at the beginning of what the base reads before every sequence
    (``base_prefix``; ``AuxTunedConfig.base_prefix_ids``).

    Args:
        tokenizer: of transformers, the base's own. Special tokens that a text spells out are
            recognised, and none is added but start and end.
        condition_template: how a condition is written before it is tokenised, with "{condition}".
        max_length: most tokens of a sequence, start and end included; a longer text loses its end, and
            the end token. None: any length. It does not bind ``prompts``.
        text_prefix: written before every text that is learnt. With a space there a word has the same ids
            at the beginning of a text as within it, in a tokenizer that marks the beginning of words.
        base_prompt: how the condition is told to the base, with "{condition}", such as " {condition}:"; None
            tells it nothing.

    Raises:
        TypeError: a template is not a str.
        ValueError: the tokenizer has no end token, a template no field {condition} or another
            one, or max_length is below 2.
    """

    def __init__(
        self,
        tokenizer: Any,
        condition_template: str = "{condition}",
        max_length: int | None = None,
        text_prefix: str = "",
        base_prompt: str | None = None,
    ) -> None:
        if getattr(tokenizer, "eos_token_id", None) is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no end token, so a text would never end; "
                "set tokenizer.eos_token"
            )
        check_condition_template(condition_template)
        if base_prompt is not None:
            check_condition_template(base_prompt, "base_prompt")
        if max_length is not None and max_length < 2:
            raise ValueError(f"max_length is {max_length}; the start token and one of the text need 2")
        if not isinstance(text_prefix, str):
            kind = type(text_prefix).__name__
            raise TypeError(f"text_prefix must be a str, got {kind}: {text_prefix!r:.60}")
        self.tokenizer, self.max_length = tokenizer, max_length
        self.condition_template, self.text_prefix = condition_template, text_prefix
        self.base_prompt = base_prompt

    @classmethod
    def of(cls, config: Any, tokenizer: Any, max_length: int | None = None) -> TextFormat:
        """The format that a pair was trained in.

        Args:
            config: an ``AuxTunedConfig``.
            tokenizer, max_length: as of ``TextFormat``.
        """
        return cls(tokenizer, config.condition_template, max_length, config.text_prefix, config.base_prompt)

    @cached_property
    def plain(self) -> TextFormat:
        """The same without a base prompt."""
        if self.base_prompt is None:
            return self
        return TextFormat(self.tokenizer, self.condition_template, self.max_length, self.text_prefix)

    @property
    def start_id(self) -> int:
        """What every sequence begins with: the tokenizer's start token, or its end token for want of one."""
        start = self.tokenizer.bos_token_id
        return self.end_id if start is None else start

    @property
    def end_id(self) -> int:
        """The tokenizer's end token."""
        return self.tokenizer.eos_token_id

    def end_ids(self, model: Any) -> list[int]:
        """What ends a text of a model: the tokenizer's end token, and those of ``model.generation_config``.

        Chat models have several. For ``model.generate(eos_token_id=...)``; the engine asks for them itself.
        """
        ends = getattr(model.generation_config, "eos_token_id", None)
        ends = [] if ends is None else torch.as_tensor(ends).reshape(-1).tolist()
        return sorted({self.end_id, *ends})

    @cached_property
    def special_tokens(self) -> dict[int, str]:
        """What ``decode`` leaves out: ids and spelling."""
        tokenizer = self.tokenizer
        spelled = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        added = tokenizer.added_tokens_decoder.items()
        return spelled | {id: token.content for id, token in added if token.special}

    @property
    def pad_id(self) -> int:
        """What fills a batch where the mask is 0: the padding token, or the end token for want of one."""
        padding = self.tokenizer.pad_token_id
        return self.end_id if padding is None else padding

    def example(self, condition: str, text: str, prompt: str = "") -> dict[str, Any]:
        """One training example as ids; arguments as in ``Example``.

        Returns:
            input_ids (T), [start] prompt text [end], with the prefix as part of the text; labels (T), the
            same ids over text and end and -100 before; condition_ids (K), without start and end; with a base
            prompt told, how many of the first ids it takes.

        Raises:
            TypeError: an argument is not a str.
            ValueError: under max_length the prompt leaves no room for text.
        """
        return self.examples([Example(condition, text, prompt)])[0]

    def examples(self, examples: Sequence[Example]) -> list[dict[str, Any]]:
        """Many of ``example``, which tokenizers do several times faster at once."""
        conditions = self.condition_ids([example.condition for example in examples])
        begun, told = self._begun(
            [example.prompt for example in examples], [example.condition for example in examples]
        )
        texts = self._ids([self.text_prefix + example.text for example in examples])
        items: list[dict[str, Any]] = [
            {**self._sequence(before, text, example), "condition_ids": condition}
            for example, condition, before, text in zip(examples, conditions, begun, texts, strict=True)
        ]
        return items if told is None else [{**item, "told": n} for item, n in zip(items, told, strict=True)]

    def base_prefix(self, examples: Sequence[Example] = ()) -> list[int]:
        """(P) ids that a base with a base prompt reads before every sequence: [start], and examples.

        Each is written as its own sequence would be, base prompt, prompt and text, then the end of a line; of
        two where the base prompt has several lines.

        Raises:
            ValueError: there is no base prompt.
        """
        if self.base_prompt is None:
            raise ValueError('there is no base_prompt to write examples with; give one, as " {condition}:"')
        ids = [self.start_id]
        end = "\n\n" if "\n" in self.base_prompt else "\n"
        for one in examples:
            # In parts, as a sequence is, so that the same words have the same ids in both.
            told = self.base_prompt.format(condition=one.condition)
            for part in self._ids([told, one.prompt, self.text_prefix + one.text, end]):
                ids += part
        return ids

    def prompts(
        self, conditions: Sequence[str | Sequence[str]], prompts: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """What ``generate`` takes: the beginning of B sequences, and their conditions.

        Args:
            conditions: B of them; or B lists, with one for each of a text's auxiliaries.
            prompts: B of them, or None for empty ones.

        Returns:
            int64 tensors: input_ids and attention_mask (B, T), [start] prompt, padded on the left, so
            that new tokens follow; condition_ids and condition_mask (B, K), padded on the right, or (B, A, K)
            of lists; with a base prompt told (B,), how many of the first tokens it takes.

        Raises:
            TypeError: a str stands where a sequence of them belongs, or beside lists.
            ValueError: there are no conditions, or not as many prompts.
        """
        for name, value in (("conditions", conditions), ("prompts", prompts)):
            if isinstance(value, str):
                raise TypeError(
                    f"{name} must be a sequence of str, got the str {value!r:.60}; put it in a list"
                )
        if prompts is None:
            prompts = [""] * len(conditions)
        if not conditions or len(prompts) != len(conditions):
            raise ValueError(
                f"there are {len(conditions)} conditions and {len(prompts)} prompts; pass as many, 1 at least"
            )
        # A base is told the first of several.
        first = [one if isinstance(one, str) else next(iter(one), "") for one in conditions]
        begun, told = self._begun(prompts, first)
        inputs: dict[str, Tensor] = {}
        inputs["input_ids"], inputs["attention_mask"] = padded(begun, self.pad_id, side="left")
        inputs["condition_ids"], inputs["condition_mask"] = self._conditions(conditions)
        if told is not None:
            inputs["told"] = torch.tensor(told)
        return inputs

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of (T) ids, without special tokens; spaces and line ends are kept.

        Raises:
            ValueError: ids is a tensor of more dimensions.
        """
        if isinstance(ids, Tensor):
            if ids.dim() != 1:
                raise ValueError(f"ids has the shape {tuple(ids.shape)}; decode one row (T,) at a time")
            ids = ids.tolist()
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _begun(
        self, prompts: Sequence[str], conditions: Sequence[str]
    ) -> tuple[list[list[int]], list[int] | None]:
        """What stands before texts, start token or base prompt and prompt; and how long base prompts are."""
        own, start = self._ids(prompts), [self.start_id]
        rest = [ids[1:] if ids[:1] == start else ids for ids in own]
        if self.base_prompt is None:
            return [[*start, *ids] for ids in rest], None
        told = self._ids([self.base_prompt.format(condition=condition) for condition in conditions])
        for condition, ids in zip(conditions, told, strict=True):
            if not ids:
                raise ValueError(
                    f"base_prompt {self.base_prompt!r} has no tokens for the condition {condition!r}, so "
                    "that nothing stands before the text; give it words of its own"
                )
        return [[*before, *ids] for before, ids in zip(told, rest, strict=True)], [len(ids) for ids in told]

    def _sequence(self, begun: list[int], text: list[int], example: Example) -> dict[str, list[int]]:
        if begun == [self.start_id] and text[:1] == begun and text != [self.end_id]:
            text = text[1:]
        if self.max_length is not None and len(begun) >= self.max_length:
            raise ValueError(
                f"the prompt {example.prompt!r:.60} takes {len(begun)} tokens with what stands before it, "
                f"which leaves no room for text in max_length={self.max_length}; shorten it, or raise that"
            )
        learned = text if text[-1:] == [self.end_id] else [*text, self.end_id]
        if self.max_length is not None:
            learned = learned[: self.max_length - len(begun)]
        return {"input_ids": begun + learned, "labels": [IGNORED] * len(begun) + learned}

    def _conditions(self, conditions: Sequence[str | Sequence[str]]) -> tuple[Tensor, Tensor]:
        """Ids and mask, (B, K), or (B, A, K) of lists."""
        single = [isinstance(one, str) for one in conditions]
        if any(single) and not all(single):
            raise TypeError("conditions mix str and lists; give each text a list, or each a str")
        lists = [[one] if isinstance(one, str) else list(one) for one in conditions]
        each = iter(self.condition_ids([one for row in lists for one in row]))
        A = max(map(len, lists))
        filled = [next(each) if place < len(row) else [] for row in lists for place in range(A)]
        ids, mask = padded(filled, self.pad_id)
        shape = (-1,) if all(single) else (A, ids.shape[1])
        return ids.reshape(len(lists), *shape), mask.reshape(len(lists), *shape)

    def condition_ids(self, conditions: Sequence[str]) -> list[list[int]]:
        """Ids of conditions, each written as the template says, without start and end."""
        return self._ids([self.condition_template.format(condition=condition) for condition in conditions])

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: a long document is no reason for a warning, max_length is ours.
        encoded = self.tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return encoded["input_ids"]


def padded(rows: Sequence[Sequence[int]], fill: int, *, side: str = "right") -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one (B, longest) int64 tensor, and its mask, 1 for what is real.

    Args:
        rows: B sequences of ids, or (T,) tensors of them; they may be empty.
        fill: the id of what is not real.
        side: where that goes, "right" or "left".

    Raises:
        ValueError: side is another word.
    """
    if side not in ("right", "left"):
        raise ValueError(f'side is {side!r}; choose "right" or "left"')
    longest = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), longest), fill, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[b, place] = torch.as_tensor(row, dtype=torch.int64)
        mask[b, place] = 1
    return ids, mask
