"""The loss in the Trainer of transformers, which trains a small model beside a frozen one.

    python examples/loss_in_the_trainer.py --steps 20

``normalizer`` takes the Trainer's own count of labels, so gradient accumulation weighs all tokens alike.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Trainer, TrainingArguments

import auxkern

TEXTS = ("The glacier moved an inch a day.", "It rained on the harbour.", "She read the letter twice.")
SIZE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


class SumTrainer(Trainer):
    """Trains its model in the sum with ``lm``."""

    lm: Any

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        with torch.no_grad():
            lm_logits = self.lm(**inputs).logits
        terms = [lm_logits, model(**inputs).logits]
        return auxkern.cross_entropy(terms, labels, shift=True, normalizer=num_items_in_batch)


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    """The Trainer's log."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M", help="Hub name or folder")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="out/trainer", help="folder of the Trainer")
    options = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    encoded = [tokenizer(text + tokenizer.eos_token)["input_ids"] for text in TEXTS]
    lm = AutoModelForCausalLM.from_pretrained(options.model).eval()
    aux = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=lm.config.vocab_size, **SIZE))
    torch.nn.init.zeros_(aux.lm_head.weight)  # untrained it adds nothing
    run: dict[str, Any] = {"max_steps": options.steps, "learning_rate": 3e-3, "logging_steps": 1}
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": len(TEXTS)}
    args = TrainingArguments(options.output, report_to="none", save_strategy="no", **run, **sizes)
    data = [{"input_ids": ids, "labels": ids} for ids in encoded]
    trainer = SumTrainer(model=aux, args=args, train_dataset=data)
    trainer.lm = lm.to(args.device)
    trainer.train()
    return trainer.state.log_history


if __name__ == "__main__":
    main()
