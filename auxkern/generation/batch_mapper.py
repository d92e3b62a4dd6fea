"""Texts for the rows of a table, batch by batch, as Ray Data's ``map_batches`` asks for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from auxkern.generation.completion import Completion
from auxkern.generation.engine import Engine
from auxkern.generation.request import REQUEST_FIELDS, Request, check_id
from auxkern.model.opening import open_models, open_pair

_WRITTEN = ("sample", "text", "finish_reason", "prompt_tokens", "new_tokens", "seed", "token_ids", "error")


class BatchMapper:
    """Writes texts for the rows of a batch; models are loaded once, when it is made.

        ray.data.read_json("requests.jsonl").map_batches(
            BatchMapper,
            fn_constructor_kwargs={"pair": "out/keywords", "defaults": {"max_new_tokens": 64}},
            batch_size=256,
            concurrency=4,
            num_gpus=1,
        )

    Ray starts ``concurrency`` processes, gives each its GPU and starts a lost one again; this knows nothing
    of Ray. A row's texts depend on its own id and fields alone, so they are those of ``auxkern generate``,
    however rows are cut into batches. Batches of several times ``slots`` rows keep the engine full.

    Args:
        pair: folder or Hub name of an ``AuxTunedForCausalLM``.
        defaults: what rows leave out, as ``Request.from_record`` reads it; seed 0 unless it says.
        models: folder or Hub name of language models that members of rows name, as
            ``auxkern.model.open_models`` takes them.
        carry: names of columns that are handed through with each text; they are no fields of requests.
        slots, max_length, max_condition: of the ``Engine``.
        opening: more for ``auxkern.model.open_pair``, such as base, device or dtype.

    Raises:
        OSError, ValueError: the pair or one of the models cannot be loaded, or a default is out of range.
        TypeError: a default has the wrong type.
    """

    def __init__(
        self,
        pair: str,
        *,
        defaults: Mapping[str, Any] | None = None,
        models: Mapping[str, str] | None = None,
        carry: Sequence[str] = (),
        slots: int = 32,
        max_length: int = 512,
        max_condition: int = 64,
        **opening: Any,
    ) -> None:
        self._defaults = Request.from_record({"seed": 0, **(defaults or {})}, id="defaults")
        self._carry = tuple(carry)
        taken = [name for name in self._carry if name in (*REQUEST_FIELDS, *_WRITTEN)]
        if taken:
            raise ValueError(f"carry names {taken[0]!r}, which is a field of requests or texts; leave it out")
        model, text_format = open_pair(pair, **opening)
        alike = {name: opening[name] for name in ("dtype", "compute") if name in opening}
        self._engine = Engine(
            model,
            text_format,
            models=open_models(models or {}, model, text_format.tokenizer, **alike),
            slots=slots,
            max_length=max_length,
            max_condition=max_condition,
        )

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The texts of a batch.

        Args:
            batch: columns of N values each: id, and any of the other fields of ``Request.from_record``.

        Returns:
            Columns of M >= N values, in the rows' order, for a row may ask for several samples: id, the
            carried ones, and sample, text, finish_reason, prompt_tokens, new_tokens, seed, token_ids and
            error, as in ``Completion``. A row that cannot be answered has its error, and costs no other.

        Raises:
            ValueError: there is no column id, a column is no field and not carried, or columns differ in
                length.
        """
        self._check(batch)
        count = len(batch["id"])
        names = [name for name in batch if name not in self._carry]
        asked: dict[int, Request] = {}
        answers: dict[int, list[Completion]] = {}
        for i in range(count):
            record = {name: _plain_value(batch[name][i]) for name in names}
            check_id(record["id"])
            try:
                asked[i] = Request.from_record(record, self._defaults)
            except (TypeError, ValueError) as error:
                answers[i] = [Completion(record["id"], 0, "", (), "error", 0, error=str(error))]
        # By their places: two rows may have one id, which is in their seeds already.
        for one in self._engine.generate([replace(request, id=i) for i, request in asked.items()]):
            answers.setdefault(int(one.id), []).append(one)
        rows = [(i, one) for i in range(count) for one in answers[i]]
        columns = {name: [_plain_value(batch[name][i]) for i, _ in rows] for name in ("id", *self._carry)}
        columns |= {name: [one.as_record().get(name) for _, one in rows] for name in _WRITTEN}
        # Of objects, one by one: numpy would make lists of one length into a matrix.
        return {name: np.fromiter(values, object, len(rows)) for name, values in columns.items()}

    def _check(self, batch: Mapping[str, Any]) -> None:
        if "id" not in batch:
            raise ValueError(
                f"the batch has no column 'id', only {', '.join(batch)}; a row's seed is made from it"
            )
        missing = [name for name in self._carry if name not in batch]
        if missing:
            raise ValueError(f"carry names {missing[0]!r}, but the batch has {', '.join(batch)}")
        unknown = [name for name in batch if name not in (*REQUEST_FIELDS, *self._carry, "text")]
        if unknown:
            raise ValueError(
                f"a request has no field {unknown[0]!r}; drop the column, or name it in carry. Known are "
                f"{', '.join(REQUEST_FIELDS)}"
            )
        lengths = {name: len(values) for name, values in batch.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the batch's columns differ in length: {lengths}")


def _plain_value(value: Any) -> Any:
    """A number, str or list in place of numpy's."""
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value
