"""``python -m auxkern.inspect.ways``: losses of heads by tiles, and by a library's products, in the model.

A library's product writes its logits, which a row kernel reads; tiles are used where they were made. The
table says what either way takes, so that the choice can be judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from auxkern.inspect.targets import TARGETS, Target
from auxkern.terminal import command_parser

if TYPE_CHECKING:
    from auxkern.backends.triton.launch import Launch

_EPILOG = """\
A MODEL: nothing was measured. Exit status: 0; 2 for bad options.
"""
# Of the data sheet's rate, that a library's products reach: an assumption, and nothing was measured. Power
# and clocks limit large products to about this much.
LIBRARY_SHARE = 0.75
_GPUS = ("sm_90", "sm_100")
_WIDTHS = ((768, 256), (4096, 512), (8192, 512), (4096,), (16384,))
_MODEL = "Llama-3"
_ROWS = 8192
# Rows whose gradient of the logits exists at a time, in 16 bits and in float32.
_CHUNK, _FLOAT_CHUNK = 2048, 1024
_FLOAT, _HALF = 4, 2  # bytes


@dataclass(frozen=True)
class Tiles:
    """Microseconds of the kernels that make tiles, for all rows.

    Attributes:
        together: if instructions, memory and tensor cores never wait for each other.
        in_turn: if tensor cores rest while instructions are issued.
    """

    together: float
    in_turn: float

    def __add__(self, other: Tiles) -> Tiles:
        return Tiles(self.together + other.together, self.in_turn + other.in_turn)


@dataclass(frozen=True)
class Library:
    """What a library's products and the memory between them take, in microseconds.

    Attributes:
        target: the GPU.
        widths: D of each head, 16-bit, of which the last is trained.
        N, V: rows and ids.
    """

    target: Target
    widths: Sequence[int]
    N: int
    V: int

    def _moved(self, bytes_per_logit: float) -> float:
        return self.N * self.V * bytes_per_logit / self.target.bandwidth * 1e6

    def _product(self, D: int, rate: float) -> float:
        return 2 * self.N * self.V * D / (rate * LIBRARY_SHARE) * 1e6

    def _logits(self, first: int, further: int) -> float:
        """The products of the heads, whose results move so many bytes of each logit."""
        products = sum(self._product(D, self.target.tensor_flops) for D in self.widths)
        return products + self._moved(first + further * (len(self.widths) - 1))

    @property
    def forward(self) -> float:
        """As ``chunked.add_head`` does it: a product is written, read, added and written, then read."""
        return self._logits(3 * _FLOAT, 4 * _FLOAT) + self._moved(_FLOAT)

    @property
    def least_forward(self) -> float:
        """Were products added in place: only a further head reads what it adds to."""
        return self._logits(_FLOAT, 2 * _FLOAT) + self._moved(_FLOAT)

    @property
    def back(self) -> float:
        """From a 16-bit dz to hidden states and weight, which tiles leave to the library, too."""
        D = self.widths[-1]
        once = max(self._product(D, self.target.tensor_flops), self._moved(_HALF))
        summed = self.N / _CHUNK * self.V * D * 2 * _FLOAT / self.target.bandwidth * 1e6
        return 2 * once + summed

    @property
    def trained(self) -> float:
        """As it is: then logits again, losses, dz in float32, and float32 products with the trained head."""
        again = self._logits(3 * _FLOAT, 4 * _FLOAT) + self._moved(3 * _FLOAT)
        D = self.widths[-1]
        once = max(self._product(D, self.target.flops), self._moved(_FLOAT))
        summed = self.N / _FLOAT_CHUNK * self.V * D * 2 * _FLOAT / self.target.bandwidth * 1e6
        return self.forward + again + 2 * once + summed

    @property
    def least_trained(self) -> float:
        """Were a 16-bit dz made with the losses by one pass."""
        return self.least_forward + self._moved(_HALF) + self.back


def _tiles(launch: Launch, target: Target, rows: int) -> Tiles:
    """Of a launch for some of the rows."""
    from triton.backends.compiler import GPUTarget

    from auxkern.backends.triton.cases import Case
    from auxkern.inspect.assembly import read
    from auxkern.inspect.issue import bound_of

    made = read(launch.compile(GPUTarget(target.backend, target.arch, target.warp)))
    bound = bound_of(made, Case("", _MODEL, rows, launch), target)
    in_turn = max(bound.memory_us, bound.mufu_us, bound.tensor_us + bound.issue_us)
    return Tiles(bound.largest[1] * _ROWS / rows, in_turn * _ROWS / rows)


def _row(widths: Sequence[int], target: Target) -> Iterator[str]:
    """Cells of the table."""
    from auxkern.backends.triton.cases import VOCABULARIES, B, gpu_of
    from auxkern.backends.triton.heads_loss import cases

    V = VOCABULARIES[_MODEL]
    heads = cases.sum_of(V, widths, [B] * len(widths), gpu=gpu_of(target.capability))
    forward = _tiles(cases.forward_launches(heads)[0], target, cases.ROWS)
    trained = sum(
        (
            _tiles(of, target, cases.ROWS)
            for of in (cases.one_write_launch(heads), cases.scale_launch(heads, B))
        ),
        Tiles(0, 0),
    )
    library = Library(target, widths, _ROWS, V)
    yield f"{target.gpu.split()[0]}, {' + '.join(f'{D:,}' for D in widths)}"
    back = library.back
    sides = (
        (forward, library.forward, library.least_forward),
        (trained + Tiles(back, back), library.trained, library.least_trained),
    )
    for tiles, chunks, least in sides:
        yield f"{tiles.together / 1e3:.1f} to {tiles.in_turn / 1e3:.1f}"
        yield f"{chunks / 1e3:.1f}"
        yield f"{least / 1e3:.1f}"


def table(widths: Sequence[Sequence[int]] = _WIDTHS, targets: Sequence[str] = _GPUS) -> Iterator[str]:
    """Lines of Markdown, in milliseconds.

    Args:
        widths: D of the bfloat16 heads of each sum, of which the last is trained.
        targets: keys of ``TARGETS``.
    """
    ways = ("tiles", "library", "library at best")
    yield "| | " + " | ".join([*ways, *[f"trained: {way}" for way in ways]]) + " |"
    yield "|---|" + "--:|" * 6
    for target in targets:
        for one in widths:
            yield "| " + " | ".join(_row(one, TARGETS[target])) + " |"


def main(argv: list[str] | None = None) -> int:
    """Prints the table.

    Args:
        argv: arguments after the program's name; those of the process when None.

    Returns:
        0. Bad options exit with 2 (``SystemExit``, as argparse does).
    """
    command_parser("python -m auxkern.inspect.ways", __doc__.partition(": ")[2], _EPILOG).parse_args(argv)
    for line in table():
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
