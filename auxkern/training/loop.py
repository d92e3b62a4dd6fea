"""A plain training loop: every step is a function of the settings, the seed and the step's number.

So a run that was killed goes on from its last checkpoint to the very same weights (bit for bit on a
CPU with the same number of threads).
"""

from __future__ import annotations

import functools
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor

from auxkern.core.seeds import mixed_seed
from auxkern.model.text import IGNORED
from auxkern.training import checkpoint
from auxkern.training.checkpoint import RunIdentity, TrainState, checkpoint_folder, newest_checkpoint
from auxkern.training.defaults import Plan, plan_for
from auxkern.training.examples import ExampleSet, Items, fingerprint_of
from auxkern.training.fit import check_fit
from auxkern.training.log import RunLog
from auxkern.training.order import DataOrder
from auxkern.training.progress import Progress
from auxkern.training.ranks import Ranks
from auxkern.training.scoring import Batch, Collate, Scorer, label_count
from auxkern.training.settings import LoopSettings
from auxkern.training.signals import StopSignals

_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")

Measure = Callable[[int], Mapping[str, Any]]


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        state: with the best step and the validation nlls of the pair and of the LM alone.
        output: folder with the model of the best step (the last one, without validation data).
    """

    state: TrainState
    output: Path


class TrainingInterrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM stopped the run, after its step was finished and saved.

    Attributes:
        step: steps done.
        checkpoint: folder to resume from.
    """

    def __init__(self, step: int, checkpoint: Path) -> None:
        super().__init__(f"interrupted after step {step}; it is saved in {checkpoint}")
        self.step, self.checkpoint = step, checkpoint


def train(
    model: Any,
    training: ExampleSet | Items,
    settings: LoopSettings,
    *,
    collate: Collate,
    validation: ExampleSet | Items | None = None,
    progress: Progress | None = None,
    measure: Measure | None = None,
    process_group: Any = None,
) -> TrainResult:
    """Trains the auxiliary of a pair, evaluates it, saves it, and goes on where it was stopped.

    On top of others where ``auxkern.training.frozen.hold_frozen`` has put some into the model: losses and
    evaluations are of the whole sum then, and what is trained and saved is the pair's own auxiliary.

    AdamW; the loss is the mean nll over the labels of the whole accumulation group, so that groups
    of ragged batches equal one big batch. SIGINT and SIGTERM finish the step and save (in the main
    thread; elsewhere signals are left alone), a second one stops at once. torch's random state is
    the caller's again afterwards. The model holds the last step's weights at the end, ``output`` the
    best ones: those of the lowest validation nll, the one before the first step included, so that a run
    never ends worse than it began. It ends early where ``settings.patience`` says so. What the settings
    leave open depends on the amount of data, see ``auxkern.training.defaults``.

    With a process group its ranks share the batches of a step, of an evaluation too: the run is the
    same on any number of them but for rounding, and may be resumed on another. Gradients are summed once
    a step. Every rank calls ``train`` with the same arguments; the first one writes.

    Args:
        model: an ``AuxTunedForCausalLM``, or any module whose ``model(**batch, num_items_in_batch=...)``,
            with return_logits=False in an evaluation, has a ``.loss`` and that has
            ``save_pretrained(folder)``, which writes model.safetensors. Without a frozen ``.lm`` nothing
            is said about the LM alone.
        training, validation: what to train on, and what to evaluate on.
        settings: see ``LoopSettings``. ``resume`` continues in ``output``, from the start if nothing
            is saved there.
        collate: list of examples -> batch of tensors with labels (B, T), such as ``AuxCollator``.
        progress: is told of every step.
        measure: called after each evaluation with the number of steps done, from 0 on, the model in
            evaluation mode; what it returns, JSON's types, becomes "measured" in the evaluation's line of
            the log. Of a group's ranks each calls it, and the first one's is taken.
        process_group: a ``ProcessGroup`` or a ``DeviceMesh`` of one dimension, with a copy of the auxiliary
            on each rank, or with FSDP2's shards (``fully_shard``) whose gradients are summed, as
            ``auxkern.model.shard_auxiliary`` sets it.

    Returns:
        A ``TrainResult``.

    Raises:
        ValueError: no examples, nothing to learn or to score in them, no trainable parameters, ``output``
            holds a run and resume is off, it holds another run, or another process writes to it.
        OSError: a file cannot be written; the last checkpoint stays whole. On all ranks.
        FloatingPointError: loss or gradient is not finite; the last checkpoint stays, and ``output`` holds
            the best weights so far, if there was an evaluation.
        TrainingInterrupted: a signal came; what to resume from is saved.
    """
    held_out = None if validation is None else _as_set(validation)
    run = _Run(model, _as_set(training), settings, collate, held_out, progress, measure, process_group)
    # The caller's random state is as it was afterwards.
    devices = [run.device] if run.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), StopSignals() as stop, run:
        try:
            run.to_its_end(stop)
        except FloatingPointError as error:
            if run.state.best_step is None:
                raise
            run.publish()
            best = f"{run.output} holds the best weights so far, of step {run.state.best_step}"
            raise FloatingPointError(f"{error}; {best}") from error
        run.publish()
    return TrainResult(run.state, run.output)


