/* Draws the charts of a report with uPlot. Values and names come from the element #data; texts are never parsed as HTML. */
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const HEIGHT = 230;
  const STATE = "slime_spec report";
  const hidden = new Set();
  const drawn = new Map(); // element of a chart -> its uPlot
  const smooth = document.getElementById("smooth") || { value: "1", addEventListener: () => {} };

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const faded = (hex, alpha) => hex + Math.round(alpha * 255).toString(16).padStart(2, "0");

  function shown(value) {
    if (value == null) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e9)) return value.toExponential(2);
    if (size >= 1000) return Math.round(value).toLocaleString("en");
    return String(Number(value.toPrecision(4)));
  }

  function ticks(values) {
    return values.map((value) => {
      if (value == null) return "";
      const size = Math.abs(value);
      if (size >= 1e9) return Number((value / 1e9).toPrecision(3)) + "G";
      if (size >= 1e6) return Number((value / 1e6).toPrecision(3)) + "M";
      if (size >= 1e4) return Number((value / 1e3).toPrecision(3)) + "k";
      if (size !== 0 && size < 1e-3) return value.toExponential(0);
      return String(Number(value.toPrecision(6)));
    });
  }

  /* The points of a line; a value that was not finite is null, and interrupts the line. */
  const xsOf = (line) => line.x || line.y.map((_, index) => line.start + index * line.every);
  const tableOf = (line) => [xsOf(line), line.y];

  /* Each value as the mean of the last ones, itself among them: as many as the reader chose. */
  function smoothed(chart, values) {
    const count = chart.xLabel === "step" ? Number(smooth.value) : 1;
    return values.map((value, at) => {
      if (count === 1 || value == null) return value;
      const known = values.slice(Math.max(0, at + 1 - count), at + 1).filter((each) => each != null);
      return known.reduce((sum, each) => sum + each, 0) / known.length;
    });
  }

  /* uPlot takes one list of x for all lines. Where a line has no value at another's x, it goes on (undefined). */
  function aligned(lines, columnsOf) {
    const tables = lines.map(columnsOf);
    const modes = tables.map((table) => table.map(() => 0)); // 0: a null stays a gap, what is absent is spanned
    const all = uPlot.join(tables, modes);
    return all.map((column, index) => (index === 0 ? column : Array.from(column)));
  }

  function nameOf(chart, line) {
    const run = data.runs[line.run];
    if (chart.kind !== "lines") return line.label || run;
    const many = new Set(chart.lines.map((each) => each.run)).size > 1;
    if (!line.label) return run;
    return many ? run + ": " + line.label : line.label;
  }

  function strokeOf(chart, line) {
    if (chart.kind === "lines") return colour("--run-" + (line.run % 8));
    return colour((chart.kind === "stacked" ? "--phase-" : "--run-") + (line.shade % 8));
  }

  function axes(chart) {
    const look = { stroke: colour("--quiet"), grid: { stroke: colour("--line"), width: 1 }, font: "12px system-ui, sans-serif" };
    const steps = { ...look, ticks: { show: false }, size: 34, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 1e6] };
    return [steps, { ...look, ticks: { show: false }, size: 56, values: (_, values) => ticks(values) }];
  }

  function scales(chart, xs) {
    const [first, last] = [xs[0], xs[xs.length - 1]];
    const wide = (plot, low, high) => (first === last ? [first - 1, last + 1] : low == null ? [first, last] : [low, high]);
    const y = { auto: true };
    if (chart.log) y.distr = 3;
    else
      y.range = (_, low, high) => {
        if (low == null || (low === 0 && high === 0)) return [0, 1];
        if (chart.rule != null) [low, high] = [Math.min(low, chart.rule), Math.max(high, chart.rule)];
        const room = (high - low || Math.abs(high) || 1) * 0.08;
        const least = low >= 0 && (chart.kind === "stacked" || low - room < 0 || low < high / 3) ? 0 : low - room;
        return [least, high + room];
      };
    return { x: { time: false, range: wide }, y };
  }

  /* A level that is marked, and the word for a chart without any point. */
  function marks(chart) {
    return (plot) => {
      const context = plot.ctx;
      context.save();
      if (chart.rule != null) {
        const y = plot.valToPos(chart.rule, "y", true);
        context.strokeStyle = colour("--ink");
        context.lineWidth = devicePixelRatio;
        context.beginPath();
        context.moveTo(plot.bbox.left, y);
        context.lineTo(plot.bbox.left + plot.bbox.width, y);
        context.stroke();
      }
      context.restore();
    };
  }

  function lineSeries(chart) {
    const series = [{ label: chart.xLabel }];
    const bands = [];
    chart.lines.forEach((line) => {
      const stroke = strokeOf(chart, line);
      const show = !hidden.has(line.run);
      const few = line.y.length < 40;
      series.push({
        label: nameOf(chart, line), stroke, width: 2, show, dash: line.dashed ? [6, 5] : undefined,
        points: { show: few && (!line.dashed || line.y.length < 5), size: line.y.length < 5 ? 8 : 4, fill: stroke }, value: (_, value) => shown(value),
      });
      if (line.low.length) {
        const edge = { stroke: "transparent", width: 0, show, points: { show: false }, isEdge: true };
        series.push({ ...edge, label: "upper" }, { ...edge, label: "lower" });
        bands.push({ series: [series.length - 2, series.length - 1], fill: faded(stroke, 0.18) });
      }
    });
    const columns = (line) => {
      const [x, y] = [xsOf(line), smoothed(chart, line.y)];
      return line.low.length ? [x, y, smoothed(chart, line.high), smoothed(chart, line.low)] : [x, y];
    };
    return { series, bands, table: aligned(chart.lines, columns) };
  }

  /* Phases upon each other: the sum of all is drawn first, and each smaller sum over it. */
  function stackedSeries(chart) {
    const table = aligned(chart.lines, tableOf);
    const sums = [];
    table.slice(1).forEach((column, index) => {
      sums.push(column.map((value, at) => (value || 0) + (index ? sums[index - 1][at] : 0)));
    });
    const series = [{ label: chart.xLabel }];
    const columns = [table[0]];
    for (let index = chart.lines.length - 1; index >= 0; index--) {
      const stroke = strokeOf(chart, chart.lines[index]);
      series.push({
        label: nameOf(chart, chart.lines[index]), stroke, width: 1, fill: stroke, points: { show: table[0].length === 1 },
        value: (_, value, __, at) => (at == null ? "–" : shown(table[index + 1][at])),
      });
      columns.push(sums[index]);
    }
    return { series, bands: [], table: columns };
  }

  function draw(element) {
    const chart = data.charts[Number(element.dataset.chart)];
    const made = chart.kind === "stacked" ? stackedSeries(chart) : lineSeries(chart);
    const edges = made.series.map((each) => each.isEdge);
    const plot = new uPlot(
      {
        width: Math.max(200, element.clientWidth), height: HEIGHT, series: made.series, bands: made.bands,
        scales: scales(chart, made.table[0]), axes: axes(chart), hooks: { draw: [marks(chart)] },
        cursor: { sync: { key: chart.xLabel }, points: { size: 6 } }, legend: { markers: { width: 2 } },
      },
      made.table,
      element,
    );
    plot.root.querySelectorAll(".u-legend tr").forEach((row, index) => { row.style.display = edges[index] ? "none" : ""; });
    drawn.set(element, plot);
  }

  function redraw() {
    for (const [element, plot] of drawn) {
      plot.destroy();
      draw(element);
    }
  }

  /* Charts are drawn when they come near the screen: a page of many runs opens at once. */
  const near = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        if (!entry.isIntersecting || drawn.has(entry.target)) continue;
        near.unobserve(entry.target);
        draw(entry.target);
      }
    },
    { rootMargin: "600px" },
  );
  document.querySelectorAll(".plot").forEach((element) => near.observe(element));

  addEventListener("resize", () => {
    for (const [element, plot] of drawn) plot.setSize({ width: Math.max(200, element.clientWidth), height: HEIGHT });
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("beforeprint", () => document.querySelectorAll(".plot").forEach((element) => drawn.has(element) || draw(element)));

  /* What the reader chose outlives the page's reading itself again. */
  function stored() {
    try {
      return JSON.parse(sessionStorage.getItem(STATE)) || {};
    } catch {
      return {};
    }
  }

  function store() {
    try {
      sessionStorage.setItem(STATE, JSON.stringify({ hidden: [...hidden], smooth: smooth.value, live: live ? live.checked : true, at: scrollY }));
    } catch {
      return; // a browser that keeps nothing for files shows the page all the same
    }
  }

  const live = document.getElementById("live");
  const before = stored();
  document.querySelectorAll("#runs input").forEach((box) => {
    const run = Number(box.dataset.run);
    if ((before.hidden || []).includes(run)) {
      box.checked = false;
      hidden.add(run);
    }
    box.addEventListener("change", () => {
      if (box.checked) hidden.delete(run);
      else hidden.add(run);
      redraw();
      store();
    });
  });
  smooth.value = before.smooth || "1";
  smooth.addEventListener("change", () => {
    redraw();
    store();
  });
  if (live) {
    live.checked = before.live !== false;
    if (before.at) scrollTo(0, before.at);
    setInterval(() => {
      store();
      if (live.checked) location.reload();
    }, data.reloadSeconds * 1000);
  }
})();
