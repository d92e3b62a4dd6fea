"""The benchmark of two heads: float64 check, peers on concatenated heads, floor, options."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("rich")

import auxkern
from auxkern.bench import __main__ as bench
from auxkern.bench import real
from auxkern.bench.cases import WIDTHS, new_case, select_cases
from auxkern.bench.losses import LINEAR as OPERATOR
from auxkern.bench.losses import LossInputs, one_head
from auxkern.bench.operators import Implementation
from auxkern.bench.results import PASSES, CaseResult, Run
from auxkern.bench.runner import measure_inputs
from auxkern.bench.timing import Effort

CPU = torch.device("cpu")
SHORT = Effort(seconds=0.0, min_rounds=2, max_rounds=2)
N, V, D_LM, D_AUX = 7, 601, 24, 8


def made_inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    target = torch.randint(V, (N,), generator=generator)
    target[2] = -100
    lm = auxkern.Head(normal(N, D_LM) / D_LM**0.5, normal(V, D_LM))
    hidden = (normal(N, D_AUX) / D_AUX**0.5).requires_grad_()
    return LossInputs([lm, auxkern.Head(hidden, normal(V, D_AUX).requires_grad_())], target)


def eager(inputs):
    lm, aux = (head.hidden @ head.weight.T for head in inputs.terms)
    return F.cross_entropy((lm + aux).float(), inputs.target)


def measured(*losses, dtype=torch.float32):
    case = CaseResult("linear", "made up", V, N, "float32", terms=2, widths=[D_LM, D_AUX])
    implementations = [Implementation(f"loss {i}", "", False, loss) for i, loss in enumerate(losses)]
    return measure_inputs(made_inputs(dtype), case, implementations, CPU, SHORT, lambda share, doing: None)


def test_the_exact_result_is_that_of_autograd_in_float64():
    inputs = made_inputs()
    exact = OPERATOR.exact(inputs)
    h_lm, W_lm, h_aux, W_aux = (t.detach().double() for t in inputs.tensors()[:-1])
    h_aux.requires_grad_()
    W_aux.requires_grad_()
    loss = F.cross_entropy(h_lm @ W_lm.T + h_aux @ W_aux.T, inputs.target)
    d_hidden, d_weight = torch.autograd.grad(loss, (h_aux, W_aux))
    assert exact.loss == pytest.approx(loss.item(), rel=1e-13)
    torch.testing.assert_close(exact.d_hidden, d_hidden[exact.rows], rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(exact.d_weight, d_weight[exact.ids], rtol=1e-10, atol=1e-14)
    assert exact.rows.tolist() == list(range(N))
    assert torch.isin(inputs.target[inputs.target >= 0], exact.ids).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_implementations_are_timed(dtype):
    case = measured(eager, dtype=dtype)
    assert case.results[0].status == "ok"
    assert set(case.results[0].passes) == set(case.floor) == set(PASSES)


def hidden_gradient_off(inputs):
    lm, (h, W) = inputs.terms[0], inputs.leaves()
    return eager(LossInputs([lm, auxkern.Head(1.2 * h - 0.2 * h.detach(), W)], inputs.target))


def weight_gradient_off(inputs):
    lm, (h, W) = inputs.terms[0], inputs.leaves()
    return eager(LossInputs([lm, auxkern.Head(h, 1.2 * W - 0.2 * W.detach())], inputs.target))


def auxiliary_only(inputs):
    hidden, weight = inputs.leaves()
    return F.cross_entropy(hidden @ weight.T, inputs.target)


WRONG = [hidden_gradient_off, weight_gradient_off, auxiliary_only, lambda inputs: eager(inputs) * 1.05]


@pytest.mark.parametrize("loss", WRONG)
def test_wrong_implementations_are_not_timed(loss):
    (result,) = measured(loss).results
    assert result.status == "wrong"
    assert result.passes == {}


def test_a_gradient_that_is_missing_or_not_asked_for_is_no_pass():
    inputs = made_inputs()
    exact = OPERATOR.exact(inputs)
    with pytest.raises(RuntimeError, match="must have a gradient"):
        OPERATOR.errors(inputs, exact, torch.tensor(exact.loss))
    loss = eager(inputs)
    loss.backward()
    inputs.terms[0].weight.grad = torch.zeros(V, D_LM)
    with pytest.raises(RuntimeError, match="frozen"):
        OPERATOR.errors(inputs, exact, loss)


def test_the_concatenated_weight_follows_the_trained_one():
    inputs = made_inputs()
    on_one_head = one_head(lambda hidden, weight, y: F.cross_entropy(hidden @ weight.T, y), [])

    def loss(inputs):
        return on_one_head(*inputs.tensors())

    for _ in range(2):
        torch.testing.assert_close(loss(inputs), eager(inputs))
        gradients = [torch.autograd.grad(f(inputs), inputs.leaves()) for f in (loss, eager)]
        torch.testing.assert_close(*gradients)
        inputs.terms[1].weight.data.add_(0.1)


def test_peers_on_one_head_are_right():
    names = ["F.linear_cross_entropy"] if hasattr(torch.nn, "LinearCrossEntropyOptions") else []
    peers = [i for i in OPERATOR.implementations(CPU, torch.float32, []) if i.name in names]
    assert [peer.name for peer in peers] == names
    assert all(result.status == "ok" for result in measured(*(peer.run for peer in peers)).results)


def test_floors_are_the_products_of_the_rows_that_count():
    inputs = made_inputs()
    floors = OPERATOR.floors(inputs)
    assert floors["forward"].flops == 2 * (N - 1) * V * (D_LM + D_AUX)
    assert floors["forward_backward"].flops == 2 * (N - 1) * V * (D_LM + 3 * D_AUX)
    before = [t.detach().clone() for t in inputs.tensors()]
    for floor in floors.values():
        floor.run()
    assert all(torch.equal(a, b) for a, b in zip(before, inputs.tensors(), strict=True))


def test_real_compares_heads_with_float64():
    generator = torch.Generator().manual_seed(2)
    lm, aux = (
        auxkern.Head(
            torch.randn(3, 5, D, generator=generator), torch.randn(40, D, generator=generator) / D**0.5
        )
        for D in (12, 4)
    )
    ids = torch.randint(40, (3, 5), generator=generator)
    ids[1, 3:] = -100
    batch = real.Batch(lm, aux, ids)
    z = sum(term.hidden.double() @ term.weight.double().T for term in (lm, aux))
    expected = F.cross_entropy(z[:, :-1].reshape(-1, 40), ids[:, 1:].reshape(-1))
    agreement = real.compare(batch, "reference")
    assert agreement.exact == pytest.approx(expected.item(), rel=1e-12)
    assert agreement.passed
    assert real.compare(batch.logits, "reference").exact == pytest.approx(agreement.exact, rel=1e-6)


def test_linear_runs_only_when_asked_for():
    assert all(case.op == "cross_entropy" for case in select_cases("cpu"))
    assert select_cases("cpu", ops=["linear"]) == [new_case("linear", "smollm2", 1024, "float32")]
    both = select_cases("cpu", ops=["linear", "cross_entropy"], rows=[4], terms=3)
    assert [(case.model, case.terms, case.widths) for case in both] == [
        ("smollm2", 2, WIDTHS["smollm2"]),
        ("gpt2", 3, ()),
    ]


def test_more_terms_of_heads_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--op", "linear", "--terms", "3", "--device", "cpu"])
    assert "leave --terms out" in capsys.readouterr().err


def test_one_small_case_from_options_to_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "QUICK", SHORT)
    monkeypatch.setattr(
        OPERATOR, "implementations", lambda *arguments: [Implementation("eager", "", False, eager)]
    )
    options = ["--op", "linear", "--n", "2", "--backend", "reference", "--quick", "--device", "cpu"]
    assert bench.main([*options, "--json", str(tmp_path / "run.json")]) == 0
    (case,) = Run.from_json((tmp_path / "run.json").read_text()).cases
    assert case.widths == list(WIDTHS["smollm2"])
    assert case.floor_flops["forward"] == 2 * 2 * 49_152 * (576 + 256)
    assert "D 576 + 256" in capsys.readouterr().out
