"""Rotary positions (arXiv 2104.09864), and the ways in which they are stretched for long contexts."""

import math
from dataclasses import dataclass
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Scaling(Protocol):
    """How rotary frequencies are stretched; the fields are named as in config.json."""

    @property
    def attention_scale(self) -> float:
        """What cosines and sines are multiplied by."""

    def stretch(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """Returns the stretched frequencies, in radians a token."""


@dataclass(frozen=True)
class Linear:
    """Divides every frequency by `factor` (position interpolation, arXiv 2306.15595)."""

    factor: float

    attention_scale = 1.0

    def stretch(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """See `Scaling`."""
        return frequencies / self.factor


@dataclass(frozen=True)
class Llama3:
    """Divides the low frequencies only, with a smooth passage (Llama 3.1, arXiv 2407.21783).

    Attributes:
        factor: The stretch.
        low_freq_factor: Wavelengths above original_max_position_embeddings / low_freq_factor are stretched fully.
        high_freq_factor: Those below original_max_position_embeddings / high_freq_factor are left alone.
        original_max_position_embeddings: Context length before the stretch, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    attention_scale = 1.0

    def stretch(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """See `Scaling`."""
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)  # in the original context
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        smooth = np.clip(smooth, 0.0, 1.0)
        return (1 - smooth) * frequencies / self.factor + smooth * frequencies


@dataclass(frozen=True)
class Yarn:
    """Divides frequencies by their number of turns in the original context (arXiv 2309.00071).

    Attributes:
        factor: The stretch.
        original_max_position_embeddings: Context length before the stretch, in tokens.
        attention_factor: What cosines and sines are multiplied by; None: 0.1 ln(factor) + 1, see `mscale`.
        beta_fast: Dimensions with more turns are left alone.
        beta_slow: Dimensions with fewer turns are stretched fully.
        mscale: With `mscale_all_dim`: the attention factor is (0.1 mscale ln(factor) + 1) over the same of that.
        mscale_all_dim: See `mscale`.
        truncate: Whether the bounds between dimensions are rounded outwards.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @property
    def attention_scale(self) -> float:
        """See `Scaling`."""
        if self.attention_factor is not None:
            return self.attention_factor

        def scale(mscale: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:
            return scale(self.mscale) / scale(self.mscale_all_dim)
        return scale(1.0)

    def stretch(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """See `Scaling`."""
        pairs = len(frequencies)

        def dimension(turns: float) -> float:  # whose frequency makes so many turns in the original context
            return pairs * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(theta)

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        ramp = np.clip((np.arange(pairs) - low) / (high - low or 0.001), 0.0, 1.0)
        return ramp * frequencies / self.factor + (1 - ramp) * frequencies


@dataclass(frozen=True)
class LongRope:
    """Divides each frequency by a number of its own, another one for long texts (arXiv 2402.13753).

    Attributes:
        short_factor: A divisor for each frequency, for texts of at most `original_max_position_embeddings` tokens.
        long_factor: The same for longer ones.
        original_max_position_embeddings: Context length before the stretch, in tokens.
        factor: The stretch, from which the attention factor follows.
        attention_factor: What cosines and sines are multiplied by; None: sqrt(1 + ln(factor) / ln(original ...)).
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    factor: float
    attention_factor: float | None = None

    @property
    def attention_scale(self) -> float:
        """See `Scaling`."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position_embeddings))

    def stretch(self, frequencies: np.ndarray, theta: float, long: bool = False) -> np.ndarray:
        """See `Scaling`; `long` says of which texts."""
        return frequencies / np.array(self.long_factor if long else self.short_factor)


SCALINGS = {"linear": Linear, "llama3": Llama3, "yarn": Yarn, "longrope": LongRope}


@dataclass(frozen=True)
class Rope:
    """Rotary positions of one kind of layer.

    Attributes:
        theta: Base of the geometric series of frequencies.
        fraction: Share of a head's dimensions that is rotated, from the first on.
        scaling: Stretch for long contexts.
    """

    theta: float
    fraction: float = 1.0
    scaling: Scaling | None = None

    def frequencies(self, head_dim: int, long: bool = False) -> np.ndarray:
        """Rotary frequencies in radians a token, one for each pair of dimensions.

        Args:
            head_dim: Width of a head.
            long: Whether texts are longer than longrope's original context.

        Returns:
            Frequencies, float64. Shape [F], half of the dimensions that are rotated.
        """
        rotated = int(head_dim * self.fraction)
        frequencies = self.theta ** -(np.arange(0, rotated, 2) / rotated)
        if isinstance(self.scaling, LongRope):
            return self.scaling.stretch(frequencies, self.theta, long)
        return frequencies if self.scaling is None else self.scaling.stretch(frequencies, self.theta)


Rotation = tuple[Float[Array, "B S F"], Float[Array, "B S F"]]  # cosines and sines


def rotation(rope: Rope, head_dim: int, positions: Int[Array, "B S"], long: bool = False) -> Rotation:
    """Cosines and sines of positions, float32; they carry the scaling's attention factor.

    Args:
        rope: Frequencies and stretch.
        head_dim: Width of a head.
        positions: In tokens. Shape [B, S].
        long: Whether texts are longer than longrope's original context.

    Returns:
        (cosines, sines). Shape [B, S, F] each.
    """
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(rope.frequencies(head_dim, long), jnp.float32)
    scale = 1.0 if rope.scaling is None else rope.scaling.attention_scale
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if scale == 1 else (scale * cos, scale * sin)


def no_rotation(like: Rotation) -> Rotation:
    """What leaves vectors as they are, exactly."""
    return jnp.ones_like(like[0]), jnp.zeros_like(like[1])


def rotate(x: Float[Array, "B S H D"], rotation: Rotation) -> Float[Array, "B S H D"]:
    """Rotates dimension i of each head with i + F, as Hugging Face stores them; dimensions from 2 F on stay."""
    cos, sin = (part[:, :, None] for part in rotation)
    width = 2 * cos.shape[-1]
    left, right = jnp.split(x[..., :width].astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)
    return rotated if width == x.shape[-1] else jnp.concatenate([rotated, x[..., width:]], axis=-1)
