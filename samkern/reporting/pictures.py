"""Landscapes on the page: small pictures, and what the interactive figures show."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..extras import needed
from ..landscape import Landscape
from .charts import LOG_FROM, digits

SIZE = (3.2, 2.4)  # inches
DOTS = 100  # per inch
N_LEVELS = 14
BLUE, ORANGE = "#3b7dd8", "#e07b1a"  # seen on white and on black


@dataclass(frozen=True)
class Scale:
    """The losses that colours stand for, and whether in proportion to their logarithm. All planes of a page have one."""

    low: float
    high: float
    logarithmic: bool

    def of(self, loss: Any) -> Any:
        """Losses as they are coloured; those above the scale as its end."""
        np = needed("numpy", "reports")
        bounded = np.clip(loss, self.low, self.high)
        return np.log10(bounded) if self.logarithmic else bounded


def common_scale(landscapes: Sequence[Landscape]) -> Scale:
    """From the lowest loss to the highest, without the highest twentieth, which is walls."""
    np = needed("numpy", "reports")
    losses = [one.loss[np.isfinite(one.loss)] for one in landscapes if one.loss is not None and one.loss.ndim == 2]
    there = np.concatenate([*losses, np.zeros(0)])
    if not there.size:
        return Scale(0.0, 1.0, False)
    low, high = float(there.min()), float(max(np.quantile(one, 0.95) for one in losses if one.size))
    high = high if high > low else low + 1.0
    return Scale(low, high, low > 0 and high / low > LOG_FROM)


def thumbnail(landscape: Landscape, scale: Scale) -> str:
    """A PNG as a data URI. Without labels: what is written beside it can be read."""
    needed("matplotlib", "reports")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    np = needed("numpy", "reports")
    chart = Figure(figsize=SIZE, dpi=DOTS)
    FigureCanvasAgg(chart)
    axes = chart.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    loss, path = landscape.loss, landscape.path
    if loss is not None and loss.ndim == 2 and landscape.b is not None:
        ends = np.array([scale.low, scale.high])
        levels = np.linspace(*scale.of(ends), N_LEVELS)
        shown = np.ma.masked_invalid(scale.of(loss).T)
        axes.contourf(landscape.a, landscape.b, shown, levels, cmap="viridis", extend="both")
        axes.contour(landscape.a, landscape.b, shown, levels, colors="white", linewidths=0.5, alpha=0.6)
    elif loss is not None:
        axes.plot(landscape.a, loss, color=BLUE, lw=2.5)
        axes.margins(0.05, 0.1)
    if path is not None and len(path):
        axes.plot(*np.asarray(path).T, color=ORANGE, lw=1.5, marker="o", ms=3)
    buffer = io.BytesIO()
    chart.savefig(buffer, format="png", transparent=True, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def views(landscape: Landscape, scale: Scale) -> dict[str, Any]:
    """Figures of plotly by name, without colours of text, grid and ground, which are those of the page."""
    if landscape.loss is None:
        return {"path": _path_alone(landscape)}
    if landscape.loss.ndim == 2 and landscape.b is not None:
        return {"surface": _surface(landscape, scale), "contour": _contour(landscape, scale)}
    return {"line": _line(landscape)}


def _surface(landscape: Landscape, scale: Scale) -> dict[str, Any]:
    # Walls above the scale would be all that there is to see.
    np = needed("numpy", "reports")
    height = np.where(np.isfinite(landscape.loss), np.minimum(landscape.loss, scale.high), np.nan)
    surface = {
        "type": "surface",
        "x": numbers(landscape.a),
        "y": numbers(landscape.b),
        "z": numbers(height.T),
        "surfacecolor": numbers(scale.of(landscape.loss).T),
        "customdata": numbers(landscape.loss.T),  # type: ignore[union-attr]
        "hovertemplate": "%{x:.3g}, %{y:.3g}: loss %{customdata:.4g}<extra></extra>",
        "contours": {"z": {"show": True, "usecolormap": False, "color": "rgba(255,255,255,0.5)", "width": 1}},
        **_coloured(scale, "c"),
    }
    a, b = landscape.labels
    scene = {
        "xaxis": {"title": {"text": text(a)}},
        "yaxis": {"title": {"text": text(b)}},
        "zaxis": {
            "title": {"text": "loss"},
            "type": "log" if scale.logarithmic else "linear",
            **_ticks(scale, [10**at for at in _places(scale)] if scale.logarithmic else _places(scale)),
        },
        "aspectmode": "manual",
        "aspectratio": {"x": 1, "y": 1, "z": 0.7},
        "camera": {"eye": {"x": 1.25, "y": 1.25, "z": 0.9}},
    }
    return {"data": [surface], "layout": {"scene": scene}}


def _contour(landscape: Landscape, scale: Scale) -> dict[str, Any]:
    assert landscape.b is not None
    places = _places(scale)
    lowest, highest = places[0], places[-1]
    contour = {
        "type": "contour",
        "x": numbers(landscape.a),
        "y": numbers(landscape.b),
        "z": numbers(scale.of(landscape.loss).T),
        "customdata": numbers(landscape.loss.T),  # type: ignore[union-attr]
        "hovertemplate": "%{x:.3g}, %{y:.3g}: loss %{customdata:.4g}<extra></extra>",
        "contours": {
            "start": digits(lowest),
            "end": digits(highest),
            "size": digits((highest - lowest) / (N_LEVELS - 1)),
        },
        "line": {"width": 0.5, "color": "rgba(255,255,255,0.6)"},
        **_coloured(scale, "z"),
    }
    a, b = landscape.labels
    axes: dict[str, Any] = {"xaxis": {"title": {"text": text(a)}}, "yaxis": {"title": {"text": text(b)}}}
    wide, high = (float(abs(axis[-1] - axis[0])) for axis in (landscape.a, landscape.b))
    if max(wide, high) < 3 * min(wide, high):  # circles are circles, where that leaves enough to see
        axes["xaxis"]["constrain"] = axes["yaxis"]["constrain"] = "domain"
        axes["yaxis"]["scaleanchor"] = "x"
    return {"data": [contour, *_path(landscape)], "layout": axes}


def _coloured(scale: Scale, axis: str) -> dict[str, Any]:
    places = _places(scale)
    bar = {"title": {"text": "loss"}, "thickness": 12, **_ticks(scale, places)}
    return {f"{axis}min": digits(places[0]), f"{axis}max": digits(places[-1]), "colorscale": "Viridis", "colorbar": bar}


def _places(scale: Scale) -> list[float]:
    """Of the marks on a scale, as they are coloured."""
    low, high = (float(end) for end in scale.of([scale.low, scale.high]))
    return [low + (high - low) * i / 5 for i in range(6)]


def _ticks(scale: Scale, places: Sequence[float]) -> dict[str, Any]:
    np = needed("numpy", "reports")
    shown = [10**at if scale.logarithmic else at for at in _places(scale)]
    names = [np.format_float_positional(at, 2, fractional=False, trim="-") for at in shown]
    return {"tickvals": [digits(at) for at in places], "ticktext": names}


def _line(landscape: Landscape) -> dict[str, Any]:
    at = numbers(landscape.a)
    loss = {
        "x": at,
        "y": numbers(landscape.loss),
        "name": "loss",
        "mode": "lines",
        "line": {"color": BLUE, "width": 2.5},
    }
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": text(landscape.labels[0])}},
        "yaxis": {"title": {"text": "loss"}},
    }
    if landscape.accuracy is None:
        return {"data": [loss], "layout": layout}
    line = {"color": ORANGE, "width": 2, "dash": "dash"}
    right = {
        "x": at,
        "y": numbers(landscape.accuracy),
        "name": "accuracy",
        "mode": "lines",
        "yaxis": "y2",
        "line": line,
    }
    layout["yaxis2"] = {
        "title": {"text": "accuracy (%)"},
        "overlaying": "y",
        "side": "right",
        "showgrid": False,
        "tickmode": "auto",
    }
    return {"data": [loss, right], "layout": layout}


def _path_alone(landscape: Landscape) -> dict[str, Any]:
    a, b = landscape.labels
    axes = {"xaxis": {"title": {"text": text(a)}}, "yaxis": {"title": {"text": text(b)}}}
    return {"data": _path(landscape), "layout": axes}


def _path(landscape: Landscape) -> list[dict[str, Any]]:
    if landscape.path is None:
        return []
    x, y = numbers(landscape.path[:, 0]), numbers(landscape.path[:, 1])
    look = {"line": {"color": ORANGE, "width": 2}, "marker": {"color": ORANGE, "size": 5}}
    return [{"type": "scatter", "x": x, "y": y, "mode": "lines+markers", "name": "path", "hoverinfo": "x+y", **look}]


def numbers(array: Any) -> list[Any]:
    """Nested lists of six digits, with ``None`` for what is not finite."""
    return [numbers(row) if getattr(row, "ndim", 0) else digits(float(row)) for row in array]


def text(name: str) -> str:
    """``name`` for plotly, which takes tags in texts for its own."""
    return html.escape(name, quote=False)
