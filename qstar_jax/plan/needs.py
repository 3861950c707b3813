"""What a step or a search needs, whether it was compiled or estimated."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Needs:
    """What a program needs of one device.

    Attributes:
        memory: Bytes: of arguments, of temporaries, in total, and before them of their parts where these are estimated;
            empty if the compiler found no room for them.
        flops: FLOPs that the model needs, and those of the products in the program, which lack those of kernels that
            cannot be read.
        collectives: Kind -> how often it runs (`count`), and what it sends (`bytes`).
        memory_traffic: Bytes read from and written to memory, at most: as if nothing stayed in the processor between
            two kernels.
        tokens: Tokens of the texts of a step, or new tokens of the responses of a search, over all devices.
    """

    memory: Mapping[str, int]
    flops: Mapping[str, float]
    collectives: Mapping[str, Mapping[str, float]]
    memory_traffic: float
    tokens: int
