"""Low-rank adapters (LoRA, arXiv 2106.09685): x W + scale (x A) B, with A and B trained and W frozen.

An adapted model has the parameters of its base plus, next to each adapted kernel, a `lora` dictionary with the two
matrices; layers are stacked along the first axis.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qstar_jax._compat import nnx

Params = dict[str, Any]

_ADAPTER = "lora"  # the name under which flax's LoRALinear keeps its matrices, `lora_a` and `lora_b`


@dataclass(frozen=True)
class Lora:
    """Configuration of an adapter; hashable.

    Attributes:
        rank: Rank of each product A B.
        alpha: The product is scaled by alpha / rank.
        targets: Adapted linear layers, by the names most families use (`q_proj`, ...).
        rank_stabilised: Scale by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732).
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    rank_stabilised: bool = False

    @property
    def scale(self) -> float:
        """Multiplies the product A B."""
        return self.alpha / self._divisor(self.rank)

    def alpha_for(self, rank: int) -> float:
        """Returns the alpha that gives matrices of another rank the same scale."""
        return self.scale * self._divisor(rank)

    def _divisor(self, rank: int) -> float:
        return math.sqrt(rank) if self.rank_stabilised else rank


class LoraLinear(nnx.LoRALinear):
    """Flax's LoRALinear with a scale; the adapter is float32, whatever the dtype of the base.

    A is initialized uniformly in +-1/sqrt(inputs), as in PEFT, and B to 0, so the layer starts equal to its base.
    """

    def __init__(self, inputs: int, outputs: int, lora: Lora, *, dtype, rngs: nnx.Rngs, **kwargs):
        super().__init__(
            inputs,
            outputs,
            lora_rank=lora.rank,
            lora_dtype=dtype,
            lora_param_dtype=jnp.float32,
            a_initializer=jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
            dtype=dtype,
            rngs=rngs,
            **kwargs,
        )
        self.scale = lora.scale

    def __call__(self, x: Float[Array, "N I"]) -> Float[Array, "N O"]:
        """Applies the layer to N tokens."""
        return nnx.Linear.__call__(self, x) + self.scale * self.lora(x)


@dataclass(frozen=True)
class LinearFactory:
    """Makes the linear layers of a model, with an adapter on the layers that have one.

    Attributes:
        lora: The adapter; None: plain layers.
        dtype: Dtype of the products.
        param_dtype: Dtype of kernels and biases.
    """

    lora: Lora | None
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    def __call__(self, name: str, inputs: int, outputs: int, *, bias: bool, rngs: nnx.Rngs) -> nnx.Linear:
        """Makes a layer, called `name` in `Lora.targets`."""
        common = {"use_bias": bias, "dtype": self.dtype, "param_dtype": self.param_dtype, "rngs": rngs}
        if self.lora is not None and name in self.lora.targets:
            return LoraLinear(inputs, outputs, self.lora, **common)
        return nnx.Linear(inputs, outputs, **common)


def split_adapter(params: Params) -> tuple[Params, Params]:
    """Splits parameters into (base, adapter): trees over the same paths, the second empty without an adapter."""
    base, adapter = {}, {}
    for name, value in params.items():
        if name == _ADAPTER:
            adapter[name] = value
        elif not isinstance(value, dict):
            base[name] = value
        else:
            base[name], inner = split_adapter(value)
            if inner:
                adapter[name] = inner
    return base, adapter


def attach_adapter(base: Params, adapter: Params) -> Params:
    """Inverts `split_adapter`."""
    merged = {name: attach_adapter(base[name], adapter[name]) for name in adapter if name in base}
    return base | adapter | merged


def merge_adapter(params: Params, lora: Lora) -> Params:
    """Merges the adapter into its base: W + scale A B, computed in float32 and returned in the dtype of the base."""
    merged = {}
    for name, value in params.items():
        if name == _ADAPTER:
            continue
        if not isinstance(value, dict):
            merged[name] = value
        elif _ADAPTER in value:
            a, b = value[_ADAPTER]["lora_a"], value[_ADAPTER]["lora_b"]
            product = jnp.einsum("lir,lro->lio", a, b, precision="highest")
            kernel = (value["kernel"].astype(jnp.float32) + lora.scale * product).astype(value["kernel"].dtype)
            merged[name] = {**value, "kernel": kernel}
            del merged[name][_ADAPTER]
        else:
            merged[name] = merge_adapter(value, lora)
    return merged
