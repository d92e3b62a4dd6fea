"""How the operator lives with PyTorch: dispatcher, compiler, autocast, modules, training, choice."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import auxkern
from auxkern.backends import choice
from auxkern.core.loss import Loss
from auxkern.ops.torch_ops import _encoded
from tests.support.cases import (
    available_backends,
    check,
    device_of,
    generator,
    ours,
    random_logits,
    random_target,
)

backends = pytest.mark.parametrize("backend", available_backends())


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# --- the dispatcher ---------------------------------------------------------------------------

V = 37
SCALES, SOFTCAPS = [0.5, 2.0], [None, 5.0]


def operator_inputs(device: str) -> tuple[list[Tensor], Tensor]:
    values = [
        random_logits(2, 3, 40, device=device)[..., :V],
        random_logits(2, 3, V + 2, device=device, seed=1),
    ]
    return values, random_target(6, V=V, device=device, ignored=0.3)


def encoded(values: list[Tensor], loss: Loss) -> tuple[list[int], list[float]]:
    return _encoded(list(map(auxkern.Logits, values, SCALES, SOFTCAPS)), loss, None)


def gradient_arguments(
    values: list[Tensor], target: Tensor, loss: Loss, wanted: list[int], backend: str
) -> tuple[Any, ...]:
    row_weight, *sums = (torch.rand(6, generator=generator(i)).to(target.device) for i in range(4))
    return values, target, row_weight, sums, *encoded(values, loss), V, wanted, backend


@backends
@pytest.mark.parametrize("wants", [(False, False), (True, True)])
def test_opcheck_losses(backend: str, wants: tuple[bool, bool]) -> None:
    values, target = operator_inputs(device_of(backend))
    loss = Loss(label_smoothing=0.1 if wants[0] else 0.0, stats=wants[1])
    arguments = (values, target, *encoded(values, loss), V, backend)
    torch.library.opcheck(torch.ops.auxkern.losses.default, arguments)


@backends
@pytest.mark.parametrize("wanted", [[], [1], [0, 1]])
def test_opcheck_gradients(backend: str, wanted: list[int]) -> None:
    values, target = operator_inputs(device_of(backend))
    arguments = gradient_arguments(values, target, Loss(), wanted, backend)
    torch.library.opcheck(torch.ops.auxkern.gradients.default, arguments)


@backends
@pytest.mark.parametrize("wanted", [[1], [0, 1]])
@pytest.mark.parametrize("options", [(0.0, 0.0, False), (0.1, 0.01, True)])
def test_opcheck_gradients_of_every_loss(
    backend: str, wanted: list[int], options: tuple[float, float, bool]
) -> None:
    values, target = operator_inputs(device_of(backend))
    arguments = gradient_arguments(values, target, Loss(-100, *options), wanted, backend)
    torch.library.opcheck(torch.ops.auxkern.gradients.default, arguments)


@backends
def test_an_empty_batch_passes_the_dispatcher(backend: str) -> None:
    values, target = [torch.empty(0, V)], torch.empty(0, dtype=torch.int64)
    loss = Loss(label_smoothing=0.1, stats=True)
    arguments = (values, target, *_encoded([auxkern.Logits(values[0])], loss, None), V, backend)
    torch.library.opcheck(torch.ops.auxkern.losses.default, arguments)


def test_meta_tensors_give_shapes_without_arithmetic() -> None:
    z = torch.empty(4, 6, 50257, device="meta", dtype=torch.bfloat16, requires_grad=True)
    y = torch.empty(4, 6, device="meta", dtype=torch.int64)
    loss, stats = auxkern.cross_entropy([z, z], y, return_stats=True, label_smoothing=0.1)
    loss.backward()
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert stats.term_nll.shape == (2, 4, 6)
    assert (z.grad.shape, z.grad.dtype) == (z.shape, z.dtype)


# --- the compiler -----------------------------------------------------------------------------

COMPILED_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "none": {"reduction": "none"},
    "stats": {"return_stats": True},
    "everything": {
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "shift": True,
        "vocab_size": 90,
        "return_stats": True,
    },
    "normalizer": {"normalizer": 11.0, "reduction": "sum"},
}


def flat(out: Any) -> list[Tensor]:
    return [out[0].detach(), *out[1]] if isinstance(out, tuple) else [out.detach()]


@backends
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", COMPILED_OPTIONS)
def test_compiled_equals_eager(backend: str, name: str) -> None:
    device = device_of(backend)
    y = random_target(4, 5, V=90, device=device, ignored=0.2)
    weight = torch.rand(4, 5, generator=generator(5)).to(device)

    def run(function: Any) -> list[Tensor]:
        a = random_logits(4, 5, 101, device=device).requires_grad_()
        b = random_logits(4, 5, 101, dtype=torch.bfloat16, device=device, seed=1).requires_grad_()
        out = function(a, b, y, weight)
        (out[0] if isinstance(out, tuple) else out).sum().backward()
        return [*flat(out), a.grad, b.grad]

    def loss(a: Tensor, b: Tensor, y: Tensor, weight: Tensor) -> Any:
        terms = [auxkern.Logits(a, scale=0.5), auxkern.Logits(b, softcap=4.0)]
        return auxkern.cross_entropy(terms, y, token_weight=weight, backend=backend, **COMPILED_OPTIONS[name])

    # Eager may make its gradient with the forward pass; a graph makes it after: a few ulp apart.
    for compiled, eager in zip(
        run(torch.compile(loss, fullgraph=True, backend="aot_eager")), run(loss), strict=True
    ):
        torch.testing.assert_close(
            compiled, eager, rtol=1e-2 if eager.dtype == torch.bfloat16 else 1e-5, atol=1e-8
        )


@backends
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_without_gradients(backend: str) -> None:
    device = device_of(backend)
    z, y = random_logits(4, 101, device=device), random_target(4, V=101, device=device)
    function = torch.compile(
        lambda z, y: auxkern.cross_entropy([z], y, backend=backend), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(function(z, y), F.cross_entropy(z, y))
    with torch.no_grad():
        torch.testing.assert_close(function(z, y), F.cross_entropy(z, y))


@backends
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_once_for_all_batch_sizes_and_vocabularies(backend: str) -> None:
    device = device_of(backend)
    graphs = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def loss(a: Tensor, b: Tensor, y: Tensor) -> Any:
        return auxkern.cross_entropy([a, b], y, return_stats=True, label_smoothing=0.1, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, backend=counting)
    for N, V in ((4, 101), (7, 103), (16, 57)):
        a, b = (random_logits(N, V, device=device, seed=i) for i in range(2))
        y = random_target(N, V=V, device=device, ignored=0.2)
        for dim in (0, 1):
            torch._dynamo.mark_dynamic(a, dim)
            torch._dynamo.mark_dynamic(b, dim)
        torch._dynamo.mark_dynamic(y, 0)
        a.requires_grad_()
        got, want = compiled(a, b, y), loss(a.detach(), b, y)
        for one, other in zip(flat(got), flat(want), strict=True):
            torch.testing.assert_close(one, other)
        got[0].backward()
        (gradient,) = ours([a, b], y, backend, wanted=[0], label_smoothing=0.1).gradients[:1]
        torch.testing.assert_close(a.grad, gradient, rtol=1e-5, atol=1e-8)
    assert len(graphs) == 1


@backends
@pytest.mark.usefixtures("fresh_compiler")
def test_a_target_out_of_range_raises_also_when_compiled(backend: str) -> None:
    if device_of(backend) != "cpu":
        pytest.skip("the check would stop the device: there the row is NaN")
    z, y = random_logits(4, 101), torch.tensor([1, 2, 101, 3])
    function = torch.compile(
        lambda z, y: auxkern.cross_entropy([z], y, backend=backend), fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(ValueError, match=r"target\[2\]"):
        function(z, y)


@pytest.mark.usefixtures("fresh_compiler")
def test_the_choice_of_a_backend_is_traced() -> None:
    z, y = random_logits(4, 101).requires_grad_(), random_target(4, V=101)
    function = torch.compile(lambda z, y: auxkern.cross_entropy([z], y), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(function(z, y), F.cross_entropy(z, y))


# --- modes ------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(backend: str, dtype: torch.dtype) -> None:
    """The sum is in float32 anyway; autocast must not round a logit first."""
    device = device_of(backend)
    terms = [random_logits(5, 301, dtype=dtype, device=device), random_logits(5, 301, device=device, seed=1)]
    y = random_target(5, V=301, device=device)
    plain = ours(terms, y, backend, return_stats=True)
    with torch.autocast(device, dtype=torch.bfloat16):
        cast = ours(terms, y, backend, return_stats=True)
    for one, other in zip(
        [cast.loss, *cast.gradients, *cast.stats], [plain.loss, *plain.gradients, *plain.stats], strict=True
    ):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@backends
def test_inference_mode_and_tensors_made_in_it(backend: str) -> None:
    device = device_of(backend)
    y = random_target(5, V=301, device=device)
    with torch.inference_mode():
        lm = random_logits(5, 301, device=device)
        inside = auxkern.cross_entropy([lm], y, backend=backend)
    torch.testing.assert_close(inside, F.cross_entropy(lm, y))
    aux = random_logits(5, 301, device=device, seed=1).requires_grad_()
    with pytest.raises(RuntimeError, match=r"[Ii]nference tensors cannot be saved"):
        auxkern.cross_entropy([lm, aux], y, backend=backend)


@backends
def test_a_default_dtype_of_float64_changes_nothing(backend: str) -> None:
    device = device_of(backend)
    terms = [random_logits(5, 301, device=device), random_logits(5, 301, dtype=torch.float16, device=device)]
    y = random_target(5, V=301, device=device)
    torch.set_default_dtype(torch.float64)
    try:
        result = ours(terms, y, backend, return_stats=True, token_weight=torch.ones(5, device=device))
    finally:
        torch.set_default_dtype(torch.float32)
    assert result.loss.dtype == torch.float32
    assert result.stats.nll.dtype == torch.float32
    torch.testing.assert_close(result.loss, ours(terms, y, backend).loss)


@backends
def test_a_default_device_changes_nothing(backend: str) -> None:
    device = device_of(backend)
    terms = [random_logits(5, 301, device=device), random_logits(5, 301, dtype=torch.float16, device=device)]
    y = random_target(5, V=301, device=device)
    with torch.device("meta"):
        result = ours(terms, y, backend, return_stats=True, normalizer=4.0)
        assert auxkern.cross_entropy(terms, y[:0].new_full((5,), -100), backend=backend).device.type == device
    assert {x.device.type for x in [result.loss, *result.gradients, *result.stats]} == {device}
    torch.testing.assert_close(result.loss, ours(terms, y, backend, normalizer=4.0).loss)


@backends
def test_a_subclass_of_tensor_and_a_parameter(backend: str) -> None:
    device = device_of(backend)
    parameter = torch.nn.Parameter(random_logits(5, 301, device=device))
    y = random_target(5, V=301, device=device)
    auxkern.cross_entropy([parameter], y, backend=backend).backward()
    assert torch.equal(parameter.grad, ours([parameter.detach()], y, backend).gradients[0])


@backends
def test_activation_checkpointing(backend: str) -> None:
    device = device_of(backend)
    x = random_logits(5, 301, device=device).requires_grad_()
    y = random_target(5, V=301, device=device)

    def loss(x: Tensor) -> Tensor:
        return auxkern.cross_entropy([x * 2], y, backend=backend)

    torch.utils.checkpoint.checkpoint(loss, x, use_reentrant=False).backward()
    (want,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(x.grad, want)


@backends
def test_gradient_hooks_see_each_term(backend: str) -> None:
    device = device_of(backend)
    a, b = (random_logits(5, 301, device=device, seed=i).requires_grad_() for i in range(2))
    a.register_hook(lambda g: g * 2)
    auxkern.cross_entropy([a, b], random_target(5, V=301, device=device), backend=backend).backward()
    torch.testing.assert_close(a.grad, 2 * b.grad)


@backends
def test_no_warnings(backend: str) -> None:
    device = device_of(backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        terms = [random_logits(2, 3, 301, device=device)[:, :-1], random_logits(2, 2, 301, device=device)]
        ours(terms, random_target(2, 2, V=301, device=device), backend, return_stats=True, shift=True)


# --- training ---------------------------------------------------------------------------------


@backends
def test_a_drop_in_for_functional_cross_entropy(backend: str) -> None:
    """Two training loops from one start, step by step; the frozen side never changes."""
    device = device_of(backend)
    lm, hidden = random_logits(32, 211, device=device, spread=1), random_logits(32, 12, device=device, seed=1)
    y, frozen = random_target(32, V=211, device=device, ignored=0.2), lm.clone()

    def train(loss_of: Any) -> tuple[list[float], Tensor]:
        head = torch.nn.Linear(12, 211, device=device)
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        optimizer, losses = torch.optim.SGD(head.parameters(), lr=0.5), []
        for _ in range(15):
            optimizer.zero_grad()
            loss = loss_of(head(hidden))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses, head.weight.detach()

    mine, weight = train(lambda aux: auxkern.cross_entropy([lm, aux], y, backend=backend))
    torchs, torchs_weight = train(lambda aux: F.cross_entropy(lm + aux, y))
    assert mine[-1] < mine[0] / 2
    assert mine == pytest.approx(torchs, rel=1e-5)
    torch.testing.assert_close(weight, torchs_weight, rtol=1e-4, atol=1e-6)
    assert torch.equal(lm, frozen)


# --- the module -------------------------------------------------------------------------------

MODULE_OPTIONS: dict[str, Any] = {
    "ignore_index": 3,
    "reduction": "sum",
    "label_smoothing": 0.1,
    "z_loss": 0.01,
    "shift": True,
    "vocab_size": 90,
    "return_stats": True,
    "backend": "reference",
}


@pytest.mark.parametrize("options", [{}, MODULE_OPTIONS], ids=["defaults", "all options"])
@pytest.mark.parametrize("copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_module_equals_function(options: dict[str, Any], copied: Any) -> None:
    module = copied(auxkern.nn.CrossEntropyLoss(**options))
    z, y = random_logits(4, 5, 101), random_target(4, 5, V=90)
    call_options = {"token_weight": torch.rand(4, 5, generator=generator(5)), "normalizer": 3.0}
    for one, other in zip(
        flat(module([z], y, **call_options)),
        flat(auxkern.cross_entropy([z], y, **call_options, **options)),
        strict=True,
    ):
        assert torch.equal(one, other)
    assert list(module.parameters()) == []
    assert module.state_dict() == {}
    for name, value in options.items():
        assert f"{name}={value!r}" in repr(module)


def test_a_module_learns_through_its_terms() -> None:
    aux = random_logits(4, 101).requires_grad_()
    auxkern.nn.CrossEntropyLoss()([random_logits(4, 101, seed=1), aux], random_target(4, V=101)).backward()
    assert bool(aux.grad.any())


def test_one_term_needs_no_list() -> None:
    z, y = random_logits(4, 101), random_target(4, V=101)
    want = auxkern.cross_entropy([z], y)
    assert torch.equal(auxkern.cross_entropy(z, y), want)
    assert torch.equal(auxkern.cross_entropy(auxkern.Logits(z), y), want)
    assert torch.equal(auxkern.cross_entropy((z,), y), want)


# --- the choice -------------------------------------------------------------------------------


def test_the_native_backend_is_built_and_chosen() -> None:
    """Without this, a build that failed would leave its tests out in silence."""
    explanation = auxkern.explain("cpu", torch.float32)
    assert explanation.backend == "cpu", str(explanation)
    assert choice.choose(None, torch.device("cpu"), (torch.float16, torch.bfloat16)).name == "cpu"


def test_explain_says_why_not() -> None:
    explanation = auxkern.explain("cpu", torch.float64)
    assert explanation.backend == "reference"
    assert set(explanation.refusals) == {"triton", "cpu"}
    assert "float64" in explanation.refusals["cpu"]
    text = str(explanation)
    assert text.startswith("cpu [float64]: backend 'reference'")
    assert "not 'cpu': " in text
    assert "not 'triton': " in text


def test_explain_takes_a_device_or_its_name() -> None:
    assert auxkern.explain(torch.device("cpu")) == auxkern.explain("cpu")


@pytest.mark.parametrize("name", ["cuda", "", "Reference", "cpu "])
def test_an_unknown_backend_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="'triton', 'cpu', 'reference'"):
        choice.choose(name, torch.device("cpu"), (torch.float32,))


def test_the_choice_is_what_runs() -> None:
    """backend=None gives the bits of the backend that explain names."""
    terms = [random_logits(5, 5003, seed=i) for i in range(2)]
    y = random_target(5, V=5003)
    named = ours(terms, y, auxkern.explain("cpu", torch.float32).backend)
    chosen = ours(terms, y, None)
    assert torch.equal(chosen.loss, named.loss)
    assert torch.equal(chosen.gradients[0], named.gradients[0])


def test_float64_is_never_narrowed() -> None:
    terms = [random_logits(5, 101, dtype=torch.float64), random_logits(5, 101)]
    y = random_target(5, V=101)
    torch.testing.assert_close(
        auxkern.cross_entropy(terms, y), F.cross_entropy(terms[0] + terms[1], y), rtol=1e-14, atol=0
    )


@backends
def test_readme_example(backend: str) -> None:
    """One call in the place of F.cross_entropy(lm_logits + aux_logits, y)."""
    device = device_of(backend)
    lm, aux = random_logits(2, 7, 503, device=device), random_logits(2, 7, 503, device=device, seed=1)
    y = random_target(2, 7, V=503, device=device, ignored=0.3)
    check([lm, aux], y, backend, wanted=[1], shift=True, return_stats=True)


# --- a fresh process --------------------------------------------------------------------------


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def test_env_prints_versions_and_the_choice() -> None:
    done = run_python("-m", "auxkern.env")
    assert done.returncode == 0, done.stderr
    assert torch.__version__ in done.stdout
    assert auxkern.__version__ in done.stdout
    for name in choice.BACKENDS:
        assert name in done.stdout


def test_import_has_no_side_effects() -> None:
    """Neither Triton nor CUDA is touched, and torch's settings stay as they are."""
    code = """if True:
        import sys, torch
        before = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())
        modules = set(sys.modules)
        import auxkern
        assert before == (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())
        assert not torch.cuda.is_initialized()
        prefixes = ("triton", "auxkern.backends.", "transformers", "numpy")
        loaded = [m for m in set(sys.modules) - modules if m.startswith(prefixes)]
        assert not loaded, loaded
    """
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
