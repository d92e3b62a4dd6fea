"""Process groups, however they are given."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def process_group_of(group: Any) -> Any:
    """The process group of an argument ``process_group``.

    Args:
        group: a ``ProcessGroup``, or a ``DeviceMesh`` of one dimension.

    Raises:
        TypeError: it is something else.
        ValueError: the mesh has more dimensions.
    """
    if isinstance(group, dist.ProcessGroup):
        return group
    if hasattr(group, "get_group") and hasattr(group, "ndim"):
        if group.ndim != 1:
            raise ValueError(
                f"process_group is a DeviceMesh of {group.ndim} dimensions {group.mesh_dim_names}; pass one "
                "of them, such as mesh['tp'] for a vocabulary or mesh['dp'] for data"
            )
        return group.get_group()
    raise TypeError(
        "process_group must be a torch.distributed.ProcessGroup or a DeviceMesh of one dimension, got "
        f"{type(group).__name__}"
    )
