"""``python -m auxkern.bench.real``: loss and decoding from a real LM's outputs over real sentences."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import auxkern
from auxkern.bench import cross_entropy, linear, real_sampling, session
from auxkern.bench.cases import OPERATORS
from auxkern.bench.operators import Operator
from auxkern.bench.results import CaseResult, Run
from auxkern.bench.runner import NORMAL, QUICK, Progress, backends_for, measure_inputs
from auxkern.model.smollm2 import load_smollm2
from auxkern.tasks.wordnet import DEBIAN_FOLDER, read_synsets
from auxkern.terminal import INTERRUPTED, device_from, positive

T = 16  # positions per sentence; shorter ones are padded
LARGEST_DIFFERENCE = 1e-5
_WORDS = range(5, 13)  # such a sentence fills most of T and seldom passes it
_IGNORED = -100
_MODEL = "SmolLM2 on WordNet"


class Batch(NamedTuple):
    """Logits of both models and the ids they are scored on.

    Attributes:
        lm, aux: (B, T, V) float32.
        ids: (B, T) int64 token ids, -100 where padded.
    """

    lm: Tensor
    aux: Tensor
    ids: Tensor


class HeadBatch(NamedTuple):
    """The same logits as ``Batch`` before the output heads.

    Attributes:
        lm, aux: heads of hidden states (B, T, D) and weight (V, D), float32.
        ids: (B, T) int64 token ids, -100 where padded.
    """

    lm: auxkern.Head
    aux: auxkern.Head
    ids: Tensor

    @property
    def logits(self) -> Batch:
        """Both models' logits."""
        return Batch(self.lm.hidden @ self.lm.weight.T, self.aux.hidden @ self.aux.weight.T, self.ids)


class Agreement(NamedTuple):
    """The fused loss beside float64; differences are relative, of the gradient the largest."""

    fused: float
    exact: float
    loss_difference: float
    gradient_difference: float

    @property
    def passed(self) -> bool:
        worst = max(self.loss_difference, self.gradient_difference)
        return worst <= LARGEST_DIFFERENCE and self.fused == self.fused


