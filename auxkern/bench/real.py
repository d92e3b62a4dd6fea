"""``python -m auxkern.bench.real``: loss and decoding from a real LM's outputs over real sentences."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import auxkern
from auxkern.bench import losses, sample, session
from auxkern.bench.results import CaseResult, Run
from auxkern.bench.runner import NORMAL, OPERATORS, QUICK, Progress, backends_for, measure_inputs
from auxkern.bench.timing import Effort
from auxkern.model.smollm2 import load_smollm2
from auxkern.tasks.wordnet import DEBIAN_FOLDER, read_synsets
from auxkern.terminal import INTERRUPTED, command_parser, device_from, positive, sentence

T = 16  # positions per sentence; shorter ones are padded
LARGEST_DIFFERENCE = 1e-5
COMPARED = ("temperature only", "top-k 50 + top-p 0.9")  # filters, of tokens
MEASURED = "top-k 50 + top-p 0.9"
_WORDS = range(5, 13)  # such a sentence fills most of T and seldom passes it
_IGNORED = -100
_MODEL = "SmolLM2 on WordNet"
_DESCRIPTION = """\
Real input: SmolLM2-135M's logits over WordNet's example sentences, plus those of a small untrained auxiliary
model; then the same from final hidden states and output embeddings, and tokens drawn from these logits.
Compares the fused loss with float64 and tokens with the reference's, then measures."""
_EPILOG = """\
Exit status: 0; 1 if auxkern was wrong or failed; 2 for bad options or missing data; 130 after Ctrl-C.
"""


class Batch(NamedTuple):
    """Terms of LM and auxiliary, and (B, T) int64 ids to score them on, -100 where padded.

    Terms are float32 logits (B, T, V), or heads on hidden states (B, T, D).
    """

    lm: Any
    aux: Any
    ids: Tensor

    @property
    def logits(self) -> Batch:
        """Of heads, with their products in place of them."""
        lm, aux = (head.hidden @ head.weight.T for head in (self.lm, self.aux))
        return Batch(lm, aux, self.ids)

    def inputs(self) -> losses.LossInputs:
        """Rows without the shift: every implementation gets next tokens as its targets."""
        terms: list[Any] = []
        for term, trained in ((self.lm, False), (self.aux, True)):
            if isinstance(term, Tensor):
                terms.append(term.detach().flatten(0, 1).requires_grad_(trained))
                continue
            hidden = term.hidden.detach().flatten(0, 1).requires_grad_(trained)
            terms.append(auxkern.Head(hidden, term.weight.detach().requires_grad_(trained)))
        return losses.LossInputs(terms, F.pad(self.ids[:, 1:], (0, 1), value=_IGNORED).reshape(-1))


class Agreement(NamedTuple):
    """Whether the fused loss and its gradient are close to float64, of which ``exact`` is the loss."""

    exact: float
    passed: bool
    words: str


class TokenAgreement(NamedTuple):
    """Of so many rows, those with the reference's token, and others whose token scores alike in float32."""

    rows: int
    equal: int
    tied: int

    @property
    def passed(self) -> bool:
        return self.equal + self.tied == self.rows

    def __str__(self) -> str:
        return f"{self.equal} of {self.rows} tokens are the reference's, {self.tied} tie with it"


class Positions(NamedTuple):
    """Both models' logits (N, V) float32 at some positions."""

    lm: Tensor
    aux: Tensor


