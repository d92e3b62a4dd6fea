"""Proxy tuning: a large model is steered by what tuning changed in a small one (Liu et al. 2024).

python examples/proxy_tuning.py "Write a haiku about rain."

z = z(model) + alpha (z(tuned) - z(plain))
"""

from __future__ import annotations

import argparse

from auxkern.generation import Engine, Request, experts
from auxkern.model import AuxTunedForCausalLM, TextFormat, load_tokenizer, open_models


def main(argv: list[str] | None = None) -> dict[str, str]:
    """The text of the model alone, and of the mixture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-1.7B", help="what is steered")
    parser.add_argument("--tuned", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="a small tuned model")
    parser.add_argument("--plain", default="HuggingFaceTB/SmolLM2-135M", help="the same before it was tuned")
    parser.add_argument("--alpha", type=float, default=1.0)
    options = parser.parse_args(argv)

    # The engine takes pairs; an untrained one is its language model.
    model = AuxTunedForCausalLM.from_lm(options.model)
    tokenizer = load_tokenizer(options.model)
    small = open_models({"tuned": options.tuned, "plain": options.plain}, model, tokenizer)
    engine = Engine(model, TextFormat(tokenizer), models=small)
    mixture = experts(options.prompt, expert="tuned", anti_expert="plain", alpha=options.alpha)
    alone = Request("alone", prompt=options.prompt, auxiliary=None, max_new_tokens=64)
    steered = Request("steered", max_new_tokens=64, **mixture._asdict())
    texts = {str(one.id): one.text for one in engine.generate([alone, steered])}
    for name, text in texts.items():
        print(f"{name}: {text}\n")
    return texts


if __name__ == "__main__":
    main()