class _Run:
    """A run under way: what ``train`` works on, step by step."""

    def __init__(
        self,
        model: Any,
        training: ExampleSet,
        settings: LoopSettings,
        collate: Collate,
        validation: ExampleSet | None,
        progress: Progress | None,
        measure: Measure | None,
        process_group: Any,
    ) -> None:
        for name, examples in (("training", training), ("validation", validation)):
            if examples is None:
                continue
            if not len(examples.examples):
                raise ValueError(f"{name} has no examples; pass at least one")
            if examples.fingerprint is None:
                check_fit(model, examples.examples, f"{name} example {{}}".format)
        self.model, self.training, self.validation = model, training, validation
        self.output, self.measure = Path(settings.output), measure
        checkpoint.check_output(self.output, settings.resume)
        saved = checkpoint.saved_settings(self.output)
        self.plan = plan_for(settings, len(training.examples), saved)
        self.settings = settings = self.plan.written_into(settings)
        self.optimizer = _optimizer(model, self.plan, settings.betas)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.device = self.parameters[0].device
        self.ranks = Ranks(process_group, self.device)
        self.scorer = Scorer(model, collate, self.ranks, self.device)
        self.progress = Progress() if progress is None or not self.ranks.is_first else progress
        self.order = DataOrder(len(training.examples), settings)
        self.identity = RunIdentity(
            settings,
            training.fingerprint or fingerprint_of(training.examples),
            None if validation is None else validation.fingerprint or fingerprint_of(validation.examples),
            checkpoint.model_fields(model),
        )
        self.state = TrainState()
        self._log: RunLog | None = None

    def __enter__(self) -> _Run:
        with self.ranks.first_alone(), self._writing("the log"):
            if self.ranks.is_first:
                self.output.mkdir(parents=True, exist_ok=True)
                # Before anything is read: another run may be writing what this one would go on from.
                self._log = RunLog(self.output)
        try:
            self._load()
            with self.ranks.first_alone(), self._writing("the log"):
                if self._log is not None:
                    self._log.cut(self._is_past)
                    checkpoint.remove_unfinished(self.output)
        except BaseException:
            self.__exit__()
            raise
        self._first_step, self._began = self.state.step, time.monotonic()
        self._seconds_before = self.state.seconds
        self._mark = (self.state.tokens, self._began)
        self.model.train()
        self.progress.start(self.state.step, self.plan.steps, "training")
        return self

    def __exit__(self, *_: object) -> None:
        if self._log is not None:
            self._log.close()
        self.progress.close()

    def _load(self) -> None:
        """The newest checkpoint's state and weights, if there is one."""
        folder = newest_checkpoint(self.output)
        if folder is not None:
            self.state = checkpoint.load_state(folder, self.identity)
            checkpoint.load_weights(folder, self.model, self.optimizer)
        if self.state.step > self.plan.steps:
            raise ValueError(f"{self.output} is at step {self.state.step}, past steps={self.plan.steps}")
        self._saved = (self.state.step if folder else None, self.state.nll)
        self.ranks.same_weights(self.model.parameters())

    def to_its_end(self, stop: StopSignals) -> None:
        """All steps, evaluations and checkpoints that are left."""
        while True:
            if self.is_evaluation_due():
                self.evaluate(stop)
            stopping = self.ranks.any(stop.requested)
            if self.is_save_due() or stopping:
                self.save()
            if self.is_over() and not self.is_evaluation_due():
                break
            if stopping:
                raise TrainingInterrupted(self.state.step, checkpoint_folder(self.output, self.state.step))
            self.step()
        if self.state.step < self.plan.steps:
            self.progress.say(
                f"ended early, after step {self.state.step:,}: {self.state.stale} evaluations in a row were "
                f"no better than that of step {self.state.best_step:,} (patience)"
            )

    def is_over(self) -> bool:
        patience = self.settings.patience
        return self.state.step == self.plan.steps or 0 < patience <= self.state.stale

    def is_evaluation_due(self) -> bool:
        step = self.state.step
        due = step % self.plan.eval_every == 0 or step == self.plan.steps
        known = self.state.nll is not None and self.state.evaluated_step == step
        return self.validation is not None and due and not known

    def is_save_due(self) -> bool:
        step, best = self.state.step, self.state.best_step
        # The weights of step 0 are kept for the end, where they may be the best.
        due = step == best or self.is_over() or (step > 0 and step % self.settings.save_every == 0)
        return due and self._saved != (step, self.state.nll)

    def step(self) -> None:
        """One step of the optimizer, over an accumulation group."""
        state, settings = self.state, self.settings
        own, batches = self._batches()
        tokens = int(self.ranks.total(sum(label_count(batch) for batch, _, _ in own))[0])
        rate = self.plan.learning_rate_at(state.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = 0.0
        # One denominator for the group: batches with more labels weigh more, as in one big batch.
        denominator = torch.tensor(max(1, tokens), device=self.device)
        for batch, place, _ in own:
            # A batch has a dropout of its own, whoever works on it.
            torch.manual_seed(mixed_seed(settings.seed, "batch", state.step * batches + place))
            part = self.model(**batch, num_items_in_batch=denominator).loss
            part.backward()
            loss += part.item()
        self.ranks.add_gradients(self.parameters)
        loss = self.ranks.total(loss)[0]
        clipped = torch.nn.utils.clip_grad_norm_(self.parameters, settings.max_grad_norm or math.inf)
        norm = (clipped.full_tensor() if isinstance(clipped, DTensor) else clipped).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise FloatingPointError(self._what_to_try(loss, norm))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.tokens += tokens
        state.seconds = self._seconds_before + time.monotonic() - self._began
        self.progress.advance(state.step)
        if state.step % settings.log_every == 0 or state.step == self.plan.steps:
            self._log_step(loss, norm, rate, own, tokens)

    def evaluate(self, stop: StopSignals) -> None:
        """Validation nll of the pair, and once of the LM alone; abandoned if a signal comes."""
        state, scorer, size = self.state, self.scorer, self.settings.batch_size
        chosen = self.validation
        if chosen is None:
            return
        self.model.eval()
        try:
            if state.lm_nll is None and scorer.knows_lm(chosen):
                alone = scorer.score(chosen, size, scorer.lm_alone, stop)
                state.lm_nll = None if alone is None else alone.nll
            score = scorer.score(chosen, size, scorer.pair, stop)
            if score is None:
                return
            if not sum(score.labels):
                raise ValueError(f"validation has no label to score: all after the start are {IGNORED}")
            for nll in (score.nll, state.lm_nll or 0.0):
                if not math.isfinite(nll):
                    raise FloatingPointError(self._what_to_try(nll, None))
            measured = {} if self.measure is None else {"measured": dict(self.measure(state.step))}
        finally:
            self.model.train()
        best = state.evaluated(score)
        state.seconds = self._seconds_before + time.monotonic() - self._began
        figures = {"nll": state.nll, "lm_nll": state.lm_nll, "best": best}
        self._record({"step": state.step, "evaluation": True, **figures, **measured})
        self._mark = (state.tokens, time.monotonic())

    def save(self) -> None:
        """A checkpoint of this step; older ones make room."""
        there = self._saved[0] == self.state.step
        weights = None if there else checkpoint.whole_weights(self.model, self.optimizer)
        with self.ranks.first_alone(), self._writing(f"checkpoint-{self.state.step}"):
            if self._log is not None:
                in_place = self._log.is_in_place()
                if not in_place and self._log.path.exists():
                    raise OSError("another run has taken the folder's place")
                checkpoint.save_checkpoint(self.output, self.model, weights, self.state, self.identity)
                if not in_place:
                    raise FileNotFoundError("the folder was removed; this checkpoint is in a new one")
                keep = self.settings.keep_checkpoints
                checkpoint.prune_checkpoints(self.output, keep, self.state.best_step)
        self._saved = (self.state.step, self.state.nll)

    def publish(self) -> None:
        """The model of the best step, or of the last one, as the run's."""
        best = self.state.best_step
        with self.ranks.first_alone(), self._writing("the model"):
            if self.ranks.is_first:
                checkpoint.publish(self.output, self.state.step if best is None else best)

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        """Says of an error what could not be written, and what is kept.

        Raises:
            OSError: for one, and for safetensors' own.
        """
        try:
            yield
        except (OSError, SafetensorError) as error:
            newest = newest_checkpoint(self.output)
            kept = f"{newest} is whole: go on from it with resume (--resume)"
            if newest is None:
                kept = "nothing is saved there"
            told = _SYSTEM_ERROR.search(str(error))  # safetensors hands the number on in words
            number = int(told[1]) if told else getattr(error, "errno", None)
            reason = str(error) if number is None else os.strerror(number)
            text = f"{what} cannot be written to {self.output}: {reason}; {kept}"
            raise (OSError(text) if number is None else OSError(number, text)) from error

    def _batches(self) -> tuple[list[Batch], int]:
        """This rank's batches of the next step, and how many all ranks have together."""
        example = functools.cache(self.training.examples.__getitem__)
        groups = self.order.of_step(self.state.step)
        if self.settings.sort_by_length:
            size = self.settings.batch_size
            order = sorted((i for group in groups for i in group), key=lambda i: len(example(i)["input_ids"]))
            groups = [order[start : start + size] for start in range(0, len(order), size)]
        return self.scorer.batches(groups, example), len(groups)

    def _log_step(self, loss: float, norm: float, rate: float, own: list[Batch], tokens: int) -> None:
        state = self.state
        lm_loss = None
        if self.scorer.knows_lm(self.training):
            nll = sum(self.scorer.lm_alone(self.training, indices, batch) for batch, _, indices in own)
            lm_loss = self.ranks.total(nll)[0] / max(1, tokens)
        now = time.monotonic()
        done = state.step - self._first_step
        left = (now - self._began) / done * (self.plan.steps - state.step)
        speed = (state.tokens - self._mark[0]) / max(now - self._mark[1], 1e-9)
        self._mark = (state.tokens, now)
        self._record(
            {
                "step": state.step,
                "loss": loss,
                "lm_loss": lm_loss,
                "gradient_norm": norm,
                "learning_rate": rate,
                "tokens": state.tokens,
                "tokens_per_second": round(speed, 1),
                "seconds": round(state.seconds, 3),
                "seconds_left": round(left, 1),
            }
        )

    def _record(self, record: dict[str, Any]) -> None:
        with self.ranks.first_alone(), self._writing("the log"):
            if self._log is not None:
                self._log.write(record)
        self.progress.record(record)

    def _is_past(self, record: dict[str, Any]) -> bool:
        if not record.get("evaluation"):
            return bool(record["step"] <= self.state.step)
        return self.state.nll is not None and bool(record["step"] <= self.state.evaluated_step)

    def _what_to_try(self, loss: float, norm: float | None) -> str:
        if not self.state.step and norm is None:
            return (
                f"the validation loss is {loss} before the first step: load the base in float32 (dtype), or "
                "look at its weights"
            )
        # Steps count from 1 for people.
        if norm is None:
            what = f"the validation loss is {loss} after step {self.state.step}"
        else:
            what = f"the loss is {loss} and the gradient's norm {norm} in step {self.state.step + 1}"
        newest = newest_checkpoint(self.output)
        kept = f"; {newest} is kept" if newest else ""
        return (
            f"{what}: try a lower learning_rate (it is {self.plan.learning_rate}), a longer warmup_steps "
            f"({self.plan.warmup_steps}), max_grad_norm=1.0 ({self.settings.max_grad_norm}), or "
            f"the base in float32{kept}"
        )


def _as_set(examples: ExampleSet | Items) -> ExampleSet:
    return examples if isinstance(examples, ExampleSet) else ExampleSet(examples)


def _optimizer(model: Any, plan: Plan, betas: tuple[float, float]) -> torch.optim.AdamW:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("model has no parameter that requires a gradient; there is nothing to train")
    matrices = [p for p in trainable if p.dim() >= 2]
    others = [p for p in trainable if p.dim() < 2]  # biases and norms are not pulled to 0
    decays = ((matrices, plan.weight_decay), (others, 0.0))
    groups = [{"params": some, "weight_decay": decay} for some, decay in decays if some]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=betas)
