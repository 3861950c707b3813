"""Configuration of a decoder-only transformer; `families` maps it to and from config.json."""

from dataclasses import dataclass

from qstar_jax.models.rope import LongRope, Rope


@dataclass(frozen=True)
class LayerKind:
    """The settings that may differ between layers.

    Attributes:
        rope: Rotary positions; None: none.
        window: Number of tokens a query sees, including itself; None: all.
    """

    rope: Rope | None = None
    window: int | None = None


@dataclass(frozen=True)
class DecoderConfig:
    """Architecture of a decoder; hashable.

    Attributes:
        vocab_size: Vocabulary size, V.
        hidden_size: Width of the residual stream, D.
        intermediate_size: Hidden width of the MLP.
        num_attention_heads: Query heads, H.
        num_key_value_heads: Key/value heads, G; each serves H / G query heads.
        head_dim: Width of a head.
        layers: Per-layer settings, first to last.
        max_position_embeddings: Context length the model was built for, in tokens.
        norm: "rms" (RMSNorm, arXiv 1910.07467), "rms_plus_one" (stores its scale minus 1) or "layer" (LayerNorm).
        norm_eps: Added to the mean square or the variance.
        norm_placement: Norms before attention and MLP ("pre"), after them ("post"), or both ("sandwich").
        parallel_residual: Attention and MLP both read the layer's input, and both are added to it.
        qk_norm: Norm of queries and keys: per "head", over "all" heads together, or None.
        activation: Activation function of the MLP (see `block.ACTIVATIONS`).
        gated_mlp: Use down(activation(gate(x)) * up(x)) (arXiv 2002.05202) instead of down(activation(up(x))).
        qkv_bias: Whether queries, keys and values have biases.
        o_bias: Whether the output projection of attention has a bias.
        mlp_bias: Whether the layers of the MLP have biases.
        learned_positions: Whether a learned vector per position is added to the embedding.
        attention_scale: Multiplies the attention scores; None: head_dim^-1/2.
        score_softcap: Attention scores s become softcap * tanh(s / softcap); None: no cap.
        logit_softcap: The same for the logits.
        embedding_scale: Multiplies the embedding.
        tie_word_embeddings: Whether input and output embeddings are shared.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    layers: tuple[LayerKind, ...]
    max_position_embeddings: int
    norm: str = "rms"
    norm_eps: float = 1e-6
    norm_placement: str = "pre"
    parallel_residual: bool = False
    qk_norm: str | None = None
    activation: str = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    learned_positions: bool = False
    attention_scale: float | None = None
    score_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    tie_word_embeddings: bool = False

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        """The distinct rotary positions of the layers, in order of first use."""
        return tuple(dict.fromkeys(kind.rope for kind in self.layers))

    @property
    def scale(self) -> float:
        """Multiplies the attention scores."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def longrope_context(self) -> int | None:
        """Length in tokens beyond which longrope switches to its long frequencies; None without longrope."""
        scalings = (rope.scaling for rope in self.ropes if rope is not None)
        return next((s.original_max_position_embeddings for s in scalings if isinstance(s, LongRope)), None)

    def forward_flops(self, *, tokens: float, scored_tokens: float, context: float) -> float:
        """Counts the model FLOPs of one forward pass: two per weight and token, plus attention.

        Args:
            tokens: Number of tokens that pass through the layers.
            scored_tokens: Number of tokens whose logits are computed.
            context: Mean number of keys per query in layers without a window.

        Returns:
            Floating-point operations, counting a multiply-add as two; a backward pass costs twice as many.
        """
        heads, kv_heads = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        weights = self.hidden_size * (2 * heads + 2 * kv_heads)
        weights += (3 if self.gated_mlp else 2) * self.hidden_size * self.intermediate_size
        keys = sum(min(context, kind.window or context) for kind in self.layers)
        flops_per_token = self.num_hidden_layers * 2 * weights + 4 * keys * heads
        return tokens * flops_per_token + scored_tokens * 2 * self.hidden_size * self.vocab_size
