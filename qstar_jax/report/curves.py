"""The curves of a run, from its metrics.jsonl: loss, rewards, margin and accuracy, in training and on held-out rows."""

import io
from pathlib import Path

from matplotlib.figure import Figure

from qstar_jax.training.run_log import read_metrics

# Title of a panel -> its curves: name of the metric, label, colour (safe for colour-blind readers).
_PANELS: dict[str, list[tuple[str, str, str]]] = {
    "loss": [("loss", "loss", "#0072B2")],
    "reward of samples": [
        ("objective/scores", "score", "#009E73"),
        ("objective/rlhf_reward", "score less the price of leaving the reference", "#0072B2"),
    ],
    "KL to the reference, nats per response": [("objective/kl", "KL", "#0072B2")],
    "tokens per response": [("lengths/completion", "length", "#0072B2")],
    "implicit rewards": [
        ("rewards/chosen", "chosen", "#0072B2"),
        ("rewards/rejected", "rejected", "#D55E00"),
        ("rewards/reference_expected", "reference's own responses (Eq. 16)", "#7F7F7F"),
    ],
    "reward margin": [("rewards/margins", "margin", "#0072B2")],
    "pairs ranked correctly": [("rewards/accuracies", "accuracy", "#0072B2")],
}


def draw_curves(metrics: dict[str, tuple[list[int], list[float]]]) -> Figure:
    """Draws every panel that the run has numbers for.

    Training is a thin line, evaluation a thick one with markers; bands are two standard errors, if logged.
    """
    panels = {
        title: [curve for curve in curves if curve[0] in metrics or f"eval_{curve[0]}" in metrics]
        for title, curves in _PANELS.items()
    }
    panels = {title: curves for title, curves in panels.items() if curves}
    figure = Figure(figsize=(4.4 * min(len(panels), 2), 3.2 * -(-len(panels) // 2)), layout="constrained")
    for number, (title, curves) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(-(-len(panels) // 2), min(len(panels), 2), number)
        for name, label, colour in curves:
            if name in metrics:
                axes.plot(*metrics[name], color=colour, alpha=0.45, linewidth=1, label=f"{label}, training")
            if f"eval_{name}" in metrics:
                steps, values = metrics[f"eval_{name}"]
                axes.plot(steps, values, "o-", color=colour, markersize=4, linewidth=2, label=f"{label}, held out")
                _, errors = metrics.get(f"eval_{name}_stderr", ((), ()))
                if len(errors) == len(values):
                    low, high = ([v + side * e for v, e in zip(values, errors, strict=True)] for side in (-2, 2))
                    axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("step")
        axes.legend(frameon=False, fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def curves_png(run: Path) -> bytes:
    """Draws a run's curves as a PNG."""
    file = io.BytesIO()
    draw_curves(read_metrics(run)).savefig(file, dpi=110)
    return file.getvalue()


def write_curves(run: Path) -> Path:
    """Draws a run's curves into its folder."""
    path = run / "curves.png"
    path.write_bytes(curves_png(run))
    return path
