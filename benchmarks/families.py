"""Every decoder-only family of transformers, tiny, as base and as auxiliary: it works wholly or is refused.

    python -m benchmarks.families --output build/families.jsonl [FAMILY ...]

Each family runs in a process of its own with a time limit; those that the output holds are left out. It
ends with a table, and with exit status 1 if a family neither works nor is refused when the pair, or the
engine, is made.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from auxkern.generation import Engine, Request
from auxkern.model import AuxTunedForCausalLM, TextFormat, fingerprint
from auxkern.model.twins import V, randomise, tiny_config

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
SECONDS = 120
LARGEST = 20_000_000  # parameters
# What a family's defaults leave out.
CHANGES: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "num_hidden_layers": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "kimi_linear": {"num_experts_per_token": 2},
    "longcat_flash": {"expert_ffn_hidden_size": 32, "n_routed_experts": 4, "zero_expert_num": 2},
    "ministral": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "head_dim": 16},
    "hunyuan_v1_dense": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "head_dim": 16},
    "hunyuan_v1_moe": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "head_dim": 16},
    "bamba": {"attn_layer_indices": [1]},
    "bailing_hybrid": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "deepseek_v2": {"num_experts_per_tok": 2},
}
REFUSALS = (ValueError, TypeError)


class NotTiny(Exception):  # noqa: N818
    """The family itself does not run with the small config that was made of its defaults."""


class Refused(Exception):  # noqa: N818
    """A sentence of this package's, when a pair or an engine was made."""


