"""Process groups, however they are given."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def process_group_of(group: object) -> ProcessGroup:
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
        mesh = cast("DeviceMesh", group)
        if mesh.ndim != 1:
            raise ValueError(
                f"process_group is a DeviceMesh of {mesh.ndim} dimensions {mesh.mesh_dim_names}; pass one "
                "of them, such as mesh['tp'] for a vocabulary or mesh['dp'] for data"
            )
        return mesh.get_group()
    raise TypeError(
        "process_group must be a torch.distributed.ProcessGroup or a DeviceMesh of one dimension, got "
        f"{type(group).__name__}"
    )
