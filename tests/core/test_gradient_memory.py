"""``GradientMemory``: memory is used again only when nothing refers to it."""

import copy
import ctypes
import os
import pickle
import re
from pathlib import Path

import pytest
import torch

import auxkern
from auxkern.backends import choice

needs_native = pytest.mark.skipif(
    choice.refusal("cpu", torch.device("cpu"), (torch.float32,)) is not None,
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
    for gradient, before in kept:
        assert torch.equal(gradient, before)


def test_another_object_is_refused() -> None:
    with pytest.raises(TypeError, match=r"gradient_memory must be an auxkern\.GradientMemory, got dict"):
        auxkern.cross_entropy([torch.zeros(1, 3)], torch.tensor([0]), gradient_memory={})  # type: ignore[arg-type]


# --- processes and copies -----------------------------------------------------------------------

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def gradients() -> dict[str, torch.Tensor]:
    """By every way that makes one in memory of its own."""
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(0, 1000, (32,), generator=generator)
    tensors = {"weight": (1000, 64), "hidden": (32, 64), "bias": (1000,), "logits": (32, 1000)}
    made = {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in tensors.items()}
    head = auxkern.Head(made["hidden"], made["weight"], made["bias"])
    auxkern.cross_entropy(head, target).backward()
    auxkern.cross_entropy(made["logits"], target, gradient_memory=auxkern.GradientMemory()).backward()
    grads = {name: x.grad for name, x in made.items()}
    return {**grads, "empty": auxkern.GradientMemory().empty(shape(8, 1024), torch.float32).fill_(7)}


@forks
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_what_a_forked_process_writes_is_its_own() -> None:
    made = gradients()
    before = {name: x.clone() for name, x in made.items()}
    child = os.fork()
    if child == 0:
        for x in made.values():  # not by torch, whose threads the child does not have
            ctypes.memset(x.data_ptr(), 3, x.nbytes)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    for name, x in made.items():
        assert torch.equal(x, before[name]), name


def mapping(address: int) -> tuple[str, list[str]]:
    """Permissions and flags of the mapping that holds an address."""
    permissions = ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if header := re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+) ", line):
            inside = int(header[1], 16) <= address < int(header[2], 16)
            permissions = header[3] if inside else ""
        elif permissions and line.startswith("VmFlags:"):
            return permissions, line.split()[1:]
    raise AssertionError(f"no mapping holds {address:x}")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="this system does not list its mappings")
def test_memory_is_private_and_asks_for_huge_pages() -> None:
    tensor = auxkern.GradientMemory().empty(shape(1024, 4096), torch.float32)
    permissions, flags = mapping(tensor.data_ptr())
    assert permissions == "rw-p"
    if Path("/sys/kernel/mm/transparent_hugepage").exists() and flags:
        assert "hg" in flags


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["copy", "deepcopy", "pickle"],
)
def test_a_copy_is_empty_and_works(copied) -> None:  # type: ignore[no-untyped-def]
    memory = auxkern.GradientMemory()
    kept = memory.empty(shape(10, 1000), torch.float32).fill_(7)
    other = copied(memory)
    assert other is not memory
    assert other.nbytes == 0
    other.empty(shape(10, 1000), torch.float32).fill_(0)
    assert bool((kept == 7).all())
    assert memory.nbytes > 0


def test_a_module_that_holds_one_can_be_copied() -> None:
    module = auxkern.nn.CrossEntropyLoss()
    module.memory = auxkern.GradientMemory()
    x, y = torch.randn(4, 9, requires_grad=True), torch.arange(4)
    module(x, y, gradient_memory=module.memory).backward()
    twin = copy.deepcopy(module)
    assert twin.memory.nbytes == 0
    torch.testing.assert_close(twin(x, y, gradient_memory=twin.memory), module(x, y))