def main(argv: list[str] | None = None) -> int:
    """Scores sentences with SmolLM2 plus a small untrained auxiliary, checks, then measures.

    Args:
        argv: arguments after the program's name; those of the process when None.

    Returns:
        0; 1 if a fused loss or gradient is not within 1e-5 of float64, a token is not the
        reference's, or an implementation of auxkern fails; 2 if a package or the data is missing;
        130 after Ctrl-C.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    session.check_files(parser, options)
    if options.n < T:
        parser.error(f"--n {options.n} is less than one sentence of {T} positions")
    device = device_from(parser, options.device)
    ops = list(dict.fromkeys(options.op or OPERATORS))
    try:
        backends, notes = backends_for(device, torch.float32, options.backend)
        samplers: list[str] = []
        if "sample" in ops:
            samplers, _ = backends_for(device, torch.float32, options.backend, "draw")
    except (ValueError, RuntimeError) as error:
        parser.error(f"--backend: {error}")
    try:
        print("loading SmolLM2-135M (the first time it is converted, about a minute)", file=sys.stderr)
        batch = real_batch(options.wordnet, options.n // T, device)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED

    run = Run(*session.head(parser.prog, argv, device))
    run.notes += notes
    # Float64 checks come first, on their own: the benchmark's check some rows of the gradient only.
    losses = [op for op in ops if op != "sample"]
    agreements = {(op, backend): _compare(op, batch, backend) for op in losses for backend in backends}
    tokens = _compare_tokens(batch, samplers)
    run.facts = _facts(batch, agreements) | real_sampling.facts(tokens)
    measurements = [
        _decoding(batch, samplers, options.quick)
        if op == "sample"
        else _measurement(op, batch, backends, options.quick)
        for op in ops
    ]
    status = session.carry_out(run, list(zip(ops, measurements, strict=True)), options)
    wrong = [key for key, agreement in agreements.items() if not agreement.passed]
    for op, backend in wrong:
        print(
            f"{parser.prog}: {op} of backend {backend} is further than {LARGEST_DIFFERENCE} from float64",
            file=sys.stderr,
        )
    strange = [key for key, agreement in tokens.items() if not agreement.passed]
    for filters, backend in strange:
        print(f"{parser.prog}: tokens of backend {backend} differ, {filters}", file=sys.stderr)
    return status or (1 if wrong or strange else 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m auxkern.bench.real",
        description="Real input: SmolLM2-135M's logits over WordNet's example sentences, plus those of a "
        "small untrained auxiliary model; then the same from final hidden states and output embeddings, "
        "and tokens drawn from these logits. Compares the fused loss with float64 and tokens with the "
        "reference's, then measures.",
        epilog="Exit status: 0; 1 if auxkern was wrong or failed; 2 for bad options or missing data; "
        "130 after Ctrl-C.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--op", action="append", choices=OPERATORS, help="operator (repeatable; default: all)"
    )
    parser.add_argument("--n", type=positive, default=512, help=f"rows; {T} for each sentence (default 512)")
    parser.add_argument(
        "--wordnet",
        type=Path,
        default=DEBIAN_FOLDER,
        metavar="DIR",
        help=f"folder with WordNet's data files (default {DEBIAN_FOLDER})",
    )
    session.add_device(parser)
    session.add_effort(parser)
    session.add_files(parser)
    return parser


def real_batch(wordnet: Path, B: int, device: torch.device) -> HeadBatch:
    """Final hidden states and heads of SmolLM2 and of an untrained auxiliary over B example sentences.

    SmolLM2's head is its (tied) input embedding.

    Args:
        wordnet: folder with WordNet's data files.
        B: number of sentences, spread evenly over all of WordNet.
        device: where the models run.

    Raises:
        FileNotFoundError, ModuleNotFoundError: what is missing, and how to install it.
        ValueError: there are fewer than B fitting sentences.
    """
    sentences = example_sentences(wordnet, B)
    lm, tokenizer = load_smollm2()
    encoded = tokenizer(
        sentences,
        padding="max_length",
        truncation=True,
        max_length=T,
        padding_side="right",
        return_tensors="pt",
    ).to(device)
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    aux = untrained_auxiliary(lm.config.vocab_size)
    with torch.no_grad():
        lm_head, aux_head = (_head(model.to(device), ids, mask) for model in (lm, aux))
    return HeadBatch(lm_head, aux_head, ids.masked_fill(mask == 0, _IGNORED))


def _head(model: Any, ids: Tensor, mask: Tensor) -> auxkern.Head:
    hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    return auxkern.Head(hidden, model.get_output_embeddings().weight.detach())


def example_sentences(wordnet: Path, B: int) -> list[str]:
    """B of WordNet's examples, of 5 to 12 words, evenly spaced in the files' order.

    Raises:
        FileNotFoundError: see ``read_synsets``.
        ValueError: there are fewer than B.
    """
    fitting = [e for synset in read_synsets(wordnet) for e in synset.examples if len(e.split()) in _WORDS]
    if len(fitting) < B:
        raise ValueError(f"{wordnet} has {len(fitting)} fitting sentences but {B} are asked for; lower --n")
    return [fitting[i * len(fitting) // B] for i in range(B)]


def untrained_auxiliary(V: int) -> Any:
    """A two-layer Llama of width 64 with its own head over V ids, the same in every run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=V,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def _compare(op: str, batch: HeadBatch, backend: str) -> Agreement:
    return compare_heads(batch, backend) if op == "linear" else compare(batch.logits, backend)


def compare(batch: Batch, backend: str) -> Agreement:
    """The fused loss and its gradient for the auxiliary beside PyTorch's in float64."""
    aux = batch.aux.detach().requires_grad_()
    loss = auxkern.cross_entropy([batch.lm, aux], batch.ids, shift=True, backend=backend)
    (gradient,) = torch.autograd.grad(loss, aux)
    exact, gradient_difference, largest = _exact(batch, gradient)
    return Agreement(
        fused=loss.item(),
        exact=exact,
        loss_difference=abs(loss.item() - exact) / abs(exact),
        gradient_difference=gradient_difference / largest,
    )


def compare_heads(batch: HeadBatch, backend: str) -> Agreement:
    """The fused loss and its gradients for the auxiliary's head beside PyTorch's in float64."""
    hidden, weight = (t.detach().clone().requires_grad_() for t in (batch.aux.hidden, batch.aux.weight))
    terms = [batch.lm, auxkern.Head(hidden, weight)]
    loss = auxkern.cross_entropy(terms, batch.ids, shift=True, backend=backend)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    exact, exact_gradients = _exact_heads(batch)
    differences = [
        ((ours - d).abs().max() / d.abs().max()).item()
        for ours, d in zip(gradients, exact_gradients, strict=True)
    ]
    return Agreement(
        fused=loss.item(),
        exact=exact,
        loss_difference=abs(loss.item() - exact) / abs(exact),
        gradient_difference=torch.tensor(differences).max().item(),  # keeps a NaN
    )


