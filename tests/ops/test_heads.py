"""Output heads and sparse terms: equal to the dense sum in float64, with bounded memory.

The expectation writes every logit, adds the terms and asks ``F.cross_entropy`` and autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import auxkern
from auxkern import Head, Logits, Sparse
from auxkern.backends.chunked import default_chunk_rows
from auxkern.core.loss import Loss
from auxkern.ops.torch_ops import _encoded
from tests.support.cases import IGNORE, available_backends, device_of, generator, peak_extra_bytes

N, V, D_LM, D_AUX, K = 23, 301, 13, 7, 3
backends = pytest.mark.parametrize("backend", available_backends())

# float32 sums of D products and of V exponentials in unspecified order; relative to the largest entry.
FLOAT32 = 4e-6
FLOAT64 = 1e-10


def inputs(dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """The same numbers in any dtype that holds them; float16 values, so that all dtypes do."""
    g = generator(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).half().to(device, dtype)

    found = {
        "h_lm": random(N, D_LM),
        "w_lm": random(V, D_LM) / 4,
        "h_aux": random(N, D_AUX),
        "w_aux": random(V, D_AUX) / 4,
        "bias": random(V),
        "logits": random(N, V),
        "values": 3 * random(N, K),
    }
    for name in ("h_aux", "w_aux", "bias", "logits", "values"):
        found[name].requires_grad_()
    found["ids"] = torch.randint(0, V, (N, K), generator=g).to(device)
    found["ids"][3] = found["ids"][3, 0]  # equal ids add up
    return found


def targets(device: str = "cpu") -> Tensor:
    y = torch.randint(0, V, (N,), generator=generator(2))
    y[4], y[11], y[0] = IGNORE, IGNORE, V - 1
    return y.to(device)


def cap(x: Tensor, softcap: float | None) -> Tensor:
    return x if softcap is None else softcap * torch.tanh(x / softcap)


Sum = tuple[Callable[[dict[str, Tensor]], list[Any]], Callable[[dict[str, Tensor]], Tensor], tuple[str, ...]]

SUMS: dict[str, Sum] = {
    "two heads": (
        lambda t: [Head(t["h_lm"], t["w_lm"]), Head(t["h_aux"], t["w_aux"])],
        lambda t: t["h_lm"] @ t["w_lm"].T + t["h_aux"] @ t["w_aux"].T,
        ("h_aux", "w_aux"),
    ),
    "three heads (DExperts)": (
        lambda t: [
            Head(t["h_lm"], t["w_lm"]),
            Head(t["h_aux"], t["w_aux"], t["bias"], scale=0.7),
            Head(t["h_aux"], t["w_aux"], scale=-0.7),
        ],
        lambda t: (
            t["h_lm"] @ t["w_lm"].T
            + 0.7 * (t["h_aux"] @ t["w_aux"].T + t["bias"])
            - 0.7 * (t["h_aux"] @ t["w_aux"].T)
        ),
        ("bias",),
    ),
    "shared head": (
        lambda t: [Head(t["h_aux"] + 1, t["w_aux"])],
        lambda t: (t["h_aux"] + 1) @ t["w_aux"].T,
        ("h_aux", "w_aux"),
    ),
    "soft-capped head with bias": (
        lambda t: [Head(t["h_lm"], t["w_lm"]), Head(t["h_aux"], t["w_aux"], t["bias"], 0.5, 2.0)],
        lambda t: t["h_lm"] @ t["w_lm"].T + 0.5 * cap(t["h_aux"] @ t["w_aux"].T + t["bias"], 2.0),
        ("h_aux", "w_aux", "bias"),
    ),
    "head, logits and pointer": (
        lambda t: [
            Sparse(t["ids"], t["values"]),
            Head(t["h_aux"], t["w_aux"]),
            Logits(t["logits"], 0.5, 3.0),
        ],
        lambda t: (t["h_aux"] @ t["w_aux"].T + 0.5 * cap(t["logits"], 3.0)).scatter_add(
            1, t["ids"], t["values"]
        ),
        ("h_aux", "w_aux", "logits", "values"),
    ),
    "logits and pointer": (
        lambda t: [t["logits"], Sparse(t["ids"], t["values"])],
        lambda t: t["logits"].scatter_add(1, t["ids"], t["values"]),
        ("logits", "values"),
    ),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 0.01},
    "sum": {"reduction": "sum"},
    "stats": {"return_stats": True},
}


def expected_loss(z: Tensor, y: Tensor, options: dict[str, Any]) -> Tensor:
    reduction = options.get("reduction", "mean")
    loss = F.cross_entropy(z, y, label_smoothing=options.get("label_smoothing", 0.0), reduction=reduction)
    return loss + options.get("z_loss", 0.0) * torch.logsumexp(z, -1)[y != IGNORE].square().mean()


def loss_of(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def assert_close(got: Tensor, want: Tensor, tolerance: float, name: str) -> None:
    error = (got.double() - want).abs().max().item()
    assert error <= tolerance * max(1e-30, want.abs().max().item()), (name, error)


@backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("case", SUMS.values(), ids=SUMS.keys())
def test_equals_the_dense_sum(
    backend: str, case: Sum, options: dict[str, Any], dtype: torch.dtype, poisoned_memory: None
) -> None:
    if dtype == torch.float64 and backend != "reference":
        pytest.skip(f"{backend} sums in float32")
    terms, dense, differentiated = case
    ours, exact = inputs(dtype, device_of(backend)), inputs(torch.float64)
    y = targets()
    loss = loss_of(auxkern.cross_entropy(terms(ours), y.to(device_of(backend)), backend=backend, **options))
    loss.backward()
    want = expected_loss(dense(exact), y, options)
    want.backward()
    tolerance = FLOAT64 if dtype == torch.float64 else FLOAT32
    assert_close(loss.cpu(), want, tolerance, "loss")
    for name in differentiated:
        assert_close(ours[name].grad.cpu(), exact[name].grad, tolerance, name)
    assert ours["h_lm"].grad is None
    assert ours["w_lm"].grad is None


@backends
@pytest.mark.parametrize("upstream", [1.0, -3.0])
@pytest.mark.parametrize("chunk_rows", [1, 5, 1024])
def test_chunks_and_incoming_gradients_change_nothing(backend: str, chunk_rows: int, upstream: float) -> None:
    terms, dense, differentiated = SUMS["head, logits and pointer"]
    ours, exact, y = inputs(torch.float32, device_of(backend)), inputs(torch.float64), targets()
    loss = auxkern.cross_entropy(
        terms(ours), y.to(device_of(backend)), chunk_rows=chunk_rows, backend=backend
    )
    (upstream * loss).backward()
    (upstream * expected_loss(dense(exact), y, {})).backward()
    for name in differentiated:
        assert_close(ours[name].grad.cpu(), exact[name].grad, FLOAT32, name)


@backends
def test_rows_of_reduction_none_weigh_the_weight_gradient(backend: str) -> None:
    terms, dense, _ = SUMS["two heads"]
    ours, exact, y = inputs(torch.float32, device_of(backend)), inputs(torch.float64), targets()
    incoming = torch.randn(N, generator=generator(3))
    rows = auxkern.cross_entropy(terms(ours), y.to(device_of(backend)), reduction="none", backend=backend)
    rows.backward(incoming.to(device_of(backend)))
    F.cross_entropy(dense(exact), y, reduction="none").backward(incoming.double())
    assert_close(ours["w_aux"].grad.cpu(), exact["w_aux"].grad, FLOAT32, "w_aux")


@backends
def test_backward_twice(backend: str) -> None:
    terms, _, _ = SUMS["two heads"]
    ours, y = inputs(torch.float32, device_of(backend)), targets(device_of(backend))
    loss = auxkern.cross_entropy(terms(ours), y, backend=backend)
    first = torch.autograd.grad(loss, ours["w_aux"], retain_graph=True)[0].clone()
    torch.testing.assert_close(torch.autograd.grad(2 * loss, ours["w_aux"])[0], 2 * first)


@backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_heads_round_no_logit(backend: str, dtype: torch.dtype) -> None:
    g, device = generator(4), device_of(backend)
    hidden, weight = torch.randn(N, 64, generator=g).to(dtype), torch.randn(V, 64, generator=g).to(dtype)
    y = targets()
    exact = expected_loss(hidden.double() @ weight.double().T, y, {})
    ours = auxkern.cross_entropy([Head(hidden.to(device), weight.to(device))], y.to(device), backend=backend)
    assert_close(ours.cpu(), exact, FLOAT32, "loss")


@backends
def test_a_pointer_that_takes_a_sure_token_away_and_back(backend: str) -> None:
    # p = 0.999 to 0: correcting a sum that was made with the token would cancel
    device = device_of(backend)
    z = torch.zeros(2, V)
    z[:, 5] = 13.0
    pointer = Sparse(
        torch.tensor([[5, 5], [5, 6]], device=device),
        torch.tensor([[-30.0, -30.0], [30.0, 0.0]], device=device),
    )
    y = torch.tensor([7, 5])
    exact = z.double().scatter_add(1, pointer.ids.cpu(), pointer.values.cpu().double())
    rows = auxkern.cross_entropy([z.to(device), pointer], y.to(device), reduction="none", backend=backend)
    want = F.cross_entropy(exact, y, reduction="none")
    torch.testing.assert_close(rows.cpu().double(), want, rtol=1e-6, atol=1e-11)


@backends
def test_ignored_rows_are_not_read(backend: str) -> None:
    if device_of(backend) != "cpu":
        pytest.skip("finding ignored rows would stop a GPU")
    ours, y = inputs(torch.float32), targets()
    with torch.no_grad():
        ours["h_aux"][y == IGNORE] = torch.nan
    loss = auxkern.cross_entropy([Head(ours["h_aux"], ours["w_aux"])], y, backend=backend)
    loss.backward()
    assert bool(loss.isfinite())
    assert bool(ours["w_aux"].grad.isfinite().all())
    assert bool((ours["h_aux"].grad[y == IGNORE] == 0).all())


@backends
@pytest.mark.parametrize("rows", [0, N])
def test_nothing_to_learn_is_zero_and_connected(backend: str, rows: int) -> None:
    ours, device = inputs(torch.float32, device_of(backend)), device_of(backend)
    y = torch.full((rows,), IGNORE, device=device)
    head = Head(ours["h_aux"][:rows], ours["w_aux"])
    loss = auxkern.cross_entropy([head], y, backend=backend)
    loss.backward()
    assert loss.item() == 0
    assert bool((ours["w_aux"].grad == 0).all())


@backends
def test_stats_tell_the_terms_apart(backend: str) -> None:
    device = device_of(backend)
    ours, exact, y = inputs(torch.float32, device), inputs(torch.float64), targets()
    terms = [Head(ours["h_lm"], ours["w_lm"]), Head(ours["h_aux"], ours["w_aux"], scale=2.0)]
    _, stats = auxkern.cross_entropy(terms, y.to(device), return_stats=True, backend=backend)
    shares = [exact["h_lm"] @ exact["w_lm"].T, 2 * exact["h_aux"] @ exact["w_aux"].T]
    counts = y != IGNORE
    for found, z in zip((stats.nll, *stats.term_nll), (shares[0] + shares[1], *shares), strict=True):
        want = F.cross_entropy(z, y, reduction="none")
        torch.testing.assert_close(found.cpu().double(), want.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(stats.argmax.cpu()[counts], (shares[0] + shares[1]).argmax(-1)[counts])


@backends
def test_shift_and_shared_vocabulary(backend: str) -> None:
    device, g = device_of(backend), generator(5)
    hidden = torch.randn(2, 6, D_AUX, generator=g)
    padded, narrow = torch.randn(V + 3, D_AUX, generator=g), torch.randn(V, D_AUX, generator=g)
    padded.requires_grad_()
    labels = torch.randint(0, V, (2, 6), generator=g)
    terms = [Head(hidden.to(device), padded.to(device)), Head(hidden.to(device), narrow.to(device))]
    with pytest.raises(
        ValueError, match=rf"terms\[1\]\.weight has {V} ids but terms\[0\]\.weight has {V + 3}"
    ):
        auxkern.cross_entropy(terms, labels.to(device), backend=backend)
    loss = auxkern.cross_entropy(terms, labels.to(device), shift=True, vocab_size=V, backend=backend)
    loss.backward()
    z = hidden.double() @ (padded.double()[:V] + narrow.double()).T
    want = F.cross_entropy(z[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))
    assert_close(loss.cpu(), want.detach(), FLOAT32, "loss")
    assert bool((padded.grad[V:] == 0).all())


def test_compiled_equals_eager() -> None:
    ours, y = inputs(torch.float32), targets()

    def loss(h: Tensor, w: Tensor, v: Tensor) -> Tensor:
        terms = [Head(ours["h_lm"], ours["w_lm"]), Head(h, w), Sparse(ours["ids"], v)]
        return auxkern.cross_entropy(terms, y, label_smoothing=0.1)

    arguments = (ours["h_aux"], ours["w_aux"], ours["values"])
    eager = torch.autograd.grad(loss(*arguments), arguments)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*arguments), arguments)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


@backends
def test_opcheck(backend: str) -> None:
    ours = {k: v.detach() for k, v in inputs(torch.float32, device_of(backend)).items()}
    tensors = [ours["h_lm"], ours["w_lm"], ours["h_aux"], ours["w_aux"], ours["ids"], ours["values"]]
    y, weight = targets(device_of(backend)), torch.rand(N, device=device_of(backend))
    terms = [Head(*tensors[:2]), Head(*tensors[2:4], scale=0.5), Sparse(*tensors[4:])]
    settings = (*_encoded(terms, Loss(IGNORE, 0.1, 0.01), 8), V)
    torch.library.opcheck(torch.ops.auxkern.losses.default, (tensors, y, *settings, backend))
    sums = [torch.rand(N, generator=generator(i)).to(weight.device) for i in range(3)]
    arguments = (tensors, y, weight, sums, *settings, [2, 3, 5], backend)
    torch.library.opcheck(torch.ops.auxkern.gradients.default, arguments)


def test_gradcheck() -> None:
    ours, y = inputs(torch.float64), targets()

    def loss(h: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
        terms = [Head(ours["h_lm"], ours["w_lm"]), Head(h, w, b, 0.7, 2.0), Sparse(ours["ids"], v)]
        return auxkern.cross_entropy(terms, y, z_loss=0.01, chunk_rows=7, backend="reference")

    names = ("h_aux", "w_aux", "bias", "values")
    assert torch.autograd.gradcheck(loss, tuple(ours[n] for n in names), fast_mode=True)


@pytest.mark.parametrize("rows", [512, 2048])
def test_memory_does_not_grow_with_rows(rows: int) -> None:
    ids, width = 8000, 16
    g = generator(6)
    h_lm, w_lm = torch.randn(rows, width, generator=g), torch.randn(ids, width, generator=g)
    h_aux = torch.randn(rows, width, generator=g).requires_grad_()
    w_aux = torch.randn(ids, width, generator=g).requires_grad_()
    y = torch.randint(0, ids, (rows,), generator=g)

    def step() -> None:
        h_aux.grad = w_aux.grad = None
        auxkern.cross_entropy([Head(h_lm, w_lm), Head(h_aux, w_aux)], y, chunk_rows=64).backward()

    step()
    chunk, results = 64 * ids * 4, (ids + rows) * width * 4
    # twice the results: what is collected and what is handed over; 4 MiB of scratch and allocator slack
    assert peak_extra_bytes(step, "cpu") <= chunk + 2 * results + (4 << 20)
    assert rows * ids * 4 > 3 * (chunk + 2 * results)


def test_default_chunks_are_bounded() -> None:
    for vocabulary in (1000, 49_152, 262_144, 10_000_000):
        rows = default_chunk_rows(vocabulary, torch.device("cpu"))
        assert rows >= 16
        assert rows * vocabulary * 4 <= max(48 << 20, 16 * vocabulary * 4)


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "widths": (
        lambda: Head(torch.zeros(2, 3), torch.zeros(5, 4)),
        ValueError,
        "Head.hidden is 3 wide but Head.weight is 4",
    ),
    "bias": (
        lambda: Head(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(4)),
        ValueError,
        r"Head.bias has shape \(4,\)",
    ),
    "weight": (
        lambda: Head(torch.zeros(2, 3), torch.zeros(5)),
        ValueError,
        "Head.weight has 1 dimension",
    ),
    "ids": (
        lambda: Sparse(torch.zeros(2, 3), torch.zeros(2, 3)),
        TypeError,
        "Sparse.ids must be an integer tensor",
    ),
    "shapes": (
        lambda: Sparse(torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 3)),
        ValueError,
        r"Sparse.ids has shape \(2, 4\)",
    ),
    "only sparse": (
        lambda: auxkern.cross_entropy(
            [Sparse(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1))], torch.tensor([0])
        ),
        ValueError,
        "terms are all Sparse",
    ),
    "id range": (
        lambda: auxkern.cross_entropy(
            [torch.zeros(1, 3), Sparse(torch.tensor([[3]]), torch.zeros(1, 1))], torch.tensor([0])
        ),
        ValueError,
        r"terms\[1\].ids holds 3, outside \[0, 3\)",
    ),
    "chunk rows": (
        lambda: auxkern.cross_entropy([torch.zeros(1, 3)], torch.tensor([0]), chunk_rows=0),
        ValueError,
        "chunk_rows is 0",
    ),
    "target": (
        lambda: auxkern.cross_entropy([Head(torch.zeros(2, 3), torch.zeros(5, 3))], torch.tensor([0, 5])),
        ValueError,
        r"outside \[0, 5\)",
    ),
}


@pytest.mark.parametrize(("call", "error", "text"), BAD.values(), ids=BAD.keys())
def test_bad_input(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()
