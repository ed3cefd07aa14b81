"""One HTML page that compares runs, with all that it needs in itself."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..extras import needed
from . import charts, comparison
from .comparison import Group
from .pictures import common_scale, thumbnail, views
from .reading import Folders, Run, read_runs
from .runs import write_text

HERE = Path(__file__).parent
KINDS = {
    "interpolation": "between two points",
    "line": "along a line",
    "surface": "on a plane",
    "plane": "on the plane of three points",
    "trajectory": "along the training",
}


def report(folders: Folders, out: str | os.PathLike[str] | None = None, title: str | None = None) -> Path:
    """Writes one HTML page that compares all runs in these folders, and returns its path.

    On the page are a table of the methods with means and standard deviations over seeds, accuracy against what it cost, the
    curves of epochs and steps, measures of flatness, landscapes to turn around, and where the runs were made. What no run
    has is left out. The page needs no network: 5 MB of it are plotly.js. The same runs give the same page.

    Args:
        folders: one or many: run folders (``samkern.RunFolder``), or folders with such below. A folder with the CSV file of
            a ``samkern.history.History`` is a run too.
        out: path of the page, by default ``report.html`` in the first folder.
        title: its heading.

    Raises:
        NoRunsError: there is no run.
        UnreadableRunError: a file of a run cannot be read; says which.
        ModuleNotFoundError: jinja2, plotly or, for landscapes, matplotlib is not installed.

    >>> for seed in range(2):
    ...     run = samkern.RunFolder(f"runs/sam-seed{seed}", method="SAM", seed=seed)
    ...     for epoch in range(1, 4):
    ...         run.epoch(epoch, pairs=20 * epoch, test_accuracy=80.0 + 5 * epoch + seed)
    >>> samkern.report("runs", title="A first look").name
    'report.html'
    """
    asked = [folders] if isinstance(folders, (str, os.PathLike)) else list(folders)
    text = page(read_runs(asked), title)
    return write_text(Path(out) if out is not None else Path(asked[0]) / "report.html", text)


def page(runs: Sequence[Run], title: str | None = None) -> str:
    """The page's text."""
    jinja2, plotly = needed("jinja2", "reports"), needed("plotly.offline", "reports")
    markup = needed("markupsafe", "reports").Markup  # jinja2 escapes all other texts
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    groups = comparison.group(runs)
    landscapes = landscape_cards(groups)
    drawn = {
        "methods": [one.label for one in groups],
        "cost": charts.against_cost(groups),
        "learning": charts.learning(groups),
        "steps": charts.stepwise(groups),
        "flatness": charts.flatness(groups),
        "landscapes": [card.pop("views") for card in landscapes],
    }
    shared, rows = facts(runs)
    return str(
        environment.get_template("page.html.j2").render(
            title=title or default_title(groups),
            summary=summary(groups),
            highlights=comparison.highlights(groups),
            methods=methods(groups),
            table=comparison.table(groups),
            seeds_differ=len({len(one.runs) for one in groups}) > 1,
            several_seeds=any(len(one.runs) > 1 for one in groups),
            charts=drawn,
            measures=measures(groups),
            landscapes=landscapes,
            shared=shared,
            runs=rows,
            css=markup((HERE / "page.css").read_text(encoding="utf-8")),
            script=markup((HERE / "page.js").read_text(encoding="utf-8")),
            plotly=markup(plotly.get_plotlyjs()),
            data=markup(in_script(drawn)),
        )
    )


def in_script(content: Any) -> str:
    """JSON that no text in it can end the script element of."""
    written = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return written.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def default_title(groups: Sequence[Group]) -> str:
    """By what is compared."""
    return f"{len(groups)} methods compared" if len(groups) > 1 else groups[0].label


def summary(groups: Sequence[Group]) -> str:
    """How many runs, of how many seeds, and when they began."""
    runs = [run for one in groups for run in one.runs]
    days = sorted({run.started[:10] for run in runs if run.started})
    seeds = {len(one.runs) for one in groups}
    parts = [f"{len(runs)} run{'s' if len(runs) > 1 else ''}"]
    if len(seeds) == 1 and max(seeds) > 1:
        parts.append(f"{max(seeds)} seeds of each method")
    if days:
        parts.append(days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}")
    return " · ".join(parts)


def methods(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """For the buttons that show and hide."""
    on_front = comparison.front(groups)
    return [{"m": m, "label": one.label, "front": m in on_front} for m, one in enumerate(groups)]


def measures(groups: Sequence[Group]) -> dict[str, Any]:
    """The table of measures: texts, what they are sorted by, and the lowest of each."""
    names = comparison.measure_names(groups)
    found = [[comparison.measured(one, name) for name in names] for one in groups]
    lowest = []
    for column in zip(*found, strict=True):
        values = [m.value for m in column if m is not None and comparison.is_number(m.value)]
        lowest.append(min(values) if len(values) > 1 else None)
    rows = []
    for place, (one, row) in enumerate(zip(groups, found, strict=True)):
        cells = [
            {
                "text": None if m is None else str(m).replace("+-", "±").removesuffix(" ± ?"),
                "sort": m.value if m is not None and comparison.is_number(m.value) else None,
                "best": m is not None and m.value == low,
            }
            for m, low in zip(row, lowest, strict=True)
        ]
        if any(m is not None for m in row):
            rows.append({"m": place, "label": one.label, "cells": cells})
    return {"names": names, "rows": rows}


def landscape_cards(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """A card for each landscape: what is written beside its picture, and the figures that it opens."""
    found = [(m, one, run, run.load_landscapes()) for m, one in enumerate(groups) for run in one.runs]
    scale = common_scale([landscape for *_, several in found for landscape in several])
    cards = []
    for m, one, run, several in found:
        for landscape in several:
            seed = "" if run.seed is None else f", seed {run.seed}"
            cards.append(
                {
                    "m": m,
                    "label": one.label,
                    "title": landscape.title or one.label,
                    "note": KINDS.get(landscape.kind, landscape.kind) + seed,
                    "picture": thumbnail(landscape, scale),
                    "views": views(landscape, scale),
                }
            )
    return cards


def facts(runs: Sequence[Run]) -> tuple[dict[str, str], dict[str, Any]]:
    """What is the same of all runs, and a table of the rest."""
    described = [
        {
            **{name: shown(value) for name, value in run.environment.items()},
            **{name: shown(value) for name, value in run.settings.items()},
            "started": run.started[:19].replace("T", " "),
            "skipped steps": str(comparison.skipped(run)) if run.steps else "",
        }
        for run in runs
    ]
    names = list(dict.fromkeys(name for facts in described for name in facts))
    alike = {
        name: described[0].get(name, "")
        for name in names
        if len({facts.get(name, "") for facts in described}) == 1 and described[0].get(name, "") not in ("", "none")
    }
    differ = [name for name in names if name not in alike and any(facts.get(name) for facts in described)]
    rows = [
        [run.name, run.method, "" if run.seed is None else str(run.seed), *(facts.get(name, "") for name in differ)]
        for run, facts in zip(runs, described, strict=True)
    ]
    return alike, {"names": ["run", "method", "seed", *differ], "rows": rows}


def shown(value: Any) -> str:
    """A setting as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False)
    return "none" if value is None else str(value)
