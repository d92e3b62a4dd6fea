"""``GradientMemory``: memory is used again only when nothing refers to it."""

import pytest
import torch

import auxkern
from auxkern.ops import registry

needs_native = pytest.mark.skipif(
    registry.refusal("cpu", torch.device("cpu"), (torch.float32,)) is not None,
    reason="the native library is not built",
)


def shape(*sizes: int) -> torch.Size:
    return torch.Size(sizes)


def test_freed_memory_is_used_again() -> None:
    memory = auxkern.GradientMemory()
    first = memory.empty(shape(100, 1000), torch.float32)
    address = first.data_ptr()
    del first
    assert memory.empty(shape(100, 1000), torch.float32).data_ptr() == address


@pytest.mark.parametrize("alias", ["tensor", "view", "storage", "detached"])
def test_memory_in_use_is_left_alone(alias: str) -> None:
    memory = auxkern.GradientMemory()
    tensor = memory.empty(shape(10, 1000), torch.float32).fill_(7)
    kept = {
        "tensor": tensor,
        "view": tensor[3:5],
        "storage": tensor.untyped_storage(),
        "detached": tensor.detach().view(-1),
    }[alias]
    address = tensor.data_ptr()
    del tensor
    other = memory.empty(shape(10, 1000), torch.float32).fill_(0)
    assert other.data_ptr() != address
    if isinstance(kept, torch.Tensor):
        assert bool((kept == 7).all())


def test_a_loop_of_changing_shapes_holds_what_it_uses() -> None:
    memory = auxkern.GradientMemory()
    for rows in (10, 20, 30):
        memory.empty(shape(rows, 1024), torch.float32)
    assert memory.nbytes == 30 * 4096
    memory.release()
    assert memory.nbytes == 0


def address_after_a_step(memory: auxkern.GradientMemory, generator: torch.Generator) -> int:
    """One training step in a scope of its own, which drops its gradient at the end."""
    lm, aux = torch.randn(2, 16, 5003, generator=generator)
    target = torch.randint(0, 5003, (16,), generator=generator)
    aux.requires_grad_()
    auxkern.cross_entropy([lm, aux], target, gradient_memory=memory, backend="cpu").backward()
    want = torch.softmax((lm + aux.detach()).double(), -1)
    want[torch.arange(16), target] -= 1
    # float32 of a probability over 16 rows: one rounding of the exponential and of the product
    torch.testing.assert_close(aux.grad, (want / 16).float(), rtol=1e-5, atol=1e-9)
    return aux.grad.data_ptr()  # type: ignore[union-attr]


@needs_native
def test_a_training_loop_keeps_one_block_and_right_gradients() -> None:
    memory, generator = auxkern.GradientMemory(), torch.Generator().manual_seed(0)
    assert len({address_after_a_step(memory, generator) for _ in range(4)}) == 1
    assert memory.nbytes < 16 * 5003 * 4 + 65536  # one gradient, rounded up to whole pages


@needs_native
def test_a_gradient_that_is_kept_does_not_change() -> None:
    memory = auxkern.GradientMemory()
    target = torch.arange(8)
    kept = []
    for step in range(3):
        aux = torch.full((8, 4096), float(step), requires_grad=True)
        auxkern.cross_entropy([aux * (step + 1)], target, gradient_memory=memory, backend="cpu").backward()
        kept.append((aux.grad, aux.grad.clone()))  # type: ignore[union-attr]
    for gradient, copy in kept:
        assert torch.equal(gradient, copy)


def test_another_object_is_refused() -> None:
    with pytest.raises(TypeError, match=r"gradient_memory must be an auxkern\.GradientMemory, got dict"):
        auxkern.cross_entropy([torch.zeros(1, 3)], torch.tensor([0]), gradient_memory={})  # type: ignore[arg-type]
