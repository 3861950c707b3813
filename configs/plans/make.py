"""Compiles the configurations of the paper's scale for absent hardware, and prints the table of configs/README.md.

    pip install -e '.[plan,plan-gpu]' && python configs/plans/make.py

Each plan is a file beside this one; delete it to make it anew. Each takes a minute or two.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
LORA, AT_ONCE = ["--lora.rank", "16"], ["--train.accumulate", "1"]
PLANS = [  # configuration, model, topology, other options
    ("sft_tldr", "pythia-2.8b", "v5e:4x4", AT_ONCE),
    ("sft_tldr", "pythia-2.8b", "h100:1x1x1", LORA),
    ("sft_tldr", "pythia-2.8b", "h100:1x1x8", AT_ONCE),
    ("dpo_tldr", "pythia-2.8b", "v5e:4x4", []),
    ("dpo_tldr", "pythia-2.8b", "h100:1x1x1", LORA),
    ("dpo_tldr", "pythia-2.8b", "h100:1x1x8", []),
    ("dpo_llama3_8b", "llama-3.1-8b", "v5e:8x8", []),
    ("dpo_llama3_8b", "llama-3.1-8b", "v6e:4x4", []),
    ("dpo_llama3_8b", "llama-3.1-8b", "h100:1x1x8", []),
    ("dpo_qwen3_8b", "qwen3-8b", "v5e:8x8", []),
    ("dpo_qwen3_8b", "qwen3-8b", "v6e:4x4", []),
    ("dpo_qwen3_8b", "qwen3-8b", "h100:1x1x8", []),
    ("generate_beams", "pythia-2.8b", "v5e:4x4", []),
    ("generate_beams", "pythia-2.8b", "h100:1x1x1", []),
    ("generate_beams", "llama-3.1-8b", "v6e:4x4", []),
    ("generate_beams", "llama-3.1-8b", "h100:1x1x1", []),
    ("generate_beams", "qwen3-8b", "v6e:4x4", []),
    ("generate_beams", "qwen3-8b", "h100:1x1x1", []),
]


def name_of(config: str, model: str, topology: str) -> str:
    """Returns the name of a plan, such as dpo_tldr-pythia-2.8b-v5e-4x4."""
    return f"{config}-{model}-{topology.replace(':', '-')}"


def make(config: str, model: str, topology: str, options: list[str]):
    """Makes a plan with `qstar plan`."""
    verb = config.partition("_")[0]
    with tempfile.TemporaryDirectory() as out:
        words = ["--verb", verb, "--config", f"configs/{config}.yaml", "--model", f"configs/plans/models/{model}"]
        words += ["--topology", topology, "--out", out, *options]
        subprocess.run([Path(sys.executable).with_name("qstar"), "plan", *words], check=True, cwd=HERE.parents[1])
        text = (Path(out) / "plan.json").read_text(encoding="utf-8")
    (HERE / f"{name_of(config, model, topology)}.json").write_text(text, encoding="utf-8")


def row(config: str, model: str, topology: str, options: list[str]) -> str:
    """Lays out a plan as a row of the table."""
    plan = json.loads((HERE / f"{name_of(config, model, topology)}.json").read_text(encoding="utf-8"))
    seconds = plan["seconds"]
    cells = [
        f"`{config}`, {model}",
        topology,
        ", ".join([" ".join(options).removeprefix("--")] * bool(options) + plan["changes"]),
        f"{plan['memory']['total'] / 2**30:.1f} of {plan['memory_limit'] / 2**30:.0f}",
        f"{sum(x['bytes'] for x in plan['collectives'].values()) / 1e9:.1f}",
        " / ".join(f"{seconds[name]:.2g}" for name in ("arithmetic", "memory", "network")),
        f"{plan['tokens_per_second']:,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """Lays out all plans in Markdown."""
    head = "| run | hardware | changed | GiB | GB sent | s: arithmetic / memory / network | tokens per s |"
    return "\n".join([head, "|---|---|---|---|---|---|---|", *(row(*plan) for plan in PLANS)])


if __name__ == "__main__":
    for plan in PLANS:
        if not (HERE / f"{name_of(*plan[:3])}.json").is_file():
            make(*plan)
    print(table())