def tokenizer() -> Any:
    """One id for each of V words."""
    words = [*SPECIAL, *(f"w{i}" for i in range(V - len(SPECIAL)))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def llama() -> Any:
    settings = {name: value for name, value in LLAMA.items() if name != "model_type"}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return loud(LlamaForCausalLM(LlamaConfig(vocab_size=V, **settings, **ids)))


def loud(lm: Any) -> Any:
    randomise(lm)
    lm.tie_weights()
    return lm.eval()


def small_config(kind: str) -> Any:
    config = CONFIG_MAPPING[kind]()
    if not hasattr(config, "vocab_size") or not hasattr(config, "pad_token_id"):
        config = config.get_text_config()
    changes = dict(CHANGES.get(kind, {}))
    if getattr(config, "is_decoder", None) is False:
        changes["is_decoder"] = True
    return tiny_config(config, **changes)


def make(build: Callable[[], Any]) -> Any:
    try:
        return build()
    except REFUSALS as error:
        if not _ours(error):
            raise
        raise Refused(str(error)) from error


def _ours(error: BaseException) -> bool:
    """Whether it was raised in auxkern, and not below it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return "auxkern" in Path(last.filename).parts


def paired(build: Callable[..., AuxTunedForCausalLM]) -> tuple[AuxTunedForCausalLM, str]:
    """The pair, by the base's own logits where its head is of another kind."""
    try:
        return make(build).eval(), "head"
    except Refused as refused:
        if 'lm_term="logits"' not in str(refused):
            raise
        return make(lambda: build(lm_term="logits")).eval(), "logits"


def check(pair: AuxTunedForCausalLM, folder: Path, lm: Any) -> dict[str, str]:
    """Raises AssertionError for what is wrong; says what the engine did."""
    lm_before = fingerprint(lm)
    ids = torch.randint(4, V - 4, (1, 9), generator=torch.Generator().manual_seed(0))
    condition = torch.tensor([[9, 12]])
    with torch.no_grad():
        near("an untrained pair is its base", pair(ids, condition_ids=condition).logits, lm(ids).logits)
        pair.head.weight.copy_(torch.randn(pair.head.weight.shape) * 0.3)
        alone = pair(ids, condition_ids=condition).logits
        later = ids.clone()
        later[:, -1] = 5
        near("causal", pair(later, condition_ids=condition).logits[:, :-1], alone[:, :-1])
        masks = [torch.tensor([[0] * 3 + [1] * 9, [1] * 12]), torch.tensor([[1] * 9 + [0] * 3, [1] * 12])]
        wide = torch.tensor([[9, 12, 0, 0, 0, 0], [7, 8, 9, 10, 11, 12]])
        for mask in masks:
            padded = torch.randint(4, V - 4, (2, 12), generator=torch.Generator().manual_seed(1))
            padded[0, mask[0] != 0] = ids[0]
            logits = pair(padded, mask, condition_ids=wide, condition_mask=(wide != 0).long()).logits
            near("padding", logits[0, mask[0] != 0], alone[0])
    conditions = {"condition_ids": wide, "condition_mask": (wide != 0).long()}
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached, uncached = (
        pair.generate(padded, attention_mask=masks[0], **conditions, **settings, use_cache=use)
        for use in (True, False)
    )
    same("generate with and without a cache", cached.tolist(), uncached.tolist())
    pair.save_pretrained(folder / "pair")
    again = AuxTunedForCausalLM.from_pretrained(folder / "pair", lm=lm).eval()
    with torch.no_grad():
        near("loaded again", again(ids, condition_ids=condition).logits, alone)
    lm.save_pretrained(folder / "base")
    same("fingerprint after use", fingerprint(lm), lm_before)
    loaded = type(lm).from_pretrained(folder / "base")
    same("fingerprint of the saved base", fingerprint(loaded), lm_before)
    return engine(pair)


def engine(pair: AuxTunedForCausalLM) -> dict[str, str]:
    text = TextFormat(tokenizer())
    requests = [
        Request(i, f"w{i}", " ".join(f"w{3 * i + j}" for j in range(1 + 2 * i)), seed=i, max_new_tokens=8)
        for i in range(3)
    ]
    try:
        together = make(lambda: Engine(pair, text, slots=3, max_length=32, max_condition=8))
    except Refused as refused:
        return {"engine": f"refused: {refused}"}
    texts = [list(completion.token_ids) for completion in together.generate(requests)]
    alone = [
        list(Engine(pair, text, slots=1, max_length=32, max_condition=8).generate([r])[0].token_ids)
        for r in requests
    ]
    same("engine together and alone", texts, alone)
    ends = sorted({2, *pair.config.end_ids()})
    for request, written in zip(requests, texts, strict=True):
        prompt = text.prompts([request.condition], [request.prompt])
        drawn = pair.generate(
            **prompt, do_sample=True, top_k=0, seeds=[request.seed], max_new_tokens=8, eos_token_id=ends
        )
        same("engine and generate", written, drawn[0, prompt["input_ids"].shape[1] :].tolist())
    return {"engine": "works"}


def near(what: str, values: torch.Tensor, expected: torch.Tensor) -> None:
    difference = (values - expected).abs().max().item() / expected.abs().max().item()
    assert difference < 1e-3, f"{what}: relative difference {difference:.1e}"


def same(what: str, values: Any, expected: Any) -> None:
    assert values == expected, f"{what}: {str(values)[:150]} against {str(expected)[:150]}"


def small_lm(kind: str) -> Any:
    """A language model of a family that runs on tokens, or NotTiny."""
    try:
        config = small_config(kind)
        build = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in build(config).parameters())
        if parameters > LARGEST:
            raise ValueError(f"it has {parameters:,} parameters")
        lm = loud(build(config).float())
        with torch.no_grad():
            lm(input_ids=torch.tensor([[5, 6, 7]]))
    except Exception as error:
        raise NotTiny(_sentence(error)) from error
    return lm


def as_base(kind: str, folder: Path) -> dict[str, str]:
    lm = small_lm(kind)
    pair, term = paired(lambda **more: AuxTunedForCausalLM.from_lm(lm, auxiliary_config=LLAMA, **more))
    return {"term": term, **check(pair, folder, lm)}


