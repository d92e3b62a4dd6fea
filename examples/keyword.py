"""An auxiliary from data to texts: a frozen model learns to write a sentence with a given keyword.

    python examples/keyword.py --source text:sentences.txt --output out/keyword
    python examples/keyword.py --source text:sentences.txt --output out/length --task length

Texts come from WordNet, a file or a data set (see ``auxkern.tasks.sources.source_from``).
"""

from __future__ import annotations

import argparse

from auxkern.generation import Engine, Request
from auxkern.model import AuxTunedForCausalLM, TextFormat, load_base, load_tokenizer
from auxkern.tasks.registry import load_task
from auxkern.training.collator import AuxCollator
from auxkern.training.examples import encode
from auxkern.training.loop import train
from auxkern.training.settings import LoopSettings


def main(argv: list[str] | None = None) -> float:
    """The share of texts that do what a condition asks which was never trained on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="Hub name or folder")
    parser.add_argument("--task", default="keyword", help="keyword, length or definition")
    parser.add_argument("--source", help="where the texts come from (default: WordNet)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", default="out/keyword", help="folder for the auxiliary")
    options = parser.parse_args(argv)

    task = load_task(options.task, options.source)
    sides = task.split()  # no condition of the test side is one of the training side
    text_format = TextFormat(load_tokenizer(options.model), task.condition_template, text_prefix=" ")
    model = AuxTunedForCausalLM.from_lm(
        load_base(options.model),
        base_model_name_or_path=options.model,
        condition_template=text_format.condition_template,
        text_prefix=text_format.text_prefix,
        head="shared",  # the base's output embedding
        input_embedding="shared",
        pointer=True,  # may copy the condition's tokens
    )
    settings = LoopSettings(output=options.output, steps=options.steps, batch_size=32, learning_rate=3e-3)
    training, held_out = encode(sides.training, text_format), encode(sides.validation, text_format)
    train(model, training, settings, collate=AuxCollator(text_format.pad_id), validation=held_out)

    conditions = sorted({example.condition for example in sides.test})[:100]
    requests = [Request(i, condition, seed=i, max_new_tokens=48) for i, condition in enumerate(conditions)]
    texts = Engine(model, text_format).generate(requests)
    for condition, one in list(zip(conditions, texts, strict=True))[:5]:
        print(f"{condition}: {one.text.strip()}")
    right = [task.satisfied(condition, one.text) for condition, one in zip(conditions, texts, strict=True)]
    print(f"{sum(right)} of {len(right)} texts do what was asked; the auxiliary is in {options.output}")
    return sum(right) / len(right)


if __name__ == "__main__":
    main()
