"""The sampling kernels on a CUDA device: real vocabularies, graphs, and what only a device can show.

The tests of the operator run on the device as well (``cases.available_backends``).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import auxkern
from auxkern import Head, Logits, SamplingParams, Sparse

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PARAMS = {
    "plain": {},
    "greedy": {"temperature": 0},
    "top-k": {"top_k": 50},
    "top-p": {"top_p": 0.9},
    "min-p": {"min_p": 0.02},
    "all": {"temperature": 0.8, "top_k": 400, "top_p": 0.95, "min_p": 1e-3},
}


def logits(N: int, V: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    source = torch.Generator("cuda").manual_seed(seed)
    return (3 * torch.randn(N, V, generator=source, device="cuda")).to(dtype)


def seeds(N: int) -> Tensor:
    return torch.arange(N, device="cuda") * 2**33 + 5


@pytest.mark.parametrize("V", [50257, 128256, 262144])
@pytest.mark.parametrize("N", [1, 20, 300])
@pytest.mark.parametrize("settings", PARAMS.values(), ids=PARAMS)
def test_equals_the_reference(settings, N, V):
    terms = [logits(N, V), logits(N, V, torch.float32, 1)]
    params = SamplingParams(**settings)
    made, wanted = (
        auxkern.sample(terms, params, seed=seeds(N), position=9, return_logprobs=True, backend=name)
        for name in ("triton", "reference")
    )
    # A share of float32's rounding decides between the two best of a row about once in 1e5 rows.
    assert (made.tokens != wanted.tokens).sum() <= N // 100
    same = made.tokens == wanted.tokens
    torch.testing.assert_close(
        made.processed_logprob[same], wanted.processed_logprob[same], rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("settings", PARAMS.values(), ids=PARAMS)
def test_graph_replays_equal_eager_calls_and_are_not_constant(settings):
    N, V = 8, 32000
    terms = [logits(N, V), Logits(logits(N, V, seed=1), scale=torch.rand(N, device="cuda"))]
    position = torch.zeros(N, dtype=torch.int64, device="cuda")
    history = torch.full((N, 16), -1, device="cuda")
    params = SamplingParams(**settings)

    def draw() -> Tensor:
        drawn = auxkern.sample(
            terms, params, seed=seeds_, position=position, history=history, backend="triton"
        )
        return drawn.tokens

    seeds_ = seeds(N)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        draw()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = draw()
    found = []
    for step in range(100):
        position.fill_(step)
        graph.replay()
        found.append(static.clone())
        assert torch.equal(found[-1], draw())
    different = len({tuple(t.tolist()) for t in found})
    assert different == 1 if settings.get("temperature") == 0 else different > 50


@pytest.mark.parametrize("settings", PARAMS.values(), ids=PARAMS)
def test_flat_rows_have_more_ids_at_their_threshold_than_lists_hold(settings):
    z = torch.zeros(3, 128256, device="cuda")
    z[1:] = 1e-5 * logits(2, 128256, torch.float32)
    tokens = [
        auxkern.sample(z, SamplingParams(**settings), seed=seeds(3), position=2, backend=name).tokens
        for name in ("triton", "reference")
    ]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("settings", PARAMS.values(), ids=PARAMS)
def test_heads_beside_a_pointer_equal_the_reference(settings):
    N, V = 20, 50257
    terms = [
        Head(logits(N, 64, torch.float32), logits(V, 64, seed=1) / 8),
        Head(logits(N, 32, torch.float32, 2), logits(V, 32, torch.float32, 3) / 8),
        Sparse(torch.randint(V, (N, 9), device="cuda"), logits(N, 9, torch.float32, 4)),
    ]
    tokens = [
        auxkern.sample(terms, SamplingParams(**settings), seed=seeds(N), position=2, backend=name).tokens
        for name in ("triton", "reference")
    ]
    # Products of three parts are float32's but for the last bits.
    assert (tokens[0] != tokens[1]).sum() <= 1


@pytest.mark.parametrize("settings", PARAMS.values(), ids=PARAMS)
def test_no_host_synchronisation(settings):
    terms: list[Any] = [Head(logits(8, 64), logits(5000, 64)), logits(8, 5000)]
    params, seed = SamplingParams(**settings), seeds(8)
    auxkern.sample(terms, params, seed=seed, position=0, backend="triton")
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        auxkern.sample(terms, params, seed=seed, position=0, return_logprobs=True, backend="triton")
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("V", [32000, 262144])
def test_tokens_lie_in_a_large_vocabulary(V):
    row = logits(1, V).expand(10_000, -1)
    drawn = auxkern.sample(row, seed=seeds(10_000), position=0, backend="triton")
    assert (drawn.status == 0).all()
    assert ((drawn.tokens >= 0) & (drawn.tokens < V)).all()


def test_last_row_beyond_2_31_logits():
    V = 262144
    N = 2**31 // V + 3
    z = torch.zeros(N, V, dtype=torch.float16, device="cuda")
    z[-1, V - 2] = 60000
    for params in (None, SamplingParams(top_k=5)):
        drawn = auxkern.sample(z, params, seed=seeds(N), position=0, backend="triton")
        assert drawn.tokens[-1].item() == V - 2
