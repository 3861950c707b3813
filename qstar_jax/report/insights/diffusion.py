"""Diffusion: reward against divergence, digits before and after, and where on them the reward is."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from rich.console import Console

from qstar_jax.evaluation.insights.diffusion import Diffusion, Picture, Point
from qstar_jax.evaluation.intervals import Interval
from qstar_jax.report.dots import draw_dots
from qstar_jax.report.insights.view import View
from qstar_jax.report.numbers import decimal, signed_interval, with_interval
from qstar_jax.report.panel import Panel, Style
from qstar_jax.report.tables import Table, cell, print_table

_CREDIT_OF = 500.0  # the strength whose map of rewards is shown, or else the one nearest to it


def panels(diffusion: Diffusion) -> list[Panel]:
    """Shows reward and legibility against divergence, rewards of held-out pairs, images, and a map of rewards."""
    return [
        _curve_panel(diffusion, "reward", "True reward"),
        _curve_panel(diffusion, "read", "Images that can be read"),
        _pairs_panel(diffusion),
        _images_panel(diffusion),
        _credit_panel(diffusion),
    ]


def _name(beta_dpo: float) -> str:
    return f"beta_dpo {beta_dpo:g}"


def _curve_panel(diffusion: Diffusion, measure: str, title: str) -> Panel:
    curves = {_name(one.beta_dpo): (diffusion.reference, *one.points) for one in diffusion.strengths}
    words = "; ".join(
        f"{name} {with_interval(getattr(points[-1], measure))} at {decimal(points[-1].kl.mean, 1)} nats"
        for name, points in curves.items()
    )
    start = with_interval(getattr(diffusion.reference, measure))
    weakest = diffusion.strengths[0]
    gain = weakest.points[-1].gain if measure == "reward" else weakest.points[-1].read_gain
    return Panel(
        f"{title} against divergence",
        f"{title}: reference {start}; {words}.",
        partial(_draw_curve, curves=curves, measure=measure, label=title.lower()),
        2.6,
        f"{title}: the weakest penalty, {_name(weakest.beta_dpo)}, changes it by {signed_interval(gain)}.",
    )


def _draw_curve(axes: Axes, style: Style, *, curves: Mapping[str, Sequence[Point]], measure: str, label: str):
    for number, (name, points) in enumerate(curves.items()):
        mark = style.mark(number)
        values: list[Interval] = [getattr(point, measure) for point in points]
        kls = [point.kl.mean for point in points]
        axes.plot(kls, [value.mean for value in values], label=name, **mark)
        axes.fill_between(
            kls, [v.low for v in values], [v.high for v in values], color=mark["color"], alpha=0.14, linewidth=0
        )
    _thin_out(axes)
    axes.set_xlabel("KL to the reference, nats per image")
    axes.set_ylabel(label)
    axes.grid(axis="y")


def _pairs_panel(diffusion: Diffusion) -> Panel:
    groups = {
        _name(one.beta_dpo): {"preferred": one.chosen, "other": one.rejected, "-KL(ref || policy)": one.expected}
        for one in diffusion.strengths
    }
    words = "; ".join(
        f"{name}: " + ", ".join(f"{series} {with_interval(value, 1)}" for series, value in group.items())
        for name, group in groups.items()
    )
    falls = sum(one.chosen.sign < 0 for one in diffusion.strengths)
    return Panel(
        "Log-ratios of held-out images",
        f"Log-ratio, in nats: {words}.",
        partial(
            _draw_pairs, groups=groups, series=["preferred", "other", "-KL(ref || policy)"], label="log-ratio, nats"
        ),
        0.7 + 0.45 * len(groups),
        f"Preferred images become less likely at {falls} of {len(groups)} strengths; the mean of all is -KL (Eq. 16).",
    )


def _draw_pairs(
    axes: Axes, style: Style, *, groups: Mapping[str, Mapping[str, Interval]], series: list[str], label: str
):
    draw_dots(axes, style, groups, series=series, label=label, line=0.0)
    _thin_out(axes)
    axes.set_xlim(left=2 * min(value.low for group in groups.values() for value in group.values()), right=1)


def _thin_out(axes: Axes):
    """Draws nats on a logarithmic axis that holds zero, with ticks that need no mathematics."""
    axes.set_xscale("symlog", linthresh=1)
    axes.xaxis.set_major_formatter("{x:g}")


def _images_panel(diffusion: Diffusion) -> Panel:
    rows = {"reference": diffusion.images} | {_name(one.beta_dpo): one.images for one in reversed(diffusion.strengths)}
    return Panel(
        "Images before and after",
        f"Digits 0 to 9 from the same noise, one row each: {', '.join(rows)}.",
        partial(_draw_grid, rows=rows, colours="Greys", limits=(-1.0, 1.0)),
        0.4 + 0.34 * len(rows),
        "The same noise, drawn by the reference and after DPO: the weaker the penalty, the further from digits.",
    )


def _credit_panel(diffusion: Diffusion) -> Panel:
    one = min(diffusion.strengths, key=lambda strength: abs(strength.beta_dpo - _CREDIT_OF))
    rows = {"an image": one.credit, "mean": one.mean_credit}
    rows = {name: [np.asarray(picture) / _scale(pictures) for picture in pictures] for name, pictures in rows.items()}
    scales = [decimal(_scale(pictures)) for pictures in (one.credit, one.mean_credit)]
    return Panel(
        f"Rewards of pixels, {_name(one.beta_dpo)}",
        f"Log-ratio of each pixel of the digits 0 to 9, summed over steps; full colour is {scales[0]} nats. Sums: "
        f"{', '.join(decimal(sum(credit), 1) for credit in one.credit)} nats. Means over all images of a digit sum to "
        f"{', '.join(decimal(sum(credit), 1) for credit in one.mean_credit)} nats.",
        partial(_draw_grid, rows=rows, colours="RdBu", limits=(-1.0, 1.0)),
        1.2,
        f"Where the reward is, on one image and on average: blue above zero, red below; full colour is {scales[0]} and "
        f"{scales[1]} nats.",
    )


def _scale(pictures: Sequence[Picture]) -> float:
    return float(np.percentile(np.abs(pictures), 98)) or 1.0


def _draw_grid(
    axes: Axes, style: Style, *, rows: Mapping[str, Sequence[Picture]], colours: str, limits: tuple[float, float]
):
    """Draws one row of square pictures per entry, a pixel apart."""
    side = round(len(next(iter(rows.values()))[0]) ** 0.5)
    blank = partial(np.pad, pad_width=((0, 1), (0, 1)), constant_values=np.nan)
    image = np.concatenate(
        [
            np.concatenate([blank(np.reshape(picture, (side, side))) for picture in pictures], axis=1)
            for pictures in rows.values()
        ]
    )
    axes.imshow(image, cmap=colours, vmin=limits[0], vmax=limits[1], interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([side / 2 - 0.5 + (side + 1) * row for row in range(len(rows))], list(rows))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def tables(diffusion: Diffusion, *, brief: bool = False) -> list[Table]:
    """What policies draw, and what their exact returns say of held-out images; `brief` leaves out most intervals."""
    drawn = [("reference", *_drawn_cells(diffusion.reference, brief))]
    for one in diffusion.strengths:
        drawn += [(_name(one.beta_dpo), *_drawn_cells(point, brief)) for point in one.points]
    returns = [
        (
            _name(one.beta_dpo),
            with_interval(one.correlation),
            cell(one.chosen, 1, lone=brief),
            cell(one.rejected, 1, lone=brief),
            cell(one.expected, 1, lone=brief),
        )
        for one in diffusion.strengths
    ]
    columns = ("policy", "steps", "true reward", "gain", "KL", "ink", "read", "change in read")
    said = ("policy", "rank correlation with true reward", "preferred", "other", "-KL(ref || policy)")
    return [
        Table("Images of each policy", columns, tuple(drawn)),
        Table("Exact returns of held-out images, in nats", said, tuple(returns)),
    ]


def _drawn_cells(point: Point, brief: bool) -> tuple[str, ...]:
    return (
        str(point.steps),
        cell(point.reward, 2, lone=brief),
        signed_interval(point.gain),
        cell(point.kl, 1, lone=brief),
        cell(point.ink, 3, lone=brief),
        cell(point.read, 2, lone=brief),
        cell(point.read_gain, 2, lone=brief),
    )


def facts(diffusion: Diffusion) -> list[str]:
    """Names the settings, and what is known exactly."""
    return [
        f"seed {diffusion.seed}; {diffusion.steps} denoising steps; {diffusion.pairs:,} pairs of images, of which "
        f"{diffusion.agreement:.0%} are labelled as the true reward has it",
        f"{diffusion.samples:,} images per measurement, from the same noise for all policies; as many of the "
        "reference's trajectories are held out",
        "true reward: 20 times the ink, and the log-probability of the digit that was asked for under a classifier",
        "read: the five nearest among other images are mostly of the digit that was asked for; no reward knows them",
        "errors are means over 64 pixels: beta_dpo is another temperature for other sizes and numbers of steps",
        "log-ratios and divergences of steps are exact, since all steps are Gaussians of one variance",
        "bands and brackets: 95 % bootstrap intervals over images, or pairs of them",
    ]


def print_diffusion(diffusion: Diffusion, console: Console | None = None):
    """Prints what each policy draws, and what its returns say of held-out images."""
    for table in tables(diffusion, brief=True):
        print_table(table, console)


VIEW = View(
    Diffusion,
    insight="diffusion",
    heading="Diffusion: rewards of denoising steps",
    panels=panels,
    tables=tables,
    facts=facts,
    print=print_diffusion,
)
