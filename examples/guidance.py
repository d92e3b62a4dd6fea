"""Classifier-free guidance in batches: a text is led away from another prompt (Sanchez et al. 2023).

    python examples/guidance.py --prompt "A good story:" --away-from "A bad story:" --scale 1.5

No auxiliary is needed: a mixture's members are one model with two contexts.
"""

from __future__ import annotations

import argparse

from auxkern.generation import Engine, Request, guidance
from auxkern.model import AuxTunedForCausalLM, TextFormat, load_tokenizer


def main(argv: list[str] | None = None) -> list[str]:
    """The texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="Hub name or folder")
    parser.add_argument("--prompt", default="A good story:")
    parser.add_argument("--away-from", default="A bad story:")
    parser.add_argument("--scale", type=float, default=1.5)
    parser.add_argument("--number", type=int, default=4)
    options = parser.parse_args(argv)

    # The engine takes pairs; an untrained one is its language model.
    model = AuxTunedForCausalLM.from_lm(options.model)
    engine = Engine(model, TextFormat(load_tokenizer(options.model)))
    mixture = guidance(options.prompt, options.away_from, scale=options.scale)
    request = Request("led", samples=options.number, max_new_tokens=48, **mixture._asdict())
    texts = [one.text for one in engine.generate([request])]
    for text in texts:
        print(options.prompt + text, end="\n\n")
    return texts


if __name__ == "__main__":
    main()
