"""Landscapes to turn and to point at: plotly figures, and pages that need nothing but themselves."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Any

from ..extras import needed
from ..files import replacing
from .figures import COLORS, PATH_COLOR, is_logarithmic, levels_of, name_of, names_of
from .result import Landscape

LIFT = 0.02  # of the path above the surface, as a share of its height: else it is half hidden in it
FONT = 14  # pixels
# The height of the window decides how large the surface is: on a phone, its sides would be cut off.
FARTHER = 'if (innerWidth < 600) Plotly.relayout("{plot_id}", {"scene.camera.eye": {x: 2.8, y: -3.0, z: 1.8}})'
LINE = 36  # letters that a phone has room for


def plotly_figure(landscape: Landscape, *, log: bool | None = None) -> Any:
    """A plotly ``Figure``: curves of a line or an interpolation; else a surface, with buttons that turn it into contours.

    Hovering shows place, loss and accuracy. The path is drawn on the surface.

    Args:
        landscape: computed, or a part of it: what is missing are gaps.
        log: a logarithmic scale for losses. None: when they are positive and the largest is more than 30 times the smallest.

    Raises:
        ValueError: it has not been computed.
        ModuleNotFoundError: plotly is not installed.

    >>> import numpy as np
    >>> a = np.linspace(-1, 1, 5)
    >>> around = samkern.landscape.Landscape("surface", "SAM", a, a, loss=1 + np.add.outer(a**2, 2 * a**2))
    >>> [trace.type for trace in samkern.landscape.plotly_figure(around).data]
    ['surface', 'contour', 'scatter']
    """
    if not isinstance(landscape, Landscape) or landscape.loss is None:
        raise ValueError("landscape must be one that has been computed")
    objects = needed("plotly.graph_objects", "interactive landscapes")
    chart = objects.Figure()
    logarithmic = is_logarithmic(landscape.loss, log)
    if landscape.b is None:
        _curves(chart, objects, landscape, logarithmic)
    else:
        _surface(chart, objects, landscape, logarithmic)
    lines = _lines(name_of(landscape))
    chart.update_layout(
        template="plotly_white",
        title={
            "text": "<br>".join(lines),
            "x": 0.5,
            "y": 1,
            "yanchor": "top",
            "pad": {"t": 12},
            "font": {"size": FONT + 1},
        },
        font={"size": FONT},
        margin={"l": 60, "r": 30, "t": 62 + 20 * len(lines), "b": 60},
        hovermode="closest",
    )
    return chart


def write_page(landscape: Landscape, path: str | os.PathLike[str]) -> Path:
    """The figure as a page of its own, plotly.js in it: works offline."""
    path = Path(path)
    page: str = plotly_figure(landscape).to_html(
        full_html=True,
        include_plotlyjs=True,
        config={"responsive": True, "displaylogo": False},
        default_height="100vh",
        post_script=None if landscape.b is None else FARTHER,
    )
    head = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    page = page.replace("<head>", f"<head>{head}<title>{_escaped(name_of(landscape))}</title>", 1)
    with replacing(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    return path


def _colors() -> list[str]:
    """Those of print: the highest loss is darkest."""
    colors: list[str] = needed("plotly.colors", "interactive landscapes").sequential.YlGnBu[:7]
    return colors


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _lines(text: str) -> list[str]:
    """Short enough for a phone."""
    return [_escaped(line) for line in textwrap.wrap(text, LINE)]


def _curves(chart: Any, objects: Any, x: Landscape, logarithmic: bool) -> None:
    chart.add_trace(
        objects.Scatter(
            x=x.a,
            y=x.loss,
            name="loss",
            mode="lines+markers",
            line={"color": COLORS[0]},
            hovertemplate="%{x:.3g}<br>loss %{y:.4g}<extra></extra>",
        )
    )
    chart.update_layout(
        xaxis={"title": {"text": x.labels[0]}},
        yaxis={"title": {"text": "loss"}, "type": "log" if logarithmic else "linear"},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    )
    if x.accuracy is not None:
        chart.add_trace(
            objects.Scatter(
                x=x.a,
                y=x.accuracy,
                name="accuracy",
                yaxis="y2",
                mode="lines+markers",
                line={"color": COLORS[1], "dash": "dash"},
                hovertemplate="%{x:.3g}<br>accuracy %{y:.2f} %<extra></extra>",
            )
        )
        chart.update_layout(
            yaxis2={
                "title": {"text": "accuracy (%)"},
                "overlaying": "y",
                "side": "right",
                "showgrid": False,
                "tickmode": "auto",
            }
        )


def _surface(chart: Any, objects: Any, x: Landscape, logarithmic: bool) -> None:
    np = needed("numpy", "landscapes")
    assert x.loss is not None
    loss = np.where(np.isfinite(x.loss), x.loss, np.nan).T
    shade = np.log10(loss) if logarithmic else loss
    levels = levels_of(x.loss, logarithmic)[0]
    places = [float(np.log10(v)) if logarithmic else v for v in levels]
    accuracy = None if x.accuracy is None else x.accuracy.T
    words = np.array(_words(x, loss, accuracy))
    bar = {"title": {"text": "loss"}, "tickvals": places, "ticktext": names_of(levels), "thickness": 14}
    common: dict[str, Any] = {"x": x.a, "y": x.b, "text": words, "hoverinfo": "text", "colorscale": _colors()}
    step = places[1] - places[0] if len(places) > 1 else 1.0
    between = {"start": places[0], "end": places[-1], "size": step} if places else {}
    rings = {"show": bool(places), "usecolormap": True, "project": {"z": True}, **between}
    chart.add_trace(
        objects.Surface(
            **common, z=loss, surfacecolor=shade, colorbar=bar, contours={"z": rings} if not logarithmic else None
        )
    )
    chart.add_trace(
        objects.Contour(
            **common,
            z=shade,
            colorbar=bar,
            visible=False,
            contours=between,
            line={"color": "#333", "width": 0.7},
        )
    )
    in_space = [True, False]
    flat_path = x.path if x.path is not None else np.zeros((1, 2))
    style: dict[str, Any] = {
        "mode": "lines+markers" if x.kind == "trajectory" else "markers",
        "line": {"color": PATH_COLOR, "width": 4},
        "name": "weights" if x.path is None else "checkpoints",
        "hovertemplate": "%{text}<extra></extra>",
        "showlegend": False,
    }
    if x.path is not None and x.path_loss is not None:
        style["text"] = _path_words(x)
        marker = {"color": PATH_COLOR, "size": 4, "line": {"color": "black", "width": 1}}
        chart.add_trace(
            objects.Scatter3d(
                x=x.path[:, 0], y=x.path[:, 1], z=_lifted(x.path_loss, loss, logarithmic), marker=marker, **style
            )
        )
        in_space.append(True)
    else:
        style["text"] = ["weights"] * len(flat_path)
    marker = {"color": PATH_COLOR, "size": 9, "line": {"color": "black", "width": 1}}
    chart.add_trace(objects.Scatter(x=flat_path[:, 0], y=flat_path[:, 1], visible=False, marker=marker, **style))
    in_space.append(False)
    axis: dict[str, Any] = {"type": "log" if logarithmic else "linear", "title": {"text": "loss"}}
    if logarithmic:
        axis |= {"tickvals": levels, "ticktext": names_of(levels)}
    chart.update_layout(
        scene={
            "xaxis": {"title": {"text": "a"}},
            "yaxis": {"title": {"text": "b"}},
            "zaxis": axis,
            "aspectmode": "cube",
            "camera": {"eye": {"x": 1.4, "y": -1.5, "z": 0.9}},
        },
        xaxis={"title": {"text": "<br>".join(_lines(f"a: {x.labels[0]}"))}, "visible": False, "automargin": True},
        yaxis={"title": {"text": "<br>".join(_lines(f"b: {x.labels[1]}"))}, "visible": False, "automargin": True},
        updatemenus=[
            {
                "type": "buttons",
                "direction": "right",
                "x": 0,
                "xanchor": "left",
                "y": 1.0,
                "yanchor": "bottom",
                "buttons": [
                    _button("surface", in_space, flat=False),
                    _button("contours", [not shown for shown in in_space], flat=True),
                ],
            }
        ],
    )


def _button(label: str, visible: list[bool], flat: bool) -> dict[str, Any]:
    # The axes of the contours would be drawn behind the surface, the box of the surface behind the contours.
    # An empty scene on top would take the mouse from them.
    layout: dict[str, Any] = {
        "scene.domain.x": [0, 0.01] if flat else [0, 1],
        "scene.domain.y": [0, 0.01] if flat else [0, 1],
    }
    layout |= {"xaxis.visible": flat, "yaxis.visible": flat, "scene.xaxis.visible": not flat}
    layout |= {"scene.yaxis.visible": not flat, "scene.zaxis.visible": not flat}
    return {"label": label, "method": "update", "args": [{"visible": visible}, layout]}


def _lifted(path_loss: Any, loss: Any, logarithmic: bool) -> Any:
    np = needed("numpy", "landscapes")
    low, high = np.nanmin(loss), np.nanmax(loss)
    return path_loss * (high / low) ** LIFT if logarithmic else path_loss + LIFT * (high - low)


def _words(x: Landscape, loss: Any, accuracy: Any) -> list[list[str]]:
    assert x.b is not None

    def at(i: int, j: int) -> str:
        more = "" if accuracy is None else f"<br>accuracy {accuracy[j, i]:.2f} %"
        return f"a {x.a[i]:.3g}, b {x.b[j]:.3g}<br>loss {loss[j, i]:.4g}{more}"  # type: ignore[index]

    return [[at(i, j) for i in range(loss.shape[1])] for j in range(loss.shape[0])]


def _path_words(x: Landscape) -> list[str]:
    assert x.path is not None
    assert x.path_loss is not None
    names = list("ABC") if x.kind == "plane" else [f"checkpoint {t + 1} of {len(x.path)}" for t in range(len(x.path))]
    accuracy = ["" for _ in names] if x.path_accuracy is None else [f"<br>accuracy {v:.2f} %" for v in x.path_accuracy]
    return [f"{name}<br>loss {v:.4g}{more}" for name, v, more in zip(names, x.path_loss, accuracy, strict=True)]