def _exact_heads(batch: HeadBatch) -> tuple[float, tuple[Tensor, Tensor]]:
    """(float64 loss, float64 gradients of the auxiliary's hidden states and weight)."""
    count = int((batch.ids[:, 1:] != _IGNORED).sum())
    lm_weight = batch.lm.weight.double()
    hidden, weight = (t.detach().double().requires_grad_() for t in (batch.aux.hidden, batch.aux.weight))
    loss = 0.0
    for lm_hidden, aux_hidden, ids in zip(batch.lm.hidden, hidden, batch.ids, strict=True):
        z = lm_hidden[:-1].double() @ lm_weight.T + aux_hidden[:-1] @ weight.T
        share = F.cross_entropy(z, ids[1:], reduction="sum") / count
        share.backward()  # adds up over the sentences
        loss += share.item()
    d_hidden, d_weight = hidden.grad, weight.grad
    if d_hidden is None or d_weight is None:
        raise ValueError("there are no sentences to compare")
    return loss, (d_hidden, d_weight)


def _exact(batch: Batch, gradient: Tensor) -> tuple[float, float, float]:
    """(float64 loss, max |gradient - exact|, max |exact|), one sentence at a time."""
    count = int((batch.ids[:, 1:] != _IGNORED).sum())
    loss = difference = largest = 0.0
    for lm, aux, ids, ours in zip(batch.lm, batch.aux, batch.ids, gradient, strict=True):
        z = (lm.double() + aux.double()).requires_grad_()
        share = F.cross_entropy(z[:-1], ids[1:], reduction="sum") / count
        (exact,) = torch.autograd.grad(share, z)
        loss += share.item()
        difference = max(difference, (ours - exact).abs().max().item())
        largest = max(largest, exact.abs().max().item())
    return loss, difference, largest


def _facts(batch: HeadBatch, agreements: dict[tuple[str, str], Agreement]) -> dict[str, str]:
    B, scored = batch.ids.shape[0], int((batch.ids[:, 1:] != _IGNORED).sum())
    rows, V = batch.ids.numel(), batch.lm.vocabulary
    facts = {"data": f"{B} sentences, {scored} scored tokens in {rows} rows, V {V:,}"}
    for backend in dict.fromkeys(backend for _, backend in agreements):
        alone = auxkern.cross_entropy(batch.lm, batch.ids, shift=True, backend=backend).item()
        facts[f"LM alone, {backend}"] = f"mean nll {alone:.6f}"
    for (op, backend), agreement in agreements.items():
        facts[f"LM + auxiliary, {op}, {backend}"] = (
            f"fused {agreement.fused:.8f}, float64 {agreement.exact:.8f}, relative difference "
            f"{agreement.loss_difference:.1e}; of the gradient {agreement.gradient_difference:.1e}"
        )
    return facts


def _measurement(
    op: str, batch: HeadBatch, backends: list[str], quick: bool
) -> Callable[[Progress], CaseResult]:
    def measure(progress: Progress) -> CaseResult:
        operator: Operator = linear.OPERATOR if op == "linear" else cross_entropy.OPERATOR
        N, V = batch.ids.numel(), batch.lm.vocabulary
        widths = [head.weight.shape[1] for head in (batch.lm, batch.aux)] if op == "linear" else []
        case = CaseResult(op, _MODEL, V, N, "float32", terms=2, widths=widths)
        device = batch.ids.device
        implementations = operator.implementations(device, torch.float32, backends)
        effort = QUICK if quick else NORMAL
        return measure_inputs(operator, _inputs(op, batch), case, implementations, device, effort, progress)

    return measure


def _compare_tokens(
    batch: HeadBatch, backends: list[str]
) -> dict[tuple[str, str], real_sampling.TokenAgreement]:
    if not backends:
        return {}
    lm, aux, ids = batch.logits
    return real_sampling.compare(real_sampling.every_position(lm, aux, ids != _IGNORED), backends)


def _decoding(batch: HeadBatch, backends: list[str], quick: bool) -> Callable[[Progress], CaseResult]:
    lm, aux, ids = batch.logits
    positions = real_sampling.last_positions(lm, aux, ids != _IGNORED)
    return real_sampling.measurement(positions, _MODEL, backends, QUICK if quick else NORMAL)


def _inputs(op: str, batch: HeadBatch) -> Any:
    """Rows without the shift: every implementation gets next tokens as its targets."""
    target = F.pad(batch.ids[:, 1:], (0, 1), value=_IGNORED).reshape(-1)
    if op == "linear":
        return linear.LinearInputs(
            batch.lm.hidden.flatten(0, 1),
            batch.lm.weight,
            batch.aux.hidden.flatten(0, 1).detach().requires_grad_(),
            batch.aux.weight.detach().requires_grad_(),
            target,
        )
    lm, aux, _ = batch.logits
    return cross_entropy.CrossEntropyInputs([lm.flatten(0, 1), aux.flatten(0, 1).requires_grad_()], target)


if __name__ == "__main__":
    sys.exit(main())
