"""The shape of a decoder-only transformer, in the field's terms; `families` says what it is called in a config.json."""

from dataclasses import dataclass

from qstar_jax.models.rope import LongRope, Rope


@dataclass(frozen=True)
class LayerKind:
    """What may differ between layers.

    Attributes:
        rope: Rotary positions; None: none.
        window: Tokens that a query sees, itself and those right before it; None: all.
    """

    rope: Rope | None = None
    window: int | None = None


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a decoder; hashable.

    Attributes:
        vocab_size: Rows of the embedding, V.
        hidden_size: Width of the stream, D.
        intermediate_size: Width within the MLP.
        num_attention_heads: Heads of queries, H.
        num_key_value_heads: Heads of keys and values, G; each serves H / G heads of queries.
        head_dim: Width of a head.
        layers: What is particular to each layer, from the first to the last.
        max_position_embeddings: Context for which the model was made, in tokens.
        norm: "rms" (RMSNorm, arXiv 1910.07467), "rms_plus_one" (its scale is stored less 1) or "layer" (LayerNorm).
        norm_eps: Added to the mean square or variance.
        norm_places: Norms stand before attention and MLP ("pre"), behind them ("post"), or both ("sandwich").
        parallel_residual: Attention and MLP both read the layer's input, and their sum is added to it.
        qk_norm: Norm of queries and keys: of each "head", of "all" heads together, or None.
        activation: Name of the MLP's activation function (see `block.ACTIVATIONS`).
        gated_mlp: down(activation(gate(x)) * up(x)) (arXiv 2002.05202) in place of down(activation(up(x))).
        qkv_bias: Whether queries, keys and values have biases.
        o_bias: Whether the output of attention has one.
        mlp_bias: Whether the MLP's layers have biases.
        learned_positions: Whether a learned vector for each position is added to the embedding.
        attention_scale: Factor of the attention scores; None: head_dim^-1/2.
        score_softcap: Attention scores s become softcap * tanh(s / softcap); None: they stay.
        logit_softcap: The same of the logits.
        embedding_scale: Factor of the embedding.
        tie_word_embeddings: Whether the embedding is the unembedding too.
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
    norm_places: str = "pre"
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
        """How many layers there are."""
        return len(self.layers)

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        """The different rotary positions of the layers, in the order of their first use."""
        return tuple(dict.fromkeys(kind.rope for kind in self.layers))

    @property
    def scale(self) -> float:
        """Factor of the attention scores."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def longrope_context(self) -> int | None:
        """Tokens beyond which longrope has other frequencies; None without longrope."""
        scalings = [rope.scaling for rope in self.ropes if rope is not None]
        return next((one.original_max_position_embeddings for one in scalings if isinstance(one, LongRope)), None)

    def forward_flops(self, *, tokens: float, scored_tokens: float, context: float) -> float:
        """Model FLOPs of one forward pass: two for each weight that a token meets, and those of attention.

        Args:
            tokens: Tokens that pass the layers.
            scored_tokens: Tokens whose logits are computed.
            context: Mean number of keys that a query sees where there is no window.

        Returns:
            Floating-point operations, a multiply-add counted as two; a backward pass costs twice as many.
        """
        heads, kv_heads = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        weights = self.hidden_size * (2 * heads + 2 * kv_heads)
        weights += (3 if self.gated_mlp else 2) * self.hidden_size * self.intermediate_size
        seen = sum(min(context, kind.window or context) for kind in self.layers)
        per_token = self.num_hidden_layers * 2 * weights + 4 * seen * heads
        return tokens * per_token + scored_tokens * 2 * self.hidden_size * self.vocab_size
