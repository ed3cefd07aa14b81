"""Landscapes as matplotlib figures, made for print: labelled levels, colours that grey keeps in order, no global state."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..extras import needed
from .result import Landscape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .result import Array

# Okabe and Ito's colours, which the colour-blind tell apart, those that are dark enough for lines on white first.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS = "osD^vPX"  # grey print keeps these
FONT = 9  # points
PATH_COLOR = "#D55E00"
COLORMAP = "YlGnBu"  # lightness falls all the way
LOG_FROM = 30.0  # ratio of the largest to the smallest loss from which scales are logarithmic
STEPS = ((1.0, 1.5, 2.0, 3.0, 5.0, 7.0), (1.0, 2.0, 5.0), (1.0, 3.0), (1.0,))  # within a decade
MOST_LEVELS = 12


def figure(
    landscapes: Landscape | Sequence[Landscape],
    *,
    view: str | None = None,
    log: bool | None = None,
    size: tuple[float, float] | None = None,
) -> Figure:
    """A matplotlib figure of a landscape, or one of several lines or interpolations to compare.

    Save it with ``savefig("name.pdf")`` or any other name that matplotlib knows.

    Args:
        landscapes: one, or several with one axis, whose titles are in the legend. Points that are not computed yet are gaps.
        view: of two axes, ``"contour"``, which is what None means, or ``"surface"``, in three dimensions. Of one, None.
        log: a logarithmic scale for losses. None: when they are positive and the largest is more than 30 times the smallest.
        size: width and height in inches; letters have 8 points or more at this size.

    Raises:
        ValueError: nothing is given, an unknown view, or several landscapes of which one has two axes.
        ModuleNotFoundError: matplotlib is not installed.

    >>> import numpy as np
    >>> a = np.linspace(-1, 1, 5)
    >>> around = samkern.landscape.Landscape("surface", "SAM", a, a, loss=1 + np.add.outer(a**2, 2 * a**2))
    >>> samkern.landscape.figure(around, view="surface").savefig("surface.pdf")
    """
    several = [landscapes] if isinstance(landscapes, Landscape) else list(landscapes)
    if not several or not all(isinstance(x, Landscape) and x.loss is not None for x in several):
        raise ValueError("landscapes must be one or more landscapes that have been computed")
    flat = all(x.b is None for x in several)
    if not flat and len(several) > 1:
        raise ValueError("only lines and interpolations can be compared in one figure: draw surfaces one by one")
    if view not in ((None,) if flat else (None, "contour", "surface")):
        expected = "None for a line" if flat else "'contour', 'surface' or None"
        raise ValueError(f"view must be {expected}, got {view!r}")
    agg = needed("matplotlib.backends.backend_agg", "figures")
    default = (5.2, 3.6) if flat else (5.2, 4.6)
    chart: Figure = needed("matplotlib.figure", "figures").Figure(figsize=size or default, layout="constrained")
    agg.FigureCanvasAgg(chart)
    if flat:
        _curves(chart, several, log)
    elif view == "surface":
        _surface(chart, several[0], log)
    else:
        _contours(chart, several[0], log)
    return chart


def levels_of(loss: Array, log: bool | None = None) -> tuple[list[float], bool]:
    """Round numbers to draw contours at, about twelve at most, within the finite losses; and whether they are logarithmic.

    >>> import numpy as np
    >>> samkern.landscape.figures.levels_of(np.array([0.01, 3.0, 200.0]))
    ([0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0], True)
    """
    np = needed("numpy", "landscapes")
    finite = loss[np.isfinite(loss)]
    if not finite.size:
        return [], False
    low, high = float(finite.min()), float(finite.max())
    logarithmic = is_logarithmic(loss, log)
    if low == high:
        return [low], logarithmic
    if not logarithmic:
        ticks = needed("matplotlib.ticker", "figures").MaxNLocator(nbins=MOST_LEVELS - 2).tick_values(low, high)
        return [float(x) for x in ticks if low <= x <= high], False
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in STEPS:
        levels = [x for decade in decades for step in steps if low <= (x := float(f"{step}e{decade}")) <= high]
        if len(levels) <= MOST_LEVELS:
            break
    return levels[:: math.ceil(len(levels) / MOST_LEVELS)] if levels else [low, high], True


def is_logarithmic(loss: Array, log: bool | None) -> bool:
    """Whether a scale of these losses is logarithmic."""
    np = needed("numpy", "landscapes")
    finite = loss[np.isfinite(loss)]
    if not finite.size or finite.min() <= 0:
        return False
    return bool(finite.max() > LOG_FROM * finite.min()) if log is None else log


def short(value: float) -> str:
    """A level's label.

    >>> [samkern.landscape.figures.short(x) for x in (0.5, 20.0, 1e6, 1e-5)]
    ['0.5', '20', '1e6', '1e-5']
    """
    text = f"{value:.4g}"
    return text.replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")


def name_of(landscape: Landscape) -> str:
    """Its title, or else what it is."""
    return landscape.title or landscape.kind


def _curves(chart: Figure, several: Sequence[Landscape], log: bool | None) -> None:
    """Losses to the left with full lines, accuracies to the right with dashed ones."""
    np = needed("numpy", "landscapes")
    axes = chart.subplots()
    losses = np.concatenate([x.loss for x in several])
    if is_logarithmic(losses, log):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_plain_numbers)
        if len(levels_of(losses, True)[0]) <= MOST_LEVELS:
            axes.yaxis.set_major_locator(
                needed("matplotlib.ticker", "figures").FixedLocator(levels_of(losses, True)[0])
            )
            axes.yaxis.set_minor_locator(needed("matplotlib.ticker", "figures").NullLocator())
    with_accuracy = any(x.accuracy is not None for x in several)
    right = axes.twinx() if with_accuracy else None
    handles = []
    for i, x in enumerate(several):
        look: dict[str, Any] = {
            "color": COLORS[i % len(COLORS)],
            "marker": MARKERS[i % len(MARKERS)],
            "ms": 4,
            "lw": 1.5,
        }
        assert x.loss is not None
        every = max(1, len(x.a) // 20)
        label = name_of(x) if len(several) > 1 or x.title else "loss"
        handles += axes.plot(x.a, x.loss, label=label, markevery=every, **look)
        if right is not None and x.accuracy is not None:
            right.plot(
                x.a,
                x.accuracy,
                ls="--",
                mfc="white",
                markevery=every,
                **{**look, "lw": 1.2},
                label=f"{label}, accuracy",
            )
    axes.set_xlabel(several[0].labels[0], fontsize=FONT)
    axes.set_ylabel("loss (full lines)" if with_accuracy else "loss", fontsize=FONT)
    axes.grid(color="0.9", lw=0.6)
    axes.margins(x=0.02)
    axes.set_axisbelow(True)
    if right is not None:
        right.set_ylabel("accuracy in % (dashed)", fontsize=FONT)
        right.tick_params(labelsize=FONT - 1)
        right.margins(y=0.08)
    axes.tick_params(labelsize=FONT - 1)
    if len(several) > 1:
        chart.legend(
            handles=handles, loc="outside upper center", ncols=min(len(several), 3), frameon=False, fontsize=FONT
        )
    elif several[0].title:
        axes.set_title(several[0].title, fontsize=FONT + 1)


def _plain_numbers(value: float, _: float | None = None) -> str:
    return short(value)


def _contours(chart: Figure, x: Landscape, log: bool | None) -> None:
    """Bands of colour, lines with their losses, the path."""
    np = needed("numpy", "landscapes")
    axes = chart.subplots()
    assert x.loss is not None
    assert x.b is not None
    masked = np.ma.masked_invalid(x.loss.T)
    levels, logarithmic = levels_of(x.loss, log)
    if masked.count() and masked.min() < masked.max() and min(masked.shape) > 1:
        # Between the points, contours are found on straight lines: of logarithms, where it is these that are shown.
        height = np.ma.log10(masked) if logarithmic else masked
        low, high = float(height.min()), float(height.max())
        places = [math.log10(v) if logarithmic else v for v in levels]
        norm = needed("matplotlib.colors", "figures").Normalize(low, high)
        axes.contourf(x.a, x.b, height, levels=sorted({low, *places, high}), cmap=_light_colors(), norm=norm)
        lines = axes.contour(x.a, x.b, height, levels=places, colors="0.2", linewidths=0.8, linestyles="solid")
        names = dict(zip(lines.levels, map(short, levels), strict=True))
        texts = axes.clabel(lines, fmt=names, fontsize=FONT - 1, inline=True, inline_spacing=3)
        _halo(texts)
    else:
        axes.text(0.5, 0.5, "nothing to draw yet", transform=axes.transAxes, ha="center", fontsize=FONT)
        axes.set(xlim=(x.a[0], x.a[-1]), ylim=(x.b[0], x.b[-1]))
    if x.path is None:
        axes.plot(0, 0, "+", color="black", ms=8, mew=1.4, label="weights")
    else:
        _draw_path(axes, x)
    _name_axes(axes, x)
    height, width = np.ptp(x.b), np.ptp(x.a)
    if 0.45 < height / width < 2.2:
        axes.set_aspect("equal")
    axes.set_title(_what(x, logarithmic), fontsize=FONT + 1)


def _what(x: Landscape, logarithmic: bool) -> str:
    of = "loss, logarithmic" if logarithmic else "loss"
    return f"{x.title}: {of}" if x.title else of.capitalize()


def _name_axes(axes: Any, x: Landscape) -> None:
    axes.set_xlabel(x.labels[0], fontsize=FONT)
    axes.set_ylabel(x.labels[1], fontsize=FONT)
    axes.tick_params(labelsize=FONT - 1)


def _halo(texts: Sequence[Any]) -> None:
    effects = needed("matplotlib.patheffects", "figures")
    for text in texts:
        text.set_path_effects([effects.withStroke(linewidth=2, foreground="white")])


def _draw_path(axes: Axes, x: Landscape) -> None:
    assert x.path is not None
    a, b = x.path.T
    if x.kind == "plane":
        axes.plot(a, b, "o", color=PATH_COLOR, mec="black", ms=6, label="checkpoints", clip_on=False, zorder=3)
        names = "ABC"
        texts = [
            axes.annotate(name, place, (6, 5), textcoords="offset points", fontsize=FONT + 1, weight="bold")
            for name, place in zip(names, x.path, strict=True)
        ]
        _halo(texts)
        return
    axes.plot(a, b, color="white", lw=3.4, zorder=2.5)
    axes.plot(a, b, "-o", color=PATH_COLOR, mec="black", mew=0.6, ms=4, lw=1.6, label="checkpoints", zorder=3)
    texts = [
        axes.annotate(word, place, (7, 6), textcoords="offset points", fontsize=FONT)
        for word, place in (("first", x.path[0]), ("last", x.path[-1]))
    ]
    _halo(texts)
    axes.plot(a[-1], b[-1], "*", color="black", ms=9, zorder=4)


def _surface(chart: Figure, x: Landscape, log: bool | None) -> None:
    """In three dimensions. Heights are logarithms where the scale is logarithmic: mplot3d has no such axis."""
    np = needed("numpy", "landscapes")
    needed("mpl_toolkits.mplot3d", "figures")
    axes: Any = chart.add_subplot(projection="3d")
    assert x.loss is not None
    assert x.b is not None
    logarithmic = is_logarithmic(x.loss, log)
    finite = np.where(np.isfinite(x.loss), x.loss, np.nan).T
    height = np.log10(finite) if logarithmic else finite
    a, b = np.meshgrid(x.a, x.b)
    norm = needed("matplotlib.colors", "figures").Normalize(np.nanmin(height), np.nanmax(height))
    axes.plot_surface(
        a,
        b,
        height,
        cmap=_light_colors(),
        norm=norm,
        rstride=1,
        cstride=1,
        edgecolor="0.35",
        linewidth=0.25,
        antialiased=True,
    )
    if x.path is not None and x.path_loss is not None:
        places = np.log10(x.path_loss) if logarithmic else x.path_loss
        style = "o" if x.kind == "plane" else "-o"
        axes.plot(
            *x.path.T,
            places,
            style,
            color=PATH_COLOR,
            mec="black",
            mew=0.6,
            ms=4,
            lw=1.8,
            zorder=10,
            label="checkpoints",
        )
    levels = levels_of(x.loss, log)[0]
    while len(levels) > 7:
        levels = levels[::2]
    axes.set_zticks([math.log10(v) if logarithmic else v for v in levels], [short(v) for v in levels])
    _name_axes(axes, x)
    axes.set_xlabel(textwrap.fill(x.labels[0], 32), fontsize=FONT, labelpad=10)
    axes.set_ylabel(textwrap.fill(x.labels[1], 32), fontsize=FONT, labelpad=10)
    axes.locator_params(axis="x", nbins=5)
    axes.locator_params(axis="y", nbins=5)
    axes.set_zlabel("loss", fontsize=FONT)
    axes.set_title(_what(x, logarithmic), fontsize=FONT + 1)
    axes.view_init(elev=32, azim=-58)
    axes.set_box_aspect(None, zoom=0.82)  # or labels are cut off


def _light_colors() -> Any:
    """Dark lines and letters stay readable on them."""
    np = needed("numpy", "landscapes")
    colors = needed("matplotlib", "figures").colormaps[COLORMAP]
    return needed("matplotlib.colors", "figures").ListedColormap(colors(np.linspace(0.0, 0.72, 256)), "landscape")
