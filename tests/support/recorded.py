"""Launches that can run again, damaged or not, each on the memory that it met first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from auxkern.backends.triton.launch import Launch
from tests.support.executed import BENIGN
from tests.support.ptx.fresh import Fresh
from tests.support.ptx.machine import Settings
from tests.support.ptx.report import Report
from tests.support.ptx.runner import Executor, compile_ptx, flattened


@dataclass(frozen=True)
class Outcome:
    """What one execution leaves.

    Attributes:
        contents: bytes of each argument's storage; bytes, so that NaN equals itself.
    """

    report: Report
    contents: Mapping[str, bytes]


@dataclass(frozen=True)
class Recorded:
    """A launch, and the memory that it met.

    Attributes:
        before: (bytes,) of the storage of each tensor argument, by the argument's name.
        fresh: which of it nobody had written.
    """

    launch: Launch
    arch: int
    before: Mapping[str, Tensor]
    fresh: Fresh | None

    @property
    def kernel(self) -> str:
        name: str = self.launch.kernel.fn.__name__
        return name

    @property
    def ptx(self) -> str:
        return compile_ptx(self.launch, self.arch).text

    def execute(self, text: str, settings: Settings | None = None, report: Report | None = None) -> Outcome:
        """Run ``text`` in the place of the launch's PTX.

        Raises:
            PtxError: as ``Executor.run``.
        """
        storages = _storages(self.launch)
        for name, storage in storages.items():
            storage.copy_(self.before[name])
        executor = Executor(
            self.arch,
            Settings() if settings is None else settings,
            Report(BENIGN) if report is None else report,
            fresh=None if self.fresh is None else self.fresh.copy(),
            edit=lambda launch, ptx: text,
        )
        executor.run(self.launch)
        contents = {name: storage.numpy().tobytes() for name, storage in storages.items()}
        return Outcome(executor.report, contents)


@dataclass
class Recorder(Executor):
    """Runs launches, and keeps them."""

    launches: list[Recorded] = field(default_factory=list)

    def run(self, launch: Launch) -> None:
        before = {name: storage.clone() for name, storage in _storages(launch).items()}
        fresh = None if self.fresh is None else self.fresh.copy()
        self.launches.append(Recorded(launch, self.arch, before, fresh))
        super().run(launch)


def _storages(launch: Launch) -> dict[str, Tensor]:
    """(bytes,) of each storage, by the first argument that lies in it."""
    storages: dict[int, tuple[str, Tensor]] = {}
    for name, value in flattened(launch):
        if isinstance(value, Tensor) and value.numel():
            storage = value.untyped_storage()
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            storages.setdefault(storage.data_ptr(), (name, whole))
    return dict(storages.values())
