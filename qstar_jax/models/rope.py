"""Rotary position embeddings (arXiv 2104.09864) and their scalings for long contexts."""

import math
from dataclasses import dataclass
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Scaling(Protocol):
    """Scales rotary frequencies; fields are named as in config.json."""

    @property
    def attention_scale(self) -> float:
        """Multiplies cosines and sines."""

    def stretch(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """Returns the scaled frequencies, in radians per token."""


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
    """Divides low frequencies only, with a smooth transition (Llama 3.1, arXiv 2407.21783).

    Attributes:
        factor: The scaling factor.
        low_freq_factor: Wavelengths above original_max_position_embeddings / low_freq_factor are fully scaled.
        high_freq_factor: Those below original_max_position_embeddings / high_freq_factor are unchanged.
        original_max_position_embeddings: Context length before scaling, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    attention_scale = 1.0

    def stretch(self, frequencies: np.ndarray, theta: float) -> np.ndarray:
        """See `Scaling`."""
        # Interpolate by the number of turns that a frequency makes within the original context.
        turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        smooth = np.clip(smooth, 0.0, 1.0)
        return (1 - smooth) * frequencies / self.factor + smooth * frequencies


@dataclass(frozen=True)
class Yarn:
    """Scales frequencies by their number of turns in the original context (YaRN, arXiv 2309.00071).

    Attributes:
        factor: The scaling factor.
        original_max_position_embeddings: Context length before scaling, in tokens.
        attention_factor: Multiplies cosines and sines; None: 0.1 ln(factor) + 1, but see `mscale`.
        beta_fast: Dimensions with more turns are unchanged.
        beta_slow: Dimensions with fewer turns are fully scaled.
        mscale: If `mscale_all_dim` is set too, the attention factor is the ratio of 0.1 mscale ln(factor) + 1 to
            0.1 mscale_all_dim ln(factor) + 1.
        mscale_all_dim: See `mscale`.
        truncate: Whether the bounds of the transition are rounded outwards to whole dimensions.
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

        # The (fractional) dimension whose frequency makes this many turns within the original context.
        def dimension(turns: float) -> float:
            return pairs * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / math.log(theta)

        # Leave dimensions before `low` unchanged, scale those after `high`, and interpolate in between.
        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        ramp = np.clip((np.arange(pairs) - low) / (high - low or 0.001), 0.0, 1.0)
        return ramp * frequencies / self.factor + (1 - ramp) * frequencies


@dataclass(frozen=True)
class LongRope:
    """Divides each frequency by its own factor, with a second set of factors for long texts (arXiv 2402.13753).

    Attributes:
        short_factor: Divisor of each frequency for texts of at most `original_max_position_embeddings` tokens.
        long_factor: The same for longer texts.
        original_max_position_embeddings: Context length before scaling, in tokens.
        factor: The scaling factor, which determines the default of `attention_factor`.
        attention_factor: Multiplies cosines and sines; None: sqrt(1 + ln(factor) / ln(original context)).
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
        """See `Scaling`; `long` selects the long factors."""
        return frequencies / np.array(self.long_factor if long else self.short_factor)


SCALINGS = {"linear": Linear, "llama3": Llama3, "yarn": Yarn, "longrope": LongRope}


@dataclass(frozen=True)
class Rope:
    """Rotary positions of one kind of layer.

    Attributes:
        theta: Base of the geometric series of frequencies.
        fraction: Fraction of the dimensions of a head that is rotated, starting with the first.
        scaling: Scaling for long contexts.
    """

    theta: float
    fraction: float = 1.0
    scaling: Scaling | None = None

    def frequencies(self, head_dim: int, long: bool = False) -> np.ndarray:
        """Computes the rotary frequencies in radians per token, one for each pair of dimensions.

        Returns:
            Float64 frequencies. Shape [F], where F is half of the number of rotated dimensions.
        """
        rotated = int(head_dim * self.fraction)
        frequencies = self.theta ** -(np.arange(0, rotated, 2) / rotated)
        if isinstance(self.scaling, LongRope):
            return self.scaling.stretch(frequencies, self.theta, long)
        return frequencies if self.scaling is None else self.scaling.stretch(frequencies, self.theta)


Rotation = tuple[Float[Array, "B S F"], Float[Array, "B S F"]]  # cosines and sines


def rotation(rope: Rope, head_dim: int, positions: Int[Array, "B S"], long: bool = False) -> Rotation:
    """Computes float32 cosines and sines of positions, including the attention factor of the scaling.

    Args:
        rope: Frequencies and scaling.
        head_dim: Width of a head.
        positions: Positions in tokens. Shape [B, S].
        long: Whether texts are longer than longrope's original context.

    Returns:
        (cosines, sines). Shape [B, S, F] each.
    """
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(rope.frequencies(head_dim, long), jnp.float32)
    scale = 1.0 if rope.scaling is None else rope.scaling.attention_scale
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if scale == 1 else (scale * cos, scale * sin)


def identity_rotation(like: Rotation) -> Rotation:
    """Returns the rotation that leaves vectors exactly as they are."""
    return jnp.ones_like(like[0]), jnp.zeros_like(like[1])


def rotate(x: Float[Array, "B S H D"], rotation: Rotation) -> Float[Array, "B S H D"]:
    """Rotates dimensions i and i + F of each head, the layout of Hugging Face; dimensions from 2 F on are unchanged."""
    cos, sin = rotation
    width, rest = cos.shape[-1], [(0, 0), (0, 0), (0, x.shape[-1] - 2 * cos.shape[-1])]
    # Multiply whole heads: a TPU would pad each part of a head to the width of its vectors.
    cos = jnp.pad(jnp.concatenate([cos, cos], axis=-1), rest, constant_values=1)[:, :, None]
    sin = jnp.pad(jnp.concatenate([-sin, sin], axis=-1), rest)[:, :, None]
    swapped = jnp.concatenate([x[..., width : 2 * width], x[..., :width], x[..., 2 * width :]], axis=-1)
    # Rotate in float32: bfloat16 would lose the low frequencies at large positions.
    return (x.astype(jnp.float32) * cos + swapped.astype(jnp.float32) * sin).astype(x.dtype)
