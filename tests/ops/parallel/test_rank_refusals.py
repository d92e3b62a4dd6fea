"""What one rank refuses is refused on all of them, and none waits for ever."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support import rank_refusals
from tests.support.launching import run_ranks

# By the call's name: the kind of error, and what both messages say.
REFUSED: dict[str, tuple[type[Exception], str]] = {
    "sparse id, last": (ValueError, "terms[1].ids holds 16, outside [0, 16)"),
    "sparse id": (ValueError, "terms[1].ids holds 16, outside [0, 16)"),
    "sparse id drawn, last": (ValueError, "holds -1, outside [0, 16)"),
    "target beyond, first": (ValueError, "target differs between ranks"),
    "target": (ValueError, "target differs between ranks"),
    "target's rows, last": (ValueError, "so target must have shape (4,)"),
    "target's dtype, first": (TypeError, "target has dtype torch.float32"),
    "whole logits, last": (ValueError, "VocabularyShard of 8 ids, but this rank's terms have 16"),
    "whole logits beside a head, first": (ValueError, "this rank's terms have [8, 16] ids"),
    "vocab_size": (ValueError, "vocab_size is 8, but the ranks have 16 ids"),
    "vocab_size, last": (ValueError, "vocab_size differs between ranks"),
    "vocab_size's type, first": (ValueError, "vocab_size differs between ranks"),
    "label_smoothing, last": (ValueError, "label_smoothing is 2.0"),
    "label_smoothing": (ValueError, "label_smoothing differs between ranks: 0."),
    "return_stats": (ValueError, "return_stats differs between ranks"),
    "gradient": (ValueError, "terms differs between ranks"),
    "terms": (ValueError, "terms differs between ranks"),
    "no terms, last": (ValueError, "terms has 0 entries"),
    "no term, first": (TypeError, "terms[0] is a str"),
    "scale": (ValueError, "terms differs between ranks"),
    "group or shard": (ValueError, "process_group differs between ranks"),
    "backend, last": (RuntimeError, "backend='triton' cannot run"),
    "seed": (ValueError, "seed differs between ranks"),
    "top_logprobs, first": (ValueError, "top_logprobs differs between ranks"),
    "params, last": (TypeError, "params must be auxkern.SamplingParams"),
    "rows, last": (ValueError, "this rank's terms have [0, 8] ids"),
    "fsdp": (ValueError, "whose dimension has no name"),
    "fsdp, named": (ValueError, "whose dimension is called 'dp'"),
    "fsdp, same target": (ValueError, "inside the forward of its FSDP2 module"),
    "fsdp drawn": (ValueError, "inside the forward of its FSDP2 module"),
    "fsdp, group": (ValueError, "target differs between ranks"),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(rank_refusals.rank_result, tmp_path_factory.mktemp("refusals"), 2, seconds=120)


@pytest.mark.parametrize("name", list(REFUSED))
def test_every_rank_refuses_what_one_refuses(found: list[dict[str, Any]], name: str) -> None:
    kind, sentence = REFUSED[name]
    for rank, one in enumerate(found):
        error = one["found"][name]
        assert type(error) is kind, (rank, error)
        assert sentence in str(error), (rank, str(error))
    wrong_on = {"first": 0, "last": 1}.get(name.rpartition(", ")[2])
    if wrong_on is not None and "differs" not in sentence:
        assert f"rank {wrong_on} of the process group refuses" in str(found[1 - wrong_on]["found"][name])


def test_calls_without_rows_and_of_a_single_row_are_taken(found: list[dict[str, Any]]) -> None:
    z, target = found[0]["whole"][0], found[0]["target"][0]
    for one in found:
        got = one["found"]
        assert torch.equal(got["no rows"], torch.zeros(()))
        assert torch.equal(got["no rows of a head"], torch.zeros(()))
        assert got["no rows drawn"].shape == got["no rows filtered"].shape == (0,)
        torch.testing.assert_close(got["0-d"], torch.nn.functional.cross_entropy(z, target))
        # All ids of the head have the same logit.
        torch.testing.assert_close(got["0-d head"], torch.tensor(float(rank_refusals.V)).log())
        assert got["0-d drawn"] == ()
