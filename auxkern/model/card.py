"""The model card of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from auxkern.core.files import replace_file
from auxkern.model.config import AuxTunedConfig, trained_on_top_of

_CARD = """---
library_name: auxkern
pipeline_tag: text-generation
tags:
- auxiliary-tuning
{base_line}---

# Auxiliary model for {base}

The weights here are those of a small auxiliary model only. Its logits are added to those of the frozen
language model `{base}`, `softmax(logits_LM + {scale:g} * logits_aux)`, to steer it by a condition
([Auxiliary Tuning](https://arxiv.org/abs/2006.16823)).

```python
from auxkern.model import AuxTunedForCausalLM, TextFormat, load_tokenizer

model = AuxTunedForCausalLM.from_pretrained("{folder}")  # loads the base, and checks that it is the same one
text = TextFormat.of(model.config, load_tokenizer("{base}"))
ids = model.generate(**text.prompts(["a condition"]), do_sample=True, max_new_tokens=32)
```

| | |
|---|---|
| architecture | {architecture} |
| parameters | {parameters:,} |
| output head | {head}{pointer} |
| hidden states of the base that it reads | {layers} |
| what the base is told | {told} |
| trained on top of | {on_top_of} |
| vocabulary | {vocabulary:,} ids |
| fingerprint of the base | `{fingerprint}` |
| made with | torch {torch}, transformers {transformers} |
"""


def write_model_card(folder: Path, config: AuxTunedConfig, parameters: int) -> None:
    """Writes README.md into the folder; leaves one that is there already.

    Args:
        folder: of the checkpoint.
        config: of the pair, complete.
        parameters: trainable ones.
    """
    path = folder / "README.md"
    if path.exists():
        return
    name = config.base_model_name_or_path
    on_hub = name is not None and not name.startswith("pip:") and not Path(name).exists()
    card = _CARD.format(
        base_line=f"base_model: {name}\n" if on_hub else "",
        base=name or "a base that was passed as a module",
        folder=folder.name,
        scale=config.aux_scale,
        architecture=config.architecture,
        parameters=parameters,
        head=config.head,
        pointer=", and a pointer over the condition's tokens" if config.pointer else "",
        layers=", ".join(map(str, config.lm_layers)) or "none",
        told=_told(config),
        on_top_of=trained_on_top_of(config.on_top_of) or "the base alone",
        vocabulary=config.vocab_size or 0,
        fingerprint=config.base_fingerprint,
        torch=torch.__version__,
        transformers=transformers.__version__,
    )
    replace_file(path, card)


def _told(config: AuxTunedConfig) -> str:
    if config.base_prompt is None:
        return "nothing of the condition"
    return f"`{config.base_prompt!r}`, behind a prefix of {len(config.base_prefix_ids)} tokens"
