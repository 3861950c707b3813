"""What training.py measures: models in the shapes of real ones, pairs, and the options of both libraries."""

from dataclasses import dataclass, field, replace

LLAMA3_ROPE = {
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def llama(width: int, inner: int, layers: int, heads: int, groups: int, vocabulary: int, **more: object) -> dict:
    """The config.json of a Llama."""
    shape = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocabulary}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": groups, "max_position_embeddings": 131072}
    return {"model_type": "llama", "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 500000.0, **shape, **more}


def qwen3(width: int, inner: int, layers: int, heads: int, groups: int, vocabulary: int, head: int) -> dict:
    """The config.json of a Qwen3."""
    config = llama(width, inner, layers, heads, groups, vocabulary, head_dim=head, tie_word_embeddings=True)
    return config | {"model_type": "qwen3", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 40960}


SHAPES = {"tldr": (384, 48), "chat": (64, 448)}  # tokens of a prompt, and of each response
TINY_SHAPES = {"tldr": (24, 4), "chat": (4, 28)}


@dataclass(frozen=True)
class Contest:
    """Steps on pairs of each shape, of this library, of TRL, or of both.

    Attributes:
        name: The model's.
        config: Its config.json.
        shapes: Name of each shape of pairs -> tokens of a prompt, and of each response.
        batch: Pairs per step.
        accumulate: Our micro-batches per step, for each shape; none: we do not take part.
        trl_accumulate: TRL's, likewise.
        options: Further words for dpo_ours.py.
        environment: Further variables for it.
        traced: Whether to trace a step.
        seconds: What it takes on an H100, roughly.
    """

    name: str
    config: dict
    shapes: dict[str, tuple[int, int]]
    batch: int
    accumulate: list[int]
    trl_accumulate: list[int] = field(default_factory=list)
    options: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    traced: bool = False
    seconds: float = 60


# Both libraries hold their memory at once, so ours gets a share of the card and TRL the rest. Compiled for an H100, our
# steps take 34.9 and 33.9 GiB (1B) and 23.7 and 24.2 (0.6B). TRL needs 26 and 13 for weights, optimizer, gradients and
# bfloat16 copies, and 1.7 to 2.2 GiB of activations per pair of a micro-batch, so on chat-like pairs of the 1B shape
# its micro-batches are half of what fits alone.
DOTS = ["--compute.remat", "dots"]
ONE_B = Contest(
    "llama-3.2-1b",
    llama(2048, 8192, 16, 32, 8, 128256, head_dim=64, tie_word_embeddings=True, **LLAMA3_ROPE),
    SHAPES,
    batch=32,
    accumulate=[1, 4],
    trl_accumulate=[4, 8],
    options=DOTS,
    environment={"XLA_CLIENT_MEM_FRACTION": "0.465"},
    traced=True,
    seconds=90,
)
SMALL = Contest(
    "qwen3-0.6b",
    qwen3(1024, 3072, 28, 16, 8, 151936, head=128),
    SHAPES,
    batch=32,
    accumulate=[1, 2],
    trl_accumulate=[2, 4],
    options=DOTS,
    environment={"XLA_CLIENT_MEM_FRACTION": "0.335"},
    seconds=50,
)
# A base in bfloat16, which is its own reference. It has the card to itself, once the others have gone.
ON_DEMAND = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_CLIENT_MEM_FRACTION": "0.92"}
LORA = Contest(
    "llama-3-8b lora",
    llama(4096, 14336, 32, 32, 8, 128256, head_dim=128),
    {"tldr": SHAPES["tldr"]},
    batch=16,
    accumulate=[2],
    options=[*DOTS, "--lora_rank", "16", "--compute.param_dtype", "bfloat16"],
    environment=ON_DEMAND,
    seconds=15,
)


def variant(name: str, options: list[str], shapes: dict[str, int]) -> Contest:
    """Our steps on the 1B shape with other options; for each shape of pairs, the micro-batches per step."""
    return replace(
        ONE_B,
        name=f"{ONE_B.name} ({name})",
        shapes={shape: SHAPES[shape] for shape in shapes},
        accumulate=list(shapes.values()),
        trl_accumulate=[],
        options=options,
        environment=ON_DEMAND,
        traced=False,
        seconds=15,
    )


# Contests of a group are started side by side, and measured one after the other; each group begins after the last.
GROUPS = [
    [ONE_B],
    [SMALL, LORA],
    [
        replace(
            ONE_B, name=f"{ONE_B.name} (trl alone)", accumulate=[], trl_accumulate=[2, 4], traced=False, seconds=45
        ),
        variant("attention blockwise", [*DOTS, "--compute.attention", "blockwise"], {"tldr": 1, "chat": 4}),
        variant("layers apart", [*DOTS, "--compute.scan_layers", "false"], {"tldr": 1, "chat": 2}),
        variant("remat attention", ["--compute.remat", "attention"], {"tldr": 1, "chat": 2}),
        variant("remat none", [], {"tldr": 2, "chat": 4}),
        variant("larger micro-batches", DOTS, {"chat": 2}),
        variant("two prompts a row", [*DOTS, "--row_length", "1024"], {"tldr": 1}),
        variant("prompts repeated", [*DOTS, "--layout", "plain"], {"tldr": 2}),
    ],
]


def shrunk(contest: Contest) -> Contest:
    """The same in small, for any machine."""
    make = qwen3 if contest.config["model_type"] == "qwen3" else llama
    head = {"head": 16} if make is qwen3 else {"head_dim": 16, "tie_word_embeddings": "lora" not in contest.name}
    parts = [2] * len(contest.shapes)
    return replace(
        contest,
        config=make(64, 128, 2, 4, 2, 512, **head),
        shapes={shape: TINY_SHAPES[shape] for shape in contest.shapes},
        batch=4,
        accumulate=parts if contest.accumulate else [],
        trl_accumulate=parts if contest.trl_accumulate else [],
        environment={},
        seconds=0,
    )


TINY_GROUPS = [[shrunk(ONE_B), shrunk(LORA)]]
