"""GPUs that kernels are compiled for: the limits that decide occupancy, and data-sheet rates."""

from __future__ import annotations

from dataclasses import dataclass

from auxkern.backends.triton import configs


@dataclass(frozen=True)
class Target:
    """A compilation target and a GPU that has it.

    Attributes:
        name: as given on the command line.
        backend: "cuda" or "hip".
        arch: compute capability times ten, or AMD's name of the architecture.
        warp: threads in a warp (AMD: wavefront).
        gpu: a GPU of that architecture.
        bandwidth: its memory bandwidth by the data sheet, bytes/s.
        flops: its float32 rate outside tensor cores by the data sheet, FLOP/s.
        tensor_flops: its dense 16-bit rate in tensor cores by the data sheet, FLOP/s.
        multiprocessors: of that GPU (AMD: compute units).
        clock: its boost clock, hertz.
        warps: most resident warps per multiprocessor.
        registers: 32-bit registers per multiprocessor, shared by the threads of its warps.
        shared: bytes of shared memory per multiprocessor.
        shared_per_program: most of it that one program may use, bytes.
    """

    name: str
    backend: str
    arch: int | str
    warp: int
    gpu: str
    bandwidth: float
    flops: float
    tensor_flops: float
    multiprocessors: int
    clock: float
    warps: int
    registers: int
    shared: int
    shared_per_program: int

    @property
    def capability(self) -> int:
        """Its major compute capability; AMD's get the launches of an A100."""
        return self.arch // 10 if isinstance(self.arch, int) else 8

    @property
    def exact(self) -> str:
        """As ``Gpu.exact``."""
        return configs.BF16X6 if self.backend == "cuda" else configs.IEEE

    def resident_warps(self, registers: int, shared: int, warps: int) -> int:
        """Warps that fit on a multiprocessor at once.

        Args:
            registers: per thread.
            shared: bytes per program.
            warps: per program.

        Source: occupancy rules of the CUDA C++ programming guide (registers are handed out 256
        to a warp) and of AMD's CDNA 3 ISA guide (8 to a lane, four SIMDs).
        """
        granule = 8 * self.warp
        per_warp = -(-max(registers, 1) * self.warp // granule) * granule
        by_registers = self.registers // per_warp // 4 * 4  # the four schedulers hold equal shares
        programs = min(min(self.warps, by_registers) // warps, 32)
        if shared:
            reserved = 1024 if self.backend == "cuda" else 0
            programs = min(programs, self.shared // (shared + reserved))
        return programs * warps


_KIB = 1024

# Data sheets: NVIDIA A100 80GB SXM, H100 SXM, B200 (HGX); AMD Instinct MI300X. In the order of
# the attributes; on the second line what a multiprocessor holds. Of the B200 NVIDIA states no clock: at
# this one its multiprocessors reach the data sheet's float32 rate.
TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, "A100 SXM 80GB", 2.039e12, 19.5e12, 312e12, 108, 1.41e9,
               64, 65536, 164 * _KIB, 163 * _KIB),
        Target("sm_90", "cuda", 90, 32, "H100 SXM", 3.35e12, 67e12, 989e12, 132, 1.98e9,
               64, 65536, 228 * _KIB, 227 * _KIB),
        Target("sm_100", "cuda", 100, 32, "B200", 8.0e12, 75e12, 2250e12, 148, 1.965e9,
               64, 65536, 228 * _KIB, 227 * _KIB),
        Target("gfx942", "hip", "gfx942", 64, "MI300X", 5.3e12, 163.4e12, 1307e12, 304, 2.1e9,
               32, 131072, 64 * _KIB, 64 * _KIB),
    )
}  # fmt: skip
