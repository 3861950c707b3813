"""The ways to decode that a sweep compares."""

from dataclasses import dataclass

from qstar_jax.config import DecodeOptions, SweepConfig
from qstar_jax.errors import InputError


@dataclass(frozen=True, order=True)
class Setting:
    """One way to decode.

    Attributes:
        width: Beams.
        decoder: "sampled", "greedy" or "beam".
        seed: Seed for sampling; 0 where nothing is drawn.
    """

    width: int
    decoder: str
    seed: int = 0

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return {"sampled": f"sampled-{self.seed}", "greedy": "greedy", "beam": f"beams-{self.width}"}[self.decoder]

    @property
    def name(self) -> str:
        """Name of the decoder, whatever the seed."""
        return f"{self.width} beams" if self.decoder == "beam" else self.decoder

    def options(self, config: SweepConfig) -> DecodeOptions:
        """Returns its `decode:` block."""
        common = {"max_new_tokens": config.max_new_tokens, "stop": config.stop}
        match self.decoder:
            case "sampled":
                drawn = {"temperature": config.temperature, "top_k": config.top_k, "seed": self.seed}
                return DecodeOptions(method="sample", **drawn, **common)
            case "beam":
                return DecodeOptions(method="beam", beams=self.width, **common)
        return DecodeOptions(**common)


def settings(config: SweepConfig) -> list[Setting]:
    """Lists the ways to decode that a sweep compares.

    Returns:
        Samples of each seed, greedy, and each width.

    Raises:
        InputError: If widths or seeds are missing, repeated or out of range.
    """
    for name, values, least in (("widths", config.widths, 2), ("seeds", config.seeds, 0)):
        if not values or len(set(values)) < len(values) or min(values) < least:
            raise InputError(
                f"--{name} {values}: expected one or more different numbers of at least {least}"
                + ("; width 1 is always tried" if name == "widths" else "")
            )
    sampled = [Setting(1, "sampled", seed) for seed in config.seeds]
    return [*sampled, Setting(1, "greedy"), *(Setting(width, "beam") for width in sorted(config.widths))]
