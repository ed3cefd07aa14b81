"""The page that compares runs: its numbers, what is left out, and what a real browser makes of it."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch

pytest.importorskip("jinja2")
pytest.importorskip("plotly")
pytest.importorskip("matplotlib")

import numpy as np

import samkern
from samkern.landscape import Landscape
from samkern.reporting import (
    NoRunsError,
    RunFolder,
    UnreadableRunError,
    charts,
    command,
    comparison,
    pictures,
    read_runs,
)
from samkern.sharpness import Measurement

from .problems import closure_for, make_net

HOSTILE = "<script>document.title='owned'</script>&<b>%{x}"
METHODS = ("SGD", "SAM (rho 0.2)", HOSTILE)
SEEDS = 2


def bowl(width, title):
    a = np.linspace(-1, 1, 9)
    return Landscape("surface", title, a, a, loss=0.05 + width * (a[:, None] ** 2 + 2 * a**2), labels=("<a>", "b"))


def write_runs(folder):
    """Three methods of two seeds: the second is the most accurate, the third the cheapest but for the first, and beaten."""
    for m, method in enumerate(METHODS):
        for seed in range(SEEDS):
            settings = {"lr": 0.1, "note": HOSTILE}
            run = RunFolder(folder / f"{m}-seed{seed}", method=method, seed=seed, settings=settings, commit="abc1234")
            for epoch in range(1, 13):
                accuracy = (70, 96, 60)[m] * (1 - math.exp(-epoch / 2)) + seed
                run.epoch(
                    epoch,
                    steps=10 * epoch,
                    pairs=(10, 20, 15)[m] * epoch,
                    seconds=(1.0, 2.0, 1.5)[m] * epoch,
                    train_loss=2 / epoch,
                    train_accuracy=50.0 + epoch,
                    test_loss=3 / epoch,
                    test_accuracy=accuracy,
                )
            run.measures(
                {"top eigenvalue": Measurement(100.0 / (1 + m) + seed, 3.0, (1.0, 2.0)), HOSTILE: 1.0 + m + seed}
            )
            if m:
                net = make_net()
                opt = samkern.LookSAM(net.parameters(), torch.optim.SGD, lr=0.1, k=2)
                with run.history(opt) as history:
                    for t in range(6):
                        opt.step(closure_for(net, t, opt.zero_grad))
                        history.record()
            if m and not seed:
                run.landscape(bowl(m, method))
                a = np.linspace(0, 1, 5)
                run.landscape(Landscape("line", f"{method} line", a, loss=a**2, accuracy=90 - a))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return write_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def path(runs):
    return samkern.report(runs, title="A comparison")


# ---- numbers


def test_means_spreads_best_and_front(runs):
    groups = comparison.group(read_runs(runs))
    assert [(one.label, len(one.runs)) for one in groups] == [(method, SEEDS) for method in METHODS]
    table = comparison.table(groups)
    assert [column["name"] for column in table["columns"]] == [column.name for column in comparison.COLUMNS]
    final = [level * (1 - math.exp(-6)) for level in (70, 96, 60)]
    for row, level in zip(table["rows"], final, strict=True):
        cells = {column["name"]: cell for column, cell in zip(table["columns"], row["cells"], strict=True)}
        assert cells["test %"]["sort"] == pytest.approx(level + 0.5)
        assert cells["test %"]["sd"] == f"{math.sqrt(0.5):.2f}"
        assert cells["gap"]["sort"] == pytest.approx(62 - level - 0.5)
        assert cells["test %"]["best"] == (row["label"] == "SAM (rho 0.2)")
        assert cells["pairs"]["best"] == (row["label"] == "SGD")
        assert not cells["gap"]["best"]
    assert [row["front"] for row in table["rows"]] == [True, True, False]
    assert table["rows"][2]["cells"][7]["mean"] == "1.50"
    assert table["rows"][1]["cells"][6]["mean"] == "24.0 s"


def test_the_last_number_that_is_there(tmp_path):
    run = RunFolder(tmp_path / "a")
    run.epoch(1, test_accuracy=50.0, pairs=3, train_accuracy=80.0)
    run.epoch(2, test_accuracy=40.0, pairs=6)
    run.epoch(3, pairs=9, test_loss=math.nan)
    (run,) = read_runs(tmp_path)
    assert (comparison.test_accuracy(run), comparison.best_accuracy(run), comparison.gap(run)) == (40.0, 50.0, 40.0)
    assert comparison.pairs(run) == 9
    (row,) = comparison.table(comparison.group([run]))["rows"]
    assert [cell["mean"] for cell in row["cells"]] == ["40.00", "50.00", "80.00", "40.00", "9"]  # no NaN, no time


def test_settings_tell_runs_of_a_method_apart(tmp_path):
    for name, rho, epochs in (("a", 0.1, 5), ("b", 0.1, 5), ("c", 0.2, 5)):
        RunFolder(tmp_path / name, method="SAM", settings={"rho": rho, "epochs": epochs}).epoch(1)
    groups = comparison.group(read_runs(tmp_path))
    assert [(one.label, len(one.runs)) for one in groups] == [("SAM (rho 0.1)", 2), ("SAM (rho 0.2)", 1)]


def test_bands_are_over_seeds_and_steps_are_put_together(runs, tmp_path):
    groups = comparison.group(read_runs(runs))
    test = next(chart for chart in charts.learning(groups) if chart["id"] == "test_accuracy")
    assert [line["m"] for line in test["series"]] == [0, 1, 2]
    assert test["series"][0]["x"] == list(range(1, 13))
    assert test["series"][0]["sd"] == [0.707107] * 12
    run = RunFolder(tmp_path / "long")
    rows = ["look" if t % 2 else "plain" for t in range(1000)]
    head = ",".join(samkern.history.COLUMNS)
    (run.path / "steps.csv").write_text(head + "\n" + "".join(f"{t},{d},{t},{t}\n" for t, d in enumerate(rows)))
    series = {c["id"]: c["series"][0] for c in charts.stepwise(comparison.group(read_runs(tmp_path)))}
    assert set(series) == {"grad_norm", "looks"}
    assert series["grad_norm"]["y"][:2] == [2.0, 7.0]  # of steps 0 to 4, 5 to 9
    assert len(series["grad_norm"]["x"]) == 200
    assert set(series["looks"]["y"]) == {0.5}


def test_the_errors_of_measures(runs):
    groups = comparison.group(read_runs(runs))
    over_seeds = comparison.measured(groups[0], "top eigenvalue")
    assert (over_seeds.value, over_seeds.standard_error) == (100.5, pytest.approx(0.5))
    one = comparison.Group("one", groups[0].runs[:1])
    assert comparison.measured(one, "top eigenvalue") == Measurement(100.0, 3.0, (1.0, 2.0))
    chart = charts.flatness(groups)[0]
    assert chart["tau"] == pytest.approx(
        comparison.rank_correlation(*zip(*((p["x"], p["y"]) for p in chart["points"]), strict=True))
    )
    assert comparison.rank_correlation([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)
    assert comparison.rank_correlation([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / math.sqrt(6))
    assert comparison.rank_correlation([1, 1], [1, 2]) is None


def test_planes_have_one_scale():
    low, high = bowl(1, "a"), bowl(4, "b")
    scale = pictures.common_scale([low, high])
    assert scale.low == 0.05
    assert low.loss.max() < scale.high < high.loss.max()
    assert scale.logarithmic
    for landscape in (low, high):
        surface, contour = (pictures.views(landscape, scale)[name]["data"][0] for name in ("surface", "contour"))
        assert (surface["cmin"], contour["zmin"]) == (pytest.approx(math.log10(0.05), rel=1e-5),) * 2
        assert surface["z"][0][1] == pytest.approx(min(landscape.loss[1, 0], scale.high), rel=1e-5)  # rows are b
    holed = Landscape("surface", "c", low.a, low.a, loss=np.where(low.loss > 1, np.nan, low.loss))
    assert None in pictures.views(holed, scale)["contour"]["data"][0]["z"][0]
    assert pictures.thumbnail(holed, scale) != pictures.thumbnail(low, scale)
    empty = Landscape("surface", "d", low.a, low.a, loss=np.full((9, 9), np.nan))
    assert pictures.thumbnail(empty, pictures.common_scale([empty])).startswith("data:image/png;base64,")


# ---- the file


class Addresses(HTMLParser):
    """What elements refer to, and which elements there are."""

    def __init__(self):
        super().__init__()
        self.found, self.ids, self.tags = [], set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "poster")]
        self.ids |= {value for name, value in attrs if name == "id"}


def test_one_file_refers_to_itself_only(path):
    text = path.read_text(encoding="utf-8")
    parser = Addresses()
    parser.feed(text)
    assert parser.found
    assert all(address.startswith(("#", "data:")) for address in parser.found)
    assert {address[1:] for address in parser.found if address.startswith("#")} <= parser.ids
    assert not {"link"} & {tag for tag in parser.tags if tag == "link"} or 'href="data:,"' in text
    assert "default-src 'none'" in text
    assert text.count("<script") - text.count("<script>document") == 3 + text.split("</style>")[1].count("<script>\n")
    assert HOSTILE not in text


def test_the_same_runs_give_the_same_page(runs, path, tmp_path):
    again = samkern.report([runs], tmp_path / "again.html", title="A comparison")
    assert again.read_bytes() == path.read_bytes()
    before = path.stat().st_mtime_ns
    assert samkern.report((folder for folder in [runs]), title="A comparison") == path
    assert path.stat().st_mtime_ns > before


def test_what_is_not_there_is_left_out(tmp_path):
    run = RunFolder(tmp_path / "a", method="SAM")
    text = samkern.report(tmp_path).read_text()
    sections = set(re.findall(r'<section id="(\w+)"', text))
    assert sections == {"environment"}
    run.epoch(1, test_accuracy=50.0)
    text = samkern.report(tmp_path / "a").read_text()
    assert set(re.findall(r'<section id="(\w+)"', text)) == {"results", "learning", "environment"}
    assert 'class="chip"' not in text  # of one method
    assert "<h1>SAM</h1>" in text
    assert "± " not in re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)


def test_mistakes(tmp_path):
    with pytest.raises(NoRunsError, match="looked for"):
        samkern.report(tmp_path)
    RunFolder(tmp_path / "a").epoch(1)
    (tmp_path / "a" / "measures.json").write_text("{")
    with pytest.raises(UnreadableRunError, match=r"measures\.json"):
        samkern.report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_the_command(runs, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert command.main([str(runs), "--out", str(out), "--title", "Mine", "--tensorboard", str(tmp_path / "logs")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    assert "<title>Mine</title>" in out.read_text()
    assert len(list((tmp_path / "logs").iterdir())) == len(METHODS) * SEEDS
    with pytest.raises(SystemExit, match="looked for"):
        command.main([str(tmp_path / "logs")])


def test_nothing_heavy_is_imported_with_samkern():
    heavy = "{'jinja2', 'plotly', 'matplotlib', 'tensorboard'}"
    # torch imports some of them itself, or not, as it is installed.
    code = f"import sys, torch; before = set(sys.modules); import samkern; print(sorted({heavy} & set(sys.modules) - before))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# ---- in a browser


def draw_all(page):
    """Charts are drawn when they come near the window."""
    for place in page.locator(".plot").all():
        place.scroll_into_view_if_needed()
    page.wait_for_function("[...document.querySelectorAll('.plot')].every((p) => p.querySelector('.main-svg'))")


def test_charts_are_drawn_and_methods_can_be_hidden(page, path):
    page.goto(path.as_uri())
    assert page.title() == "A comparison"
    draw_all(page)
    traces = page.evaluate(
        """() => Object.fromEntries([...document.querySelectorAll('.plot')].map((plot) =>
        [plot.closest('figure').querySelector('figcaption').firstChild.textContent,
         [plot.data.length, plot.querySelectorAll('.trace').length]]))"""
    )
    band_and_line = {"Test accuracy", "Training accuracy", "Test loss", "Training loss"}
    assert band_and_line <= set(traces)
    for name, (wanted, drawn) in traces.items():
        assert wanted == drawn, name
        if name in band_and_line:
            assert wanted == 2 * len(METHODS)
    assert traces["Test accuracy against pairs"][0] == 2 * len(METHODS) + 1  # and the front
    assert traces["Looks"][0] == 2 * 2  # SGD has no history
    assert traces["By method"][0] == 1
    page.get_by_role("button", name="SGD", exact=True).click()
    count = """(title) => [...document.querySelectorAll('figure')].find((f) => f.innerText.startsWith(title))
        .querySelector('.plot').data.length"""
    assert page.evaluate(count, "Test accuracy against time") == 2 * 2 + 1
    assert page.get_by_role("button", name="SGD", exact=True).get_attribute("aria-pressed") == "false"
    page.get_by_role("button", name="Front", exact=True).click()
    assert page.locator(".chip[aria-pressed=true]").count() == 2
    page.locator("#measure").select_option(index=1)
    assert page.locator("[data-group=dots] .xtitle").text_content() == HOSTILE


def test_tables_sort(page, path):
    page.goto(path.as_uri())
    table = page.locator("#results table")
    names = lambda: table.locator("tbody th .method > span").all_text_contents()  # noqa: E731
    order = [[name in shown for name in METHODS].index(True) for shown in names()]
    assert order == [0, 1, 2]

    def sorted_by(name):
        table.get_by_role("button", name=name, exact=True).click()
        places = [next(i for i, method in enumerate(METHODS) if shown.startswith(method)) for shown in names()]
        return places, table.locator("th[aria-sort]:not([aria-sort=none])").get_attribute("aria-sort")

    assert sorted_by("test %") == ([1, 0, 2], "descending")
    assert sorted_by("test %") == ([2, 0, 1], "ascending")
    assert sorted_by("pairs") == ([1, 2, 0], "descending")
    table.get_by_role("button", name="method", exact=True).focus()
    page.keyboard.press("Enter")
    assert [i for i, shown in enumerate(names()) if shown.startswith("SGD")] == [2]


def test_a_thumbnail_opens_a_landscape(page, path):
    page.goto(path.as_uri())
    thumbnails = page.locator(".thumbnail")
    assert thumbnails.count() == 4
    assert thumbnails.first.locator("img").evaluate("(image) => image.naturalWidth") == 320
    thumbnails.first.focus()
    page.keyboard.press("Enter")
    stage = page.locator("#viewer .stage")
    views = page.locator("#viewer .views button")
    if views.count():  # WebGL is there
        page.wait_for_selector("#viewer .stage[data-view=surface] canvas")
        assert stage.evaluate("(s) => [s.data[0].type, s.data[0].z.length]") == ["surface", 9]
        page.get_by_role("button", name="Contour").click()
    page.wait_for_selector(
        "#viewer .stage[data-view=contour] .contourlevel, #viewer .stage[data-view=contour] .contourfill"
    )
    page.get_by_role("button", name="Next landscape").click()
    page.wait_for_selector("#viewer .stage[data-view=line] .scatterlayer")
    page.keyboard.press("Escape")
    assert not page.locator("#viewer").is_visible()
    assert page.evaluate("document.activeElement.className").startswith("thumbnail")
    assert stage.evaluate("(s) => s.children.length") == 0


WITHIN = """() => {
  const width = document.documentElement.clientWidth;
  const scrolled = (e) => e.closest('.scroll, .chips');
  return [...document.querySelectorAll('body *')].filter((e) => !scrolled(e) && !e.closest('.unseen, .skip, svg, dialog'))
    .filter((e) => { const box = e.getBoundingClientRect(); return box.width && (box.right > width + 0.5 || box.left < -0.5); })
    .map((e) => e.outerHTML.slice(0, 120));
}"""


def test_on_a_phone(page, path):
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(path.as_uri())
    draw_all(page)
    page.locator("details summary").click()
    assert page.evaluate("[document.scrollingElement.scrollWidth, innerWidth]") == [390, 390]
    assert page.evaluate(WITHIN) == []
    for box in page.locator(".scroll").all():
        assert box.bounding_box()["width"] <= 390
    assert page.locator("#results .scroll").evaluate(
        "(box) => box.scrollWidth > box.clientWidth"
    )  # it scrolls in itself
    for svg in page.locator(".plot .main-svg:first-child").all():
        box = svg.bounding_box()
        assert box["width"] <= 390
        assert box["height"] >= 200
    for control in page.locator(
        "button:not(.modebar-btn):visible, select:visible, summary:visible, nav a:visible"
    ).all():
        assert control.bounding_box()["height"] >= 40, control.evaluate("(e) => e.outerHTML")
    page.locator(".thumbnail").first.click()
    page.wait_for_selector("#viewer .stage[data-view]")
    assert page.locator("#viewer").bounding_box() == {"x": 0, "y": 0, "width": 390, "height": 844}
    assert page.evaluate("document.scrollingElement.scrollWidth") == 390


CONTRAST = """() => {
  const parts = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => {
    const [r, g, b] = parts(color).map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    const color = getComputedStyle(e).backgroundColor;
    const opaque = color.startsWith('rgb(') ;
    return opaque ? color : e.parentElement ? ground(e.parentElement) : 'rgb(255, 255, 255)';
  };
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)]; return (Math.max(x, y) + 0.05) / (Math.min(x, y) + 0.05); };
  const of = (selector, key) => [...document.querySelectorAll(selector)].map((e) => ratio(getComputedStyle(e)[key], ground(e)));
  return {
    texts: Math.min(...of('h1, h2, p, td, th, dt, dd, span:not(.unseen), button, a, figcaption, summary', 'color')),
    axes: Math.min(...of('.plot text.xtitle, .plot .xtick text, .plot .ytick text', 'fill')),
    lines: Math.min(...of('.plot .scatterlayer .js-line', 'stroke')),
    swatches: Math.min(...of('.swatch .symbol', 'fill')),
    ground: light(ground(document.body)),
  };
}"""


FOLLOWED = """() => {
  const wanted = getComputedStyle(document.documentElement).getPropertyValue('--text').trim();
  return [...document.querySelectorAll('.plot')].every((plot) => plot.layout.font.color === wanted);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(page, path, scheme):
    page.emulate_media(color_scheme="light" if scheme == "dark" else "dark")
    page.goto(path.as_uri())
    draw_all(page)
    page.emulate_media(color_scheme=scheme)  # while the page is open: charts follow
    page.wait_for_function(FOLLOWED)
    found = page.evaluate(CONTRAST)
    assert (found["ground"] < 0.1) == (scheme == "dark")
    assert found["texts"] >= 4.5
    assert found["axes"] >= 4.5
    assert found["lines"] >= 3
    assert found["swatches"] >= 3


def test_hostile_names_are_text(page, path):
    page.goto(path.as_uri())
    draw_all(page)
    assert page.title() == "A comparison"
    assert page.locator("script").count() == 3
    assert page.locator("#results tbody th .method > span").nth(2).text_content() == HOSTILE
    assert page.locator(".chip").nth(2).text_content() == HOSTILE
    assert HOSTILE in page.locator("[data-group=dots] .ytick").all_text_contents()
    names = page.evaluate("[...document.querySelectorAll('.plot')].flatMap((p) => p.data.map((t) => t.name))")
    assert not any("<" in name for name in names if name)
    end = page.locator("[data-group=cost] .textpoint text")
    assert set(end.all_text_contents()) == set(METHODS)
    page.locator("details summary").click()
    assert page.locator("#environment .facts").get_by_text(HOSTILE, exact=True).count() == 1


def test_print(page, path, tmp_path):
    page.goto(path.as_uri())
    page.emulate_media(media="print", color_scheme="dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.wait_for_function("[...document.querySelectorAll('.plot')].every((p) => p.querySelector('.main-svg'))")
    assert page.locator("details[open]").count() == 1
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not page.locator("nav").is_visible()
    assert page.evaluate("getComputedStyle(document.querySelector('.xtick text')).fill") == "rgb(0, 0, 0)"