def main(argv: list[str] | None = None) -> int:
    """Scores sentences with SmolLM2 plus a small untrained auxiliary, checks, then measures.

    ``argv`` are the arguments after the program's name; None: those of the process. Returns the exit
    status that ``_EPILOG`` tells; wrong is a fused loss or gradient not within 1e-5 of float64.
    """
    parser = command_parser("python -m auxkern.bench.real", _DESCRIPTION, _EPILOG)
    which = "operator (repeatable; default: all)"
    parser.add_argument("--op", action="append", choices=tuple(OPERATORS), help=which)
    rows = f"rows; {T} for each sentence (default 512)"
    parser.add_argument("--n", type=positive, default=512, help=rows)
    folder = f"folder with WordNet's data files (default {DEBIAN_FOLDER})"
    parser.add_argument("--wordnet", type=Path, default=DEBIAN_FOLDER, metavar="DIR", help=folder)
    session.add_device(parser)
    session.add_effort(parser)
    session.add_files(parser, "case", "bars of time and memory")
    options = parser.parse_args(argv)
    session.check_files(parser, options)
    if options.n < T:
        parser.error(f"--n {options.n} is less than one sentence of {T} positions")
    device, effort = device_from(parser, options.device), QUICK if options.quick else NORMAL
    ops = list(dict.fromkeys(options.op or OPERATORS))
    try:
        backends, notes = backends_for(device, torch.float32, options.backend)
    except (ValueError, RuntimeError) as error:
        parser.error(f"--backend: {error}")
    try:
        print("loading SmolLM2-135M (the first time it is converted, about a minute)", file=sys.stderr)
        batch = real_batch(options.wordnet, options.n // T, device)
    except (ModuleNotFoundError, OSError, ValueError) as error:
        print(f"{parser.prog}: {sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED

    run = Run(*session.head(parser.prog, argv, device), notes=notes)
    logits, counted = batch.logits, batch.ids != _IGNORED
    batches = {"cross_entropy": logits, "linear": batch}
    # Float64 checks come first, on their own: the benchmark's check some rows of the gradient only.
    pairs = [(op, name) for op in ops if op in batches for name in backends]
    agreements = {(op, name): compare(batches[op], name) for op, name in pairs}
    drawing = backends if "sample" in ops else []
    tokens = compare_tokens(every_position(logits.lm, logits.aux, counted), drawing)
    run.facts = _facts(batch, agreements) | token_facts(tokens)

    def inputs(op: str) -> Any:
        if op != "sample":
            return batches[op].inputs()
        return sample.inputs_of([*last_positions(logits.lm, logits.aux, counted)], MEASURED)

    jobs: list[session.Job] = [
        (op, partial(measured, op, _MODEL, partial(inputs, op), device, backends, effort)) for op in ops
    ]
    status = session.carry_out(run, jobs, options)
    bad = [key for key, agreement in agreements.items() if not agreement.passed]
    wrong = [f"{op} of backend {name} is further than {LARGEST_DIFFERENCE} from float64" for op, name in bad]
    strange = [key for key, agreement in tokens.items() if not agreement.passed]
    wrong += [f"tokens of backend {name} differ, {filters}" for filters, name in strange]
    for line in wrong:
        print(f"{parser.prog}: {line}", file=sys.stderr)
    return status or int(bool(wrong))


def real_batch(wordnet: Path, B: int, device: torch.device) -> Batch:
    """Final hidden states and heads of SmolLM2 and of an untrained auxiliary over B example sentences.

    SmolLM2's head is its (tied) input embedding.

    Raises:
        FileNotFoundError, ModuleNotFoundError: what is missing, and how to install it.
        ValueError: there are fewer than B fitting sentences.
    """
    sentences = example_sentences(wordnet, B)
    lm, tokenizer = load_smollm2()
    padded = {"padding": "max_length", "truncation": True, "max_length": T, "padding_side": "right"}
    encoded = tokenizer(sentences, return_tensors="pt", **padded).to(device)
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    heads = []
    for model in (lm, untrained_auxiliary(lm.config.vocab_size)):
        with torch.no_grad():
            hidden = model.to(device).base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        heads.append(auxkern.Head(hidden, model.get_output_embeddings().weight.detach()))
    return Batch(heads[0], heads[1], ids.masked_fill(mask == 0, _IGNORED))


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

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=V, tie_word_embeddings=False, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def compare(batch: Batch, backend: str) -> Agreement:
    """The fused loss and its gradients for the auxiliary beside float64, in every row and id."""
    inputs, shape, terms = batch.inputs(), batch.ids.shape, []
    for term in inputs.terms:
        if isinstance(term, Tensor):
            terms.append(term.unflatten(0, shape))
        else:
            terms.append(auxkern.Head(term.hidden.unflatten(0, shape), term.weight))
    loss = auxkern.cross_entropy(terms, batch.ids, shift=True, backend=backend)
    loss.backward()
    operator = losses.CROSS_ENTROPY if isinstance(batch.lm, Tensor) else losses.LINEAR
    exact = operator.exact(inputs, everything=True)
    errors = operator.errors(inputs, exact, loss)
    differences = abs(loss.item() - exact.loss) / abs(exact.loss), errors.values["gradient"]
    words = f"fused {loss.item():.8f}, float64 {exact.loss:.8f}, relative difference "
    words += "{:.1e}; of the gradient {:.1e}".format(*differences)
    # Written so that NaN does not pass.
    return Agreement(exact.loss, all(one <= LARGEST_DIFFERENCE for one in differences), words)


def _facts(batch: Batch, agreements: dict[tuple[str, str], Agreement]) -> dict[str, str]:
    B, scored = batch.ids.shape[0], int((batch.ids[:, 1:] != _IGNORED).sum())
    rows, V = batch.ids.numel(), batch.lm.vocabulary
    facts = {"data": f"{B} sentences, {scored} scored tokens in {rows} rows, V {V:,}"}
    for backend in dict.fromkeys(backend for _, backend in agreements):
        alone = auxkern.cross_entropy(batch.lm, batch.ids, shift=True, backend=backend).item()
        facts[f"LM alone, {backend}"] = f"mean nll {alone:.6f}"
    return facts | {f"LM + auxiliary, {', '.join(key)}": one.words for key, one in agreements.items()}


def token_facts(agreements: dict[tuple[str, str], TokenAgreement]) -> dict[str, str]:
    """What was compared, in words."""
    return {f"sample, {', '.join(key)}": str(agreement) for key, agreement in agreements.items()}


def every_position(lm: Tensor, aux: Tensor, counted: Tensor) -> Positions:
    """The positions (B, T) of logits (B, T, V) where ``counted`` is true, in order."""
    return Positions(lm[counted], aux[counted])


def last_positions(lm: Tensor, aux: Tensor, counted: Tensor) -> Positions:
    """The last position of each sequence where ``counted`` (B, T) is true: what decoding draws from."""
    length = counted.shape[1]
    last = (counted * torch.arange(1, length + 1, device=counted.device)).argmax(1)
    rows = torch.arange(counted.shape[0], device=counted.device)
    return Positions(lm[rows, last], aux[rows, last])


def compare_tokens(positions: Positions, backends: Sequence[str]) -> dict[tuple[str, str], TokenAgreement]:
    """Each backend's tokens beside the reference's, by (filters, backend), with those of ``COMPARED``."""
    agreements = {}
    for filters in COMPARED if backends else ():
        inputs = sample.inputs_of(list(positions), filters)
        exact = sample.OPERATOR.exact(inputs)
        for backend in backends:
            tokens = sample.ours(backend).run(inputs)
            equal, tied = (tokens == exact.tokens).sum(), sample.tied(inputs, exact, tokens).sum()
            agreements[filters, backend] = TokenAgreement(tokens.numel(), int(equal), int(tied))
    return agreements


def measured(
    op: str,
    model: str,
    inputs: Callable[[], Any],
    device: torch.device,
    backends: Sequence[str],
    effort: Effort,
    progress: Progress,
) -> CaseResult:
    """An operator on two float32 terms, which ``inputs`` makes of the data ``model``."""
    tensors = inputs()
    case = CaseResult(op, model, dtype="float32", terms=2, **tensors.sizes)
    implementations = OPERATORS[op].implementations(device, torch.float32, backends)
    return measure_inputs(tensors, case, implementations, device, effort, progress)


if __name__ == "__main__":
    sys.exit(main())
