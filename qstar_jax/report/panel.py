"""A panel is one small picture; a sheet shows several. Both can be drawn for a light and for a dark page.

Colours are Okabe and Ito's, which stay apart for the colour-blind; each series also has its own marker and line.
"""

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Theme = Literal["light", "dark"]

WIDTH = 3.6  # inches: as wide as a phone's screen, so that nothing is scaled down
_COLUMNS = 3
_CAPTION = 42  # characters of a line of a caption at `WIDTH`, whose axes are narrower


@dataclass(frozen=True)
class Style:
    """Colours of one theme.

    Args:
        ink: Text and axes.
        quiet: Grid and lines of reference.
        series: One colour per series.
        page: Behind the picture; pages leave it out and show their own.
    """

    ink: str
    quiet: str
    series: tuple[str, ...]
    page: str

    def mark(self, number: int) -> dict[str, Any]:
        """Returns the look of a series as options of `Axes.plot`; looks repeat when they run out."""
        return {
            "color": self.series[number % len(self.series)],
            "marker": _MARKERS[number % len(_MARKERS)],
            "linestyle": _LINES[number % len(_LINES)],
        }


_MARKERS = "osD^vP"
_LINES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)), (0, (3, 3)), (0, (8, 2)))
STYLES: dict[Theme, Style] = {
    "light": Style("#14161a", "#5d626b", ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9"), "#ffffff"),
    "dark": Style("#f0f1f3", "#a3a9b3", ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00"), "#1b1e24"),
}


@dataclass(frozen=True)
class Panel:
    """One small picture of a record.

    Args:
        title: What it shows, in a few words.
        alt: What it says, for those who do not see it.
        draw: Puts it on axes.
        height: Inches at `WIDTH`, without the legend.
        finding: What its numbers say, in a sentence: the caption. It also says so where they say nothing.
    """

    title: str
    alt: str
    draw: Callable[[Axes, Style], None]
    height: float = 2.3
    finding: str = ""


def panel_figure(panel: Panel, theme: Theme) -> Figure:
    """Draws one panel without a background; its title is left to the page."""
    return _figure([panel], theme, titles=False)


def sheet_figure(panels: Sequence[Panel], theme: Theme) -> Figure:
    """Draws panels beside each other on the theme's background, with titles and one legend.

    Raises:
        ValueError: If there is no panel.
    """
    if not panels:
        raise ValueError("nothing to draw: the record has no numbers for any panel")
    figure = _figure(panels, theme, titles=True)
    figure.set_facecolor(STYLES[theme].page)
    return figure


def as_svg(figure: Figure) -> bytes:
    """Writes a figure as SVG that needs no fonts and is the same each time."""
    file = io.BytesIO()
    with matplotlib.rc_context(_settings(STYLES["light"])):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return file.getvalue()


def _figure(panels: Sequence[Panel], theme: Theme, *, titles: bool) -> Figure:
    style, rows = STYLES[theme], -(-len(panels) // _COLUMNS)
    columns = -(-len(panels) // rows)  # four are two and two, not three and one
    with matplotlib.rc_context(_settings(style)):
        heights = [max(p.height for p in panels[row * columns : (row + 1) * columns]) for row in range(rows)]
        captions = [textwrap.fill(panel.finding or panel.title, _CAPTION) for panel in panels]
        title_lines = max(caption.count("\n") + 1 for caption in captions) if titles else 0
        figure = Figure(figsize=(WIDTH * columns, 1), layout="constrained")
        grid = figure.add_gridspec(rows, columns, height_ratios=heights)
        shown: dict[str, Any] = {}
        for number, panel in enumerate(panels):
            axes = figure.add_subplot(grid[number // columns, number % columns])
            panel.draw(axes, style)
            if titles:
                axes.set_title(captions[number], loc="right")  # there is room on the left, above the labels
            handles, labels = axes.get_legend_handles_labels()
            shown = dict(zip(labels, handles, strict=True)) | shown  # the first panel's handle says most
        lines = _add_legend(figure, shown, columns)
        figure.set_size_inches(WIDTH * columns, sum(heights) + 0.2 * lines + (0.1 + 0.2 * title_lines) * rows * titles)
    return figure


def _add_legend(figure: Figure, shown: Mapping[str, Any], columns: int) -> int:
    """Puts one legend below everything and returns how many lines it has."""
    if not shown:
        return 0
    widest = max(map(len, shown))
    abreast = max(1, min(len(shown), round(columns * 44 / (widest + 8))))
    handles, labels = list(shown.values()), [_shortened(label) for label in shown]
    figure.legend(handles, labels, loc="outside lower center", ncols=abreast, columnspacing=1.4, handlelength=2.6)
    return -(-len(shown) // abreast)


def _shortened(label: str, limit: int = 44) -> str:
    """Leaves out the middle: names of runs often differ at their end."""
    tail = limit // 2
    return label if len(label) <= limit else f"{label[: limit - tail - 1]}…{label[-tail:]}"


def _settings(style: Style) -> dict[str, Any]:
    return {
        "font.family": "DejaVu Sans",  # comes with matplotlib
        "font.size": 8.5,
        "axes.titlesize": 9.5,
        "axes.labelsize": 8.5,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "legend.fontsize": 8.5,
        "legend.frameon": False,
        "text.parse_math": False,  # a dollar in a name is a dollar
        "text.color": style.ink,
        "axes.labelcolor": style.ink,
        "xtick.color": style.ink,
        "ytick.color": style.ink,
        "axes.edgecolor": style.quiet,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "savefig.facecolor": "auto",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.8,
        "grid.color": style.quiet,
        "grid.alpha": 0.22,
        "grid.linewidth": 0.7,
        "lines.linewidth": 1.5,
        "lines.markersize": 5,
        "svg.fonttype": "path",
        "svg.hashsalt": "qstar_jax",
    }
