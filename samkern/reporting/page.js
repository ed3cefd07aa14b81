"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const SYMBOLS = ["circle", "square", "diamond", "cross", "triangle-up", "triangle-down", "x", "star", "pentagon", "hexagon"];
  const DASHES = ["solid", "dash", "dot"];
  const hidden = new Set(); // methods that the charts leave out
  const front = new Set(all(".chip[data-front='1']").map((chip) => Number(chip.dataset.m)));
  const coarse = matchMedia("(pointer: coarse)").matches;

  // ---- looks: the colours are those of the style sheet, which follow the reader's

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const colorOf = (m) => color(`c${m % 10}`);
  const faded = (hex, alpha) => `rgba(${[1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)).join(",")},${alpha})`;
  const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  const named = (m) => escaped(data.methods[m]);
  const shown = (m) => !hidden.has(m);
  const lesser = (m) => front.size > 0 && data.methods.length > 6 && !front.has(m);
  const lineOf = (m) => ({ color: colorOf(m), width: lesser(m) ? 1.3 : 2.2, dash: DASHES[Math.floor(m / 10) % 3] });
  const symbolOf = (m) => SYMBOLS[(m + 3 * Math.floor(m / 10)) % SYMBOLS.length];

  const axis = (more = {}) => ({
    gridcolor: color("grid"), zerolinecolor: color("edge"), linecolor: color("edge"), tickcolor: color("edge"),
    automargin: true, ...more, title: { standoff: 8, ...more.title },
  });

  const layout = (more = {}) => ({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false, hovermode: "closest",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: color("text") },
    hoverlabel: { bgcolor: color("card"), bordercolor: color("edge"), font: { color: color("text") }, namelength: -1 },
    margin: { l: 56, r: 16, t: 14, b: 46 },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: color("soft"), activecolor: color("strong") },
    // A finger that scrolls the page should not zoom a chart.
    dragmode: coarse ? false : "zoom",
    ...more,
  });

  const config = {
    responsive: true, displaylogo: false, displayModeBar: coarse ? false : "hover",
    modeBarButtonsToRemove: ["sendChartToCloud", "select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "resetScale2d"],
  };

  // ---- charts

  const scaleOf = (chart) => {
    if (chart.log) return { type: "log", dtick: undefined, exponentformat: "power" };
    return chart.range ? { range: chart.range } : { rangemode: chart.from_zero ? "tozero" : "normal" };
  };

  function band(line, logarithmic) {
    const places = line.y.map((y, i) => i);
    const lowest = Math.min(...line.y);
    const low = (i) => (logarithmic ? Math.max(line.y[i] - line.sd[i], lowest / 2) : line.y[i] - line.sd[i]);
    return {
      x: [...places, ...places.toReversed()].map((i) => line.x[i]),
      y: [...places.map((i) => line.y[i] + line.sd[i]), ...places.toReversed().map(low)],
      mode: "lines", line: { width: 0, color: colorOf(line.m) }, fill: "toself", fillcolor: faded(colorOf(line.m), 0.14), hoverinfo: "skip",
    };
  }

  function curve(line) {
    return {
      x: line.x, y: line.y, name: named(line.m), line: lineOf(line.m),
      mode: line.x.length > 1 ? "lines" : "markers", marker: { color: colorOf(line.m), symbol: symbolOf(line.m), size: 8 },
      hovertemplate: "%{y:.5~g} at %{x:,.6~g}<extra>%{fullData.name}</extra>",
    };
  }

  function lines(chart) {
    const series = chart.series.filter((line) => shown(line.m));
    const bands = series.filter((line) => line.sd && line.x.length > 1).map((line) => band(line, chart.log));
    return {
      data: [...bands, ...series.map(curve)],
      layout: layout({ xaxis: axis({ title: { text: chart.x } }), yaxis: axis({ title: { text: escaped(chart.y) }, ...scaleOf(chart) }) }),
    };
  }

  function cost(chart, box) {
    const traces = chart.series.filter((line) => shown(line.m)).map((line) => {
      const thin = curve(line);
      return { ...thin, line: { ...thin.line, width: 1 }, opacity: 0.45, mode: "lines" };
    });
    const [xs, ys] = [chart.front.map((p) => p[0]), chart.front.map((p) => p[1])];
    if (chart.front.length > 1) traces.push({ x: xs, y: ys, mode: "lines", line: { color: color("soft"), width: 1.2, dash: "dot" }, hoverinfo: "skip" });
    const widest = Math.max(...chart.ends.map((end) => end.x));
    const labels = box.clientWidth > 460;
    let above = false; // names of neighbours: by turns above and below
    for (const end of chart.ends.filter((one) => shown(one.m)).sort((a, b) => a.x - b.x)) {
      const on = chart.ends.length <= 6 || xs.some((x, i) => x === end.x && ys[i] === end.y);
      if (on) above = !above;
      const place = `${above ? "top" : "bottom"} ${end.x > widest / 2 ? "left" : "right"}`;
      traces.push({
        x: [end.x], y: [end.y], name: named(end.m), text: [named(end.m)], cliponaxis: false,
        mode: labels && on ? "markers+text" : "markers", textposition: place,
        marker: { color: colorOf(end.m), symbol: symbolOf(end.m), size: on ? 11 : 9 },
        error_y: { type: "data", array: [end.sd], visible: end.sd > 0, color: colorOf(end.m), thickness: 1.2, width: 3 },
        hovertemplate: `%{y:.2f} ± ${end.sd.toFixed(2)} % at %{x:,.6~g}<extra>%{fullData.name}</extra>`,
      });
    }
    const range = [-0.02 * widest, 1.04 * widest];
    return { data: traces, layout: layout({ xaxis: axis({ title: { text: chart.x }, range }), yaxis: axis({ title: { text: chart.y }, ...scaleOf(chart) }) }) };
  }

  const spread = (values) => ({ type: "data", array: values, thickness: 1.4, width: 4 });

  function dots(chart, place) {
    const rows = chart.dots.filter((dot) => shown(dot.m));
    place.style.height = `${Math.max(200, 26 * rows.length + 80)}px`;
    const short = (text) => (place.clientWidth < 480 && text.length > 18 ? `${text.slice(0, 17)}…` : text);
    const trace = {
      x: rows.map((dot) => dot.x), y: rows.map((dot, i) => i), text: rows.map((dot) => named(dot.m)), mode: "markers",
      marker: { color: rows.map((dot) => colorOf(dot.m)), symbol: rows.map((dot) => symbolOf(dot.m)), size: 10 },
      error_x: { ...spread(rows.map((dot) => dot.error)), color: color("soft") },
      customdata: rows.map((dot) => dot.error), hovertemplate: "%{x:.5~g} ± %{customdata:.2~g}<extra>%{text}</extra>",
    };
    const names = { tickvals: rows.map((dot, i) => i), ticktext: rows.map((dot) => escaped(short(data.methods[dot.m]))), range: [rows.length - 0.5, -0.5], zeroline: false };
    return { data: [trace], layout: layout({ xaxis: axis({ title: { text: escaped(chart.name) }, ...scaleOf(chart) }), yaxis: axis(names) }) };
  }

  function points(chart) {
    const methods = [...new Set(chart.points.map((point) => point.m))].filter(shown);
    const traces = methods.map((m) => {
      const mine = chart.points.filter((point) => point.m === m);
      return {
        x: mine.map((p) => p.x), y: mine.map((p) => p.y), text: mine.map((p) => escaped(p.name)), name: named(m), mode: "markers",
        marker: { color: colorOf(m), symbol: symbolOf(m), size: 9 }, error_x: { ...spread(mine.map((p) => p.error)), color: faded(colorOf(m), 0.6) },
        hovertemplate: "%{x:.5~g}, %{y:.2f} % %{text}<extra>%{fullData.name}</extra>",
      };
    });
    return { data: traces, layout: layout({ xaxis: axis({ title: { text: escaped(chart.name) }, ...scaleOf(chart) }), yaxis: axis({ title: { text: "test accuracy (%)" } }) }) };
  }

  // ---- which are drawn: those that have come near the window

  const KINDS = { cost, learning: lines, steps: lines, dots, points };
  const plots = all(".plot");
  const drawn = new Set();
  const measure = document.getElementById("measure");

  function chartOf(place) {
    const { group, index } = place.dataset;
    return group === "dots" || group === "points" ? data.flatness[measure ? measure.value : 0] : data[group][index];
  }

  function draw(place) {
    drawn.add(place);
    const figure = KINDS[place.dataset.group](chartOf(place), place);
    return Plotly.react(place, figure.data, figure.layout, config);
  }

  const redraw = () => Promise.all([...drawn].map(draw));
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting && !drawn.has(entry.target)) {
        near.unobserve(entry.target);
        draw(entry.target);
      }
    }
  }, { rootMargin: "400px" });
  plots.forEach((place) => near.observe(place));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { redraw(); show(); });
  addEventListener("beforeprint", () => {
    all("details").forEach((details) => { details.open = true; });
    plots.forEach((place) => { draw(place); Plotly.Plots.resize(place); });
  });
  addEventListener("afterprint", redraw);

  function tell() {
    const tau = document.querySelector(".tau");
    if (!tau) return;
    const chart = chartOf(document.querySelector("[data-group='points']"));
    tau.textContent = chart.tau === null ? "" : `Kendall’s τ ${chart.tau.toFixed(2).replace("-", "−")} over ${chart.points.length} runs`;
  }
  tell();
  if (measure) measure.addEventListener("change", () => { tell(); redraw(); });

  // ---- which methods are shown

  function choose(keep) {
    for (const chip of all(".chip")) {
      const m = Number(chip.dataset.m);
      const on = keep(m);
      chip.setAttribute("aria-pressed", String(on));
      if (on) hidden.delete(m);
      else hidden.add(m);
    }
    redraw();
  }
  all(".chip").forEach((chip) => chip.addEventListener("click", () => {
    const clicked = Number(chip.dataset.m);
    choose((m) => (m === clicked ? hidden.has(m) : !hidden.has(m)));
  }));
  const SHOW = { all: () => true, none: () => false, front: (m) => front.has(m) };
  all("[data-show]").forEach((button) => button.addEventListener("click", () => choose(SHOW[button.dataset.show])));

  // ---- tables

  const collator = new Intl.Collator("en", { numeric: true });
  function compare(a, b, sign) {
    if (a === "" || b === "") return (a === "") - (b === ""); // what is missing comes last, either way
    const [x, y] = [Number(a), Number(b)];
    return sign * (Number.isNaN(x) || Number.isNaN(y) ? collator.compare(a, b) : x - y);
  }
  all("table.sortable").forEach((table) => {
    const heads = all("thead th", table);
    heads.forEach((head, i) => head.firstElementChild.addEventListener("click", () => {
      // Numbers begin with the highest, names with A.
      const before = head.getAttribute("aria-sort");
      const next = before === "none" ? (head.classList.contains("number") ? "descending" : "ascending") : before === "ascending" ? "descending" : "ascending";
      heads.forEach((other) => other.setAttribute("aria-sort", other === head ? next : "none"));
      const sign = next === "ascending" ? 1 : -1;
      const body = table.tBodies[0];
      const key = (row) => row.cells[i].dataset.sort;
      body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b), sign)));
    }));
  });

  // ---- landscapes

  const viewer = document.getElementById("viewer");
  const thumbnails = all(".thumbnail");
  let current = 0;
  let view = null; // that was chosen last
  let camera = null; // so that the next landscape is seen from the same side
  const webgl = (() => { const context = document.createElement("canvas").getContext("webgl"); return Boolean(context); })();

  function show() {
    if (!viewer || !viewer.open) return;
    const views = data.landscapes[current];
    const names = Object.keys(views).filter((name) => name !== "surface" || webgl);
    const chosen = names.includes(view) ? view : names[0];
    document.getElementById("viewer-title").textContent = thumbnails[current].dataset.title;
    const buttons = names.map((name) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = name[0].toUpperCase() + name.slice(1);
      button.setAttribute("aria-pressed", String(name === chosen));
      button.addEventListener("click", () => { view = name; show(); viewer.querySelector(".views [aria-pressed='true']").focus(); });
      return button;
    });
    viewer.querySelector(".views").replaceChildren(...(names.length > 1 ? buttons : []));
    const stage = viewer.querySelector(".stage");
    Plotly.purge(stage);
    const figure = structuredClone(views[chosen]);
    const more = figure.layout;
    for (const name of Object.keys(more).filter((key) => /^[xyz]axis/.test(key))) more[name] = axis(more[name]);
    if (more.scene) {
      for (const name of ["xaxis", "yaxis", "zaxis"]) more.scene[name] = { ...axis(more.scene[name]), automargin: undefined, backgroundcolor: "rgba(0,0,0,0)" };
      if (camera) more.scene.camera = camera;
    }
    if (stage.clientWidth < 500) { // the scale above, and the camera further away: as wide as there is room
      for (const trace of figure.data) if (trace.colorbar) Object.assign(trace.colorbar, { orientation: "h", x: 0.5, xanchor: "center", y: 1.02, yanchor: "bottom", thickness: 8, len: 0.9 });
      if (more.scene && !camera) for (const name of "xyz") more.scene.camera.eye[name] *= 1.95;
    }
    const margin = more.scene ? { l: 0, r: 0, t: 36, b: 0 } : { l: 60, r: 20, t: 24, b: 56 };
    const dragmode = more.scene ? "turntable" : coarse ? false : "zoom";
    Plotly.newPlot(stage, figure.data, layout({ margin, ...more, dragmode, showlegend: chosen === "line" && figure.data.length > 1, legend: { orientation: "h", y: 1.08 } }), config).then(() => {
      stage.dataset.view = chosen;
      if (more.scene) stage.on("plotly_relayout", () => { camera = stage.layout.scene.camera; });
    });
  }

  if (viewer) {
    const go = (by) => { current = (current + by + thumbnails.length) % thumbnails.length; show(); };
    thumbnails.forEach((thumbnail, i) => thumbnail.addEventListener("click", () => { current = i; viewer.showModal(); show(); }));
    all("[data-go]", viewer).forEach((button) => {
      button.hidden = thumbnails.length < 2;
      button.addEventListener("click", () => go(Number(button.dataset.go)));
    });
    viewer.querySelector(".close").addEventListener("click", () => viewer.close());
    viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
    viewer.addEventListener("close", () => {
      Plotly.purge(viewer.querySelector(".stage"));
      thumbnails[current].focus();
    });
  }
})();