def as_auxiliary(kind: str, folder: Path) -> dict[str, str]:
    config = small_lm(kind).config.get_text_config()
    settings = {**config.to_diff_dict(), "model_type": config.model_type}
    known = {*type(config)().to_dict(), *config.attribute_map}
    settings = {name: value for name, value in settings.items() if name in known}
    lm = llama()
    pair, _ = paired(lambda **more: AuxTunedForCausalLM.from_lm(lm, auxiliary_config=settings, **more))
    return check(pair, folder, lm)


def outcome(role: Callable[[str, Path], dict[str, str]], kind: str) -> dict[str, str]:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        try:
            return {"result": "works", **role(kind, Path(folder))}
        except NotTiny as error:
            return {"result": "not tiny", "why": str(error)}
        except Refused as refused:
            return {"result": "refused", "why": str(refused)[:400]}
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            return {
                "result": "fails",
                "why": f"{Path(where.filename).name}:{where.lineno} {_sentence(error)}",
            }


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def _family(kind: str, place: str) -> None:
    torch.set_num_threads(1)
    found = {role: outcome(run, kind) for role, run in ROLES.items()}
    Path(place).write_text(json.dumps(found))


ROLES = {"base": as_base, "auxiliary": as_auxiliary}


def run(kind: str, seconds: float) -> dict[str, Any]:
    """Both roles of a family, in a process that begins as a copy of this one: nothing is imported anew."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "found.json"
        child = multiprocessing.get_context("fork").Process(target=_family, args=(kind, str(place)))
        child.start()
        child.join(seconds)
        why = f"exit status {child.exitcode}" if child.exitcode is not None else f"more than {seconds:g} s"
        child.kill()
        child.join()
        lost = {"result": "fails", "why": why}
        found = json.loads(place.read_text()) if place.exists() else {"base": lost, "auxiliary": lost}
    return {"family": kind, **found, "seconds": round(time.perf_counter() - began, 1)}


def families() -> list[str]:
    # "aux_tuned" is the pair itself.
    return [
        kind
        for kind in CONFIG_MAPPING
        if kind != "aux_tuned" and CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING
    ]


def table(records: list[dict[str, Any]]) -> str:
    lines = ["| family | base | auxiliary |", "|---|---|---|"]
    for record in records:
        cells = [_cell(record[role]) for role in ROLES]
        lines.append(f"| {record['family']} | {' | '.join(cells)} |")
    for role in ROLES:
        results = [record[role]["result"] for record in records]
        engines = [record[role].get("engine", "-").split(":")[0] for record in records]
        counts = ", ".join(f"{results.count(one)} {one}" for one in dict.fromkeys(sorted(results)))
        made = f"engine: {engines.count('works')} work, {engines.count('refused')} refused"
        lines.append(f"\n{role}: {counts}; {made}")
    return "\n".join(lines)


def _cell(found: dict[str, str]) -> str:
    if found["result"] != "works":
        return f"{found['result']}: {found['why']}".replace("|", "/")
    return ", ".join(["works", *(f"{k} {v}" for k, v in found.items() if k != "result")]).replace("|", "/")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", help="all if none is named")
    parser.add_argument("--output", type=Path, default=Path("build/families.jsonl"))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="most for one family")
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    lines = options.output.read_text().splitlines() if options.output.exists() else []
    records = {record["family"]: record for record in map(json.loads, lines)}
    with options.output.open("a") as file:
        for kind in options.families or families():
            if kind in records and not options.families:
                continue
            records[kind] = run(kind, options.seconds)
            file.write(json.dumps(records[kind]) + "\n")
            file.flush()
            print(kind, *(f"| {role}: {_cell(records[kind][role])[:100]}" for role in ROLES), flush=True)
    print(table(list(records.values())))
    return int(any(record[role]["result"] == "fails" for record in records.values() for role in ROLES))


if __name__ == "__main__":
    sys.exit(main())
