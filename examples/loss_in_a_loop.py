"""The loss in a loop of your own: a frozen model and a small one that is trained beside it.

    python examples/loss_in_a_loop.py --steps 20

The two models' logits are never added up in memory, and a gradient exists for the small one's alone.
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import auxkern

TEXTS = ("The glacier moved an inch a day.", "It rained on the harbour.", "She read the letter twice.")
SIZE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def main(argv: list[str] | None = None) -> list[float]:
    """The loss of each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="Hub name or folder")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(argv)

    lm = AutoModelForCausalLM.from_pretrained(options.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer([text + tokenizer.eos_token for text in TEXTS], return_tensors="pt", padding=True)
    batch.pop("token_type_ids", None)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    aux = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=lm.config.vocab_size, **SIZE))
    torch.nn.init.zeros_(aux.lm_head.weight)  # untrained it adds nothing
    optimizer = torch.optim.AdamW(aux.parameters(), lr=3e-3)

    memory, losses = auxkern.GradientMemory(), []
    for step in range(options.steps):
        with torch.no_grad():
            lm_logits = lm(**batch).logits
        aux_logits = aux(**batch).logits
        loss = auxkern.cross_entropy([lm_logits, aux_logits], labels, shift=True, gradient_memory=memory)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
