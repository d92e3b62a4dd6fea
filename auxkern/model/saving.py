"""What a checkpoint of a pair holds, and whether it is all that the auxiliary has."""

from __future__ import annotations

from typing import Any

from torch import nn


def tied_weights(model: nn.Module) -> dict[str, str] | None:
    """Names of parameters that stand for an earlier one, and its name; None if there are none.

    Raises:
        ValueError: tensors that are saved share memory, but are not one parameter.
    """
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    memory: dict[int, str] = {}
    for name, tensor in model.state_dict().items():
        place = tensor.data_ptr() if tensor.device.type != "meta" else 0
        if place and name not in tied and memory.setdefault(place, name) != name:
            raise ValueError(
                f"{name} and {memory[place]} of the auxiliary share memory, so that it cannot be saved; "
                "register one parameter under both names, or copy it"
            )
    return tied or None


def check_complete(path: Any, report: dict[str, Any]) -> None:
    """Compares what transformers has loaded with what the model has.

    Args:
        path: of the checkpoint.
        report: transformers' ``output_loading_info``.

    Raises:
        ValueError: weights are missing, left over or of another shape.
    """
    # transformers would go on with new weights in place of missing ones.
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[what]:
            names = ", ".join(sorted(map(str, report[what]))[:5])
            raise ValueError(
                f"{path} does not hold the auxiliary that its config describes: {what.replace('_', ' ')} "
                f"{names}; it was made with another version, or for another module"
            )
