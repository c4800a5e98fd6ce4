"use strict";
// Draws the data that pipeline/reporting/page.py put into #data. Below every chart is a table of the same values.
const { hosts, rows } = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const FIGURES = ["top1", "head", "medium", "tail"];
const NAMES = { top1: "all", head: "head", medium: "medium", tail: "tail" };
const COLOUR = { top1: "var(--top1)", head: "var(--head)", medium: "var(--medium)", tail: "var(--tail)" };
const ROW_COLOUR = { "stage I": "var(--stage1)", "without H2T": "var(--head)", "with H2T": "var(--tail)" };
const CLASS_COLOURS = ["#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f", "#edc948", "#b07aa1", "#ff9da7", "#9c755f", "#8a8a8a"];
const NEIGHBOURS = 5;
const CELLS = 90;
const LINES = 300; // most rows in the table of the confusion matrix
const state = { host: Object.keys(hosts)[0], at: 0, row: "with_h2t", pair: "" };
const known = (v) => v !== null && v !== undefined;
const text = (v, digits = 2) => (known(v) ? Number(v).toFixed(digits) : "–");
const short = (name, most) => (name.length > most ? `${name.slice(0, most - 1)}…` : name);
const signed = (v) => (v > 0 ? "+" : "") + text(v);

function element(tag, content, attributes = {}) {
  const made = document.createElement(tag);
  if (content !== null) made.textContent = content;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function table(id, columns, lines) {
  const made = element("table", null);
  const head = made.createTHead().insertRow();
  for (const column of columns) head.append(element("th", column, { scope: "col" }));
  const body = made.createTBody();
  for (const [first, ...rest] of lines) {
    const line = body.insertRow();
    line.append(element("th", first, { scope: "row" }));
    for (const value of rest) line.append(element("td", typeof value === "number" || value === null ? text(value) : value));
  }
  $(`${id}-table`).replaceChildren(made);
}

/** Puts a chart with these Plot options into #id, and the same values into the table #id-table. */
function chart(id, options, columns, lines) {
  const place = $(id);
  const width = Math.max(260, Math.min(place.clientWidth || 640, options.most || 900));
  const all = { width, height: 300, marginLeft: 44, marginBottom: 46, ...options, style: { overflow: "visible" } };
  const drawn = Plot.plot({ ...all, x: { labelOffset: all.marginBottom - 6, ...options.x } });
  drawn.setAttribute("aria-hidden", "true");
  place.replaceChildren(drawn);
  table(id, columns, lines);
}

/** The rows of metrics.json that this host has, in the order of the table. */
const present = (h) => Object.keys(rows).filter((key) => h.rows[key]);
const GROUPS = ["head", "medium", "tail"];
const groupLegend = (id, classes) => legend(id, GROUPS.filter((g) => classes.some((c) => c.group === g)).map((g) => [`${g} classes`, COLOUR[g]]));
const percent = (label = "test accuracy (%)") => ({ domain: [0, 100], grid: true, label });

function drawRatio() {
  const h = hosts[state.host], at = state.at, zero = h.ratios.indexOf(0);
  if (!h.ratios.length) {
    $("ratio-text").textContent = `${state.host} was not trained with donor instance and random channels.`;
    for (const id of ["groups", "curve", "bars"]) for (const place of [id, `${id}-table`]) $(place).replaceChildren();
    return;
  }
  const groups = FIGURES.filter((f) => known(h.mean[f][at]));
  const bars = groups.map((f) => ({ group: NAMES[f], figure: f, mean: h.mean[f][at], std: h.std[f][at], zero: zero < 0 ? null : h.mean[f][zero] }));
  chart("groups", {
    x: { domain: bars.map((b) => b.group), label: null }, y: percent(),
    marks: [
      Plot.barY(bars, { x: "group", y: "mean", fill: (b) => COLOUR[b.figure], fillOpacity: 0.8, insetLeft: 8, insetRight: 8 }),
      Plot.ruleX(bars.filter((b) => known(b.std)), { x: "group", y1: (b) => b.mean - b.std, y2: (b) => b.mean + b.std, stroke: "currentColor", strokeWidth: 2 }),
      Plot.tickY(bars.filter((b) => known(b.zero)), { x: "group", y: "zero", stroke: "currentColor", strokeDasharray: "4 3", strokeWidth: 2 }),
      Plot.text(bars, { x: "group", y: 0, dy: -10, text: (b) => text(b.mean, 1), fill: "var(--paper)", fontWeight: 600 }),
      Plot.ruleY([0]),
    ],
  }, ["group", "accuracy", "std", "at ratio 0"], bars.map((b) => [b.group, b.mean, b.std, b.zero]));

  const points = groups.flatMap((f) => h.ratios.map((r, i) => ({ ratio: r, figure: f, group: NAMES[f], mean: h.mean[f][i], std: h.std[f][i] || 0 })));
  chart("curve", {
    x: { label: "ratio of replaced channels", domain: [0, Math.max(...h.ratios, 0.1)] }, y: percent(),
    marks: [
      Plot.ruleX([h.ratios[at]], { stroke: "currentColor", strokeDasharray: "4 3" }),
      Plot.areaY(points, { x: "ratio", y1: (p) => p.mean - p.std, y2: (p) => p.mean + p.std, z: "figure", fill: (p) => COLOUR[p.figure], fillOpacity: 0.15 }),
      Plot.lineY(points, { x: "ratio", y: "mean", z: "figure", stroke: (p) => COLOUR[p.figure], strokeWidth: 2 }),
      Plot.dot(points, { x: "ratio", y: "mean", fill: (p) => COLOUR[p.figure], symbol: (p) => ({ all: "circle", head: "square", medium: "diamond", tail: "triangle" })[p.group], r: 3.5, tip: true, title: (p) => `${p.group} at ${p.ratio}: ${text(p.mean)}` }),
    ],
    symbol: { type: "identity" },
  }, ["ratio", ...groups.map((f) => NAMES[f])], h.ratios.map((r, i) => [String(r), ...groups.map((f) => h.mean[f][i])]));
  legend("curve", groups.map((f) => [NAMES[f], COLOUR[f]]));

  const each = h.classes.map((c, i) => ({ ...c, i, accuracy: h.accuracy[at][i], zero: zero < 0 ? null : h.accuracy[zero][i] }));
  const labels = each.length <= 20, steep = $("bars").clientWidth < 500;
  chart("bars", {
    most: 1100, height: labels ? 360 : 300, marginBottom: labels ? (steep ? 128 : 100) : 46, y: percent(), className: "bars",
    x: { type: "band", label: labels ? null : "class, in descending order of training images", tickRotate: labels ? (steep ? -70 : -35) : 0, tickFormat: labels ? (i) => `${short(each[i].name, 12)} (${each[i].count})` : () => "", tickSize: labels ? 4 : 0 },
    marks: [
      Plot.barY(each, { x: "i", y: "accuracy", fill: (c) => COLOUR[c.group] || "currentColor", fillOpacity: 0.8, tip: true, title: (c) => `${c.name}: ${text(c.accuracy)}\n${c.count} training images, ${c.group}` }),
      Plot.tickY(each.filter((c) => known(c.zero)), { x: "i", y: "zero", stroke: "currentColor", strokeDasharray: "4 3", strokeWidth: 2 }),
      Plot.ruleY([0]),
    ],
  }, ["class", "training images", "group", "accuracy", "at ratio 0"], each.map((c) => [c.name, text(c.count, 0), c.group, c.accuracy, c.zero]));
  groupLegend("bars", each);

  $("ratio").setAttribute("aria-valuetext", `ratio ${h.ratios[at]}`);
  $("ratio-value").textContent = h.ratios[at];
  const apart = FIGURES.filter((f) => h.difference[f][at]).map((f) => {
    const d = h.difference[f][at];
    return `${NAMES[f]} ${signed(d.mean)}` + (known(d.low) ? ` [${signed(d.low)}, ${signed(d.high)}], ${d.verdict || "no verdict"}` : "");
  });
  $("ratio-text").textContent = `${state.host} at ratio ${h.ratios[at]}: ` + bars.map((b) => `${b.group} ${text(b.mean, 1)}`).join(", ") + "." +
    (apart.length ? ` Difference from ratio 0, paired by seed, in percentage points, with the 95 % interval: ${apart.join("; ")}.` : "");
}

/** Other donors and channels at this ratio, compared with donor instance, random channels. Some pages have none. */
function drawVariants() {
  if (!$("variants-text")) return;
  const h = hosts[state.host], ratio = h.ratios[state.at], others = h.variants.filter((v) => v.at === state.at);
  $("variants-text").textContent = others.length
    ? `${state.host} at ratio ${ratio}: other donors, and other channels (first, middle or last instead of random; shuffled: from several donors; mixup: all channels, averaged with weight ratio), compared with donor instance, random channels, paired by seed.`
    : h.variants.length ? `For ${state.host} at ratio ${ratio} there is nothing to compare; move the slider.` : `${state.host} was trained with one donor and random channels only.`;
  for (const [id, figure] of [["variants-top1", "top1"], ["variants-tail", "tail"]]) {
    const lines = others.filter((v) => v.difference[figure]).map((v) => ({ name: v.name, ...v.difference[figure] }));
    if (!lines.length) { for (const place of [id, `${id}-table`]) $(place).replaceChildren(); continue; }
    const apart = (v) => v.verdict === "higher" || v.verdict === "lower";
    chart(id, {
      height: 70 + 26 * lines.length, marginLeft: 120, marginBottom: 46, x: { label: "difference in percentage points", grid: true }, y: { type: "band", domain: lines.map((v) => v.name), label: null, tickSize: 0 },
      marks: [
        Plot.ruleX([0], { stroke: "currentColor" }),
        Plot.ruleY(lines.filter((v) => known(v.low)), { y: "name", x1: "low", x2: "high", stroke: "var(--head)", strokeWidth: 2 }),
        Plot.dot(lines, { y: "name", x: "mean", r: 4.5, stroke: "var(--head)", strokeWidth: 2, fill: (v) => (apart(v) ? "var(--head)" : "var(--paper)"), tip: true, title: (v) => `${v.name}: ${signed(v.mean)}` + (known(v.low) ? ` [${signed(v.low)}, ${signed(v.high)}]` : "") + `, ${v.verdict}` }),
      ],
    }, ["donor, channels", "difference", "95 % interval", "verdict", NAMES[figure], "std"], others.map((v) => {
      const d = v.difference[figure];
      return [v.name, d ? signed(d.mean) : "–", d && known(d.low) ? `${signed(d.low)} to ${signed(d.high)}` : "–", d ? d.verdict || "no verdict" : "–", v.mean[figure], v.std[figure]];
    }));
  }
}

function drawCounts() {
  const h = hosts[state.host];
  const kinds = present(h).map((key) => [rows[key], h.rows[key]]);
  const points = kinds.flatMap(([name, row]) => h.classes.map((c, i) => ({ ...c, row: name, accuracy: row.accuracy[i] })));
  const [least, largest] = d3.extent(h.classes, (c) => c.count), ticks = d3.range(7).flatMap((p) => [1, 2, 5].map((d) => d * 10 ** p)).filter((t) => t >= least && t <= largest);
  chart("counts", {
    most: 1100, x: { type: "log", label: "training images of the class", grid: true, reverse: true, ticks, tickFormat: (n) => n.toLocaleString("en") }, y: percent(),
    color: { domain: Object.keys(ROW_COLOUR), range: Object.values(ROW_COLOUR), legend: false }, symbol: { domain: Object.keys(ROW_COLOUR), range: ["circle", "square", "triangle"] },
    marks: [
      Plot.line(points, { x: "count", y: "accuracy", z: "row", stroke: "row", strokeOpacity: h.classes.length > 30 ? 0 : 0.7 }),
      Plot.dot(points, { x: "count", y: "accuracy", stroke: "row", fill: "row", symbol: "row", r: 4, tip: true, title: (p) => `${p.name} (${p.count}), ${p.row}: ${text(p.accuracy)}` }),
    ],
  }, ["class", "training images", ...kinds.map(([n]) => n)], h.classes.map((c, i) => [c.name, text(c.count, 0), ...kinds.map(([, row]) => row.accuracy[i])]));
  legend("counts", kinds.map(([n]) => [n, ROW_COLOUR[n]]));
}

/** Names the classes that change most, on pages with too many classes to draw each. */
function drawChanged() {
  if (!$("changed-text")) return;
  const classes = hosts[state.host].changed || [];
  $("changed-text").textContent = classes.length ? `${state.host}: the classes that gain most, then those that lose most, at the ratio in the table of results.` : `${state.host}: no class changes, or the host was not trained both with and without H2T.`;
  $("changed-table").replaceChildren();
  if (classes.length) table("changed", ["class", "training images", "group", "without H2T", "with H2T", "difference"], classes.map((c) => [c.name, text(c.count, 0), c.group, c.without, c.with, signed(c.with - c.without)]));
}

function legend(id, entries) {
  const figure = $(id).parentElement;
  const list = figure.querySelector(".legend") || figure.insertBefore(element("ul", null, { class: "legend" }), $(id));
  list.replaceChildren(...entries.map(([name, colour]) => element("li", name, { style: `--of: ${colour}` })));
}

function drawConfusion() {
  const h = hosts[state.host], counts = h.rows[state.row].confusion, classes = h.classes, many = classes.length > 20;
  const cells = counts.flatMap((line, t) => {
    const total = line.reduce((a, b) => a + b, 0);
    return line.map((n, p) => ({ t, p, n, share: total ? n / total : 0, wrong: classes[t].group === "tail" && classes[p].group === "head" && n > 0 }));
  });
  const worth = cells.filter((c) => c.share >= 0.01).sort((a, b) => b.share - a.share);
  const told = worth.slice(0, LINES).sort((a, b) => a.t - b.t || a.p - b.p);
  const width = Math.min($("confusion").clientWidth || 500, 560);
  const tick = (i) => (many ? "" : short(classes[i].name, 10));
  chart("confusion", {
    width, height: width, marginLeft: many ? 30 : 80, marginBottom: many ? 30 : 72, padding: 0,
    x: { type: "band", label: "predicted", tickFormat: tick, tickRotate: many ? 0 : -45, tickSize: 0 }, y: { type: "band", label: "true", tickFormat: tick, tickSize: 0 }, opacity: { domain: [0, 1], range: [0, 1] },
    marks: [
      Plot.cell(cells.filter((c) => c.n), { x: "p", y: "t", fill: (c) => (c.wrong ? "var(--tail)" : "var(--head)"), fillOpacity: "share", tip: true, title: (c) => `${classes[c.t].name} predicted as ${classes[c.p].name}: ${text(100 * c.share, 1)} %` }),
      Plot.cell(cells.filter((c) => c.wrong), { x: "p", y: "t", stroke: "var(--tail)", strokeWidth: many ? 0.5 : 1.5, inset: 1, fill: "none" }),
      many ? null : Plot.text(cells.filter((c) => c.share >= 0.005), { x: "p", y: "t", text: (c) => text(100 * c.share, 0), fontSize: 11, fill: (c) => (c.share > 0.55 ? "var(--paper)" : "var(--ink)") }),
      Plot.frame({ stroke: "var(--line)" }),
    ],
  }, ["true", "predicted", "share (%)"], [...told.map((c) => [classes[c.t].name, classes[c.p].name, 100 * c.share]), ...(told.length < worth.length ? [["others", `${worth.length - told.length} smaller shares`, "–"]] : [])]);
  const taken = {};
  for (const c of cells) if (classes[c.t].group === "tail") taken[c.p] = (taken[c.p] || 0) + c.n;
  const total = Object.values(taken).reduce((a, b) => a + b, 0);
  const bars = Object.entries(taken).map(([p, n]) => ({ ...classes[p], i: +p, share: (100 * n) / total }));
  chart("tail", {
    height: 340, marginBottom: many ? 46 : 84, y: { label: "tail samples (%)", grid: true }, x: { type: "band", label: many ? "predicted class, in descending order of training images" : null, tickRotate: many ? 0 : -35, tickFormat: many ? () => "" : (i) => short(classes[i].name, 12), tickSize: 0 },
    marks: [Plot.barY(bars, { x: "i", y: "share", fill: (b) => COLOUR[b.group] || "currentColor", tip: true, title: (b) => `${b.name} (${b.group}): ${text(b.share, 1)} %` }), Plot.ruleY([0])],
  }, ["predicted", "group", "tail samples (%)"], bars.map((b) => [b.name, b.group, b.share]));
  groupLegend("tail", bars);
  const share = (from, to) => {
    const of = cells.filter((c) => classes[c.t].group === from), all = d3.sum(of, (c) => c.n);
    return all ? `${text((100 * d3.sum(of.filter((c) => classes[c.p].group === to), (c) => c.n)) / all, 1)} % of ${from} samples are predicted as ${to} classes` : null;
  };
  const parts = [share("tail", "head"), share("head", "tail")].filter(known);
  $("confusion-text").textContent = parts.length ? `${rows[state.row]}: ${parts.join("; ")}.` : "There are no tail classes or no head classes.";
}

function drawCalibration() {
  const h = hosts[state.host];
  const kinds = present(h).map((key) => [rows[key], h.rows[key]]);
  const scales = { color: { domain: Object.keys(ROW_COLOUR), range: Object.values(ROW_COLOUR) }, symbol: { domain: Object.keys(ROW_COLOUR), range: ["circle", "square", "triangle"] } };
  const bins = kinds.flatMap(([row, r]) => r.reliability.map((b) => ({ ...b, row })));
  chart("reliability", {
    ...scales, height: 340, x: { domain: [0, 100], label: "confidence (%)", grid: true }, y: percent("accuracy (%)"), r: { range: [2, 8] },
    marks: [
      Plot.line([[0, 0], [100, 100]], { stroke: "currentColor", strokeDasharray: "4 3" }),
      Plot.line(bins, { x: "confidence", y: "accuracy", z: "row", stroke: "row" }),
      Plot.dot(bins, { x: "confidence", y: "accuracy", fill: "row", symbol: "row", r: "count", tip: true, title: (b) => `${b.row}: confidence ${text(b.confidence, 1)} %, accuracy ${text(b.accuracy, 1)} %, ${b.count} ${b.count === 1 ? "sample" : "samples"}` }),
    ],
  }, ["classifier", "confidence", "accuracy", "samples"], bins.map((b) => [b.row, b.confidence, b.accuracy, String(b.count)]));
  legend("reliability", kinds.map(([n]) => [n, ROW_COLOUR[n]]));
  const norms = kinds.filter(([, r]) => r.norms).flatMap(([row, r]) => r.norms.map((norm, i) => ({ row, i, norm, name: h.classes[i].name })));
  chart("norms", {
    ...scales, height: 340, x: { label: "class, in descending order of training images", ticks: [] }, y: { label: "L2 norm", grid: true, zero: true },
    marks: [Plot.line(norms, { x: "i", y: "norm", z: "row", stroke: "row" }), Plot.dot(norms, { x: "i", y: "norm", fill: "row", symbol: "row", r: 3, tip: true, title: (n) => `${n.name}, ${n.row}: ${text(n.norm, 3)}` })],
  }, ["class", ...kinds.map(([n]) => n)], h.classes.map((c, i) => [c.name, ...kinds.map(([, r]) => (r.norms ? r.norms[i] : null))]));
  legend("norms", kinds.map(([n]) => [n, ROW_COLOUR[n]]));
}

/** For each cell of a grid over the embedding, the class predicted for most of the nearest samples. */
function regions(e, guesses) {
  const [x0, x1] = d3.extent(e.x), [y0, y1] = d3.extent(e.y), labels = [];
  for (let row = 0; row < CELLS; row++) for (let column = 0; column < CELLS; column++) {
    const x = x0 + ((x1 - x0) * (column + 0.5)) / CELLS, y = y1 - ((y1 - y0) * (row + 0.5)) / CELLS;
    const near = [], votes = {};
    for (let i = 0; i < e.x.length; i++) {
      const d = (e.x[i] - x) ** 2 + (e.y[i] - y) ** 2;
      if (near.length < NEIGHBOURS || d < near[near.length - 1][0]) {
        near.push([d, guesses[i]]); near.sort((a, b) => a[0] - b[0]); near.length = Math.min(near.length, NEIGHBOURS);
      }
    }
    for (const [, label] of near) votes[label] = (votes[label] || 0) + 1;
    labels.push(+near.reduce((best, [, label]) => (votes[label] > votes[best] ? label : best), near[0][1]));
  }
  return labels;
}

function drawEmbedding() {
  const e = hosts[state.host].embedding, labels = [...new Set(e.label)].sort((a, b) => a - b);
  const shown = state.pair ? state.pair.split(",").map(Number) : labels;
  const colour = (label) => (labels.includes(label) ? CLASS_COLOURS[labels.indexOf(label) % CLASS_COLOURS.length] : "#808080");
  const others = ["without_h2t", "with_h2t"].some((row) => e[row].some((l) => known(l) && !labels.includes(l)));
  $("embedding-legend").replaceChildren(
    ...shown.map((l) => element("li", e.names[l], { style: `--of: ${colour(l)}` })),
    ...(others && !state.pair ? [element("li", "a class that is not shown", { style: "--of: var(--line)" })] : []));
  for (const [id, row] of [["without", "without_h2t"], ["with", "with_h2t"]]) {
    const guesses = e[row], there = guesses.length > 0 && guesses.every(known);
    if (!there) {
      $(id).replaceChildren(element("p", guesses.length ? "This host has no such classifier." : "Too few samples to embed.", { class: "quiet" }));
      $(`${id}-table`).replaceChildren();
      continue;
    }
    const key = `regions_${row}`;
    e[key] = e[key] || regions(e, guesses);
    const points = e.label.map((label, i) => ({ label, guess: guesses[i], x: e.x[i], y: e.y[i], right: guesses[i] === label })).filter((p) => shown.includes(p.label));
    const [x0, x1] = d3.extent(e.x), [y0, y1] = d3.extent(e.y), width = Math.min($(id).clientWidth || 500, 560);
    chart(id, {
      width, height: width * 0.85, margin: 8, marginLeft: 8, marginBottom: 8, axis: null, x: { domain: [x0, x1] }, y: { domain: [y0, y1] }, color: { domain: labels, range: labels.map(colour), unknown: "transparent" },
      marks: [
        Plot.raster(e[key].map((l) => (shown.includes(l) ? l : null)), { fill: Plot.identity, width: CELLS, height: CELLS, x1: x0, x2: x1, y1: y1, y2: y0, fillOpacity: 0.3, imageRendering: "pixelated" }),
        Plot.dot(points.filter((p) => p.right), { x: "x", y: "y", r: 2.5, fill: "label", tip: true, title: (p) => e.names[p.label] }),
        Plot.dot(points.filter((p) => !p.right), { x: "x", y: "y", r: 4, symbol: "times", stroke: "label", strokeWidth: 2, tip: true, title: (p) => `${e.names[p.label]}, predicted as ${e.names[p.guess]}` }),
        Plot.frame({ stroke: "var(--line)" }),
      ],
    }, ["class", "samples shown", "correct", "regions (% of the figure)"], labels.map((l) => [
      e.names[l], String(e.label.filter((x) => x === l).length), String(e.label.filter((x, i) => x === l && guesses[i] === l).length), (100 * e[key].filter((x) => x === l).length) / e[key].length]));
  }
}

function choosePairs() {
  const h = hosts[state.host], e = h.embedding, from = h.rows.without_h2t || h.rows.stage1, labels = [...new Set(e.label)].sort((a, b) => a - b);
  const head = labels.filter((l) => e.groups[l] === "head"), tail = labels.filter((l) => e.groups[l] === "tail");
  const whole = from.confusion.length === Math.max(...labels, 0) + 1 || labels.every((l) => l < from.confusion.length);
  const pairs = !whole || !head.length ? [] : tail.map((t) => [d3.greatest(head, (x) => from.confusion[t][x]), t]);
  $("pair").replaceChildren(element("option", "all classes", { value: "" }), ...pairs.map((p) => element("option", `${e.names[p[0]]} and ${e.names[p[1]]}`, { value: p.join(",") })));
  state.pair = "";
}

function drawHost() {
  const h = hosts[state.host];
  $("ratio").max = Math.max(0, h.ratios.length - 1);
  $("ratio").disabled = h.ratios.length < 2;
  state.at = Math.max(0, h.ratios.indexOf(h.reported));
  $("ratio").value = state.at;
  const kept = present(h);
  if (!kept.includes(state.row)) state.row = kept[kept.length - 1];
  $("row").replaceChildren(...kept.map((k) => element("option", rows[k], { value: k, ...(k === state.row ? { selected: "" } : {}) })));
  choosePairs();
  drawAll();
}

function drawAll() { drawRatio(); drawVariants(); drawCounts(); drawChanged(); drawConfusion(); drawCalibration(); drawEmbedding(); }

function sortable(made) {
  made.querySelectorAll("thead button").forEach((button, column) => button.addEventListener("click", () => {
    const head = button.parentElement, down = head.getAttribute("aria-sort") !== "descending";
    const value = (line) => { const c = line.cells[column], v = c.dataset.value; return v === undefined ? c.textContent : v === "" ? null : +v; };
    const order = [...made.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === null || y === null) return (x === null) - (y === null);
      return (down ? -1 : 1) * d3.ascending(x, y);
    });
    made.querySelectorAll("th[aria-sort]").forEach((h) => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    made.tBodies[0].append(...order);
    $("sorted").textContent = `Sorted by ${button.textContent}, ${down ? "largest" : "smallest"} first.`;
  }));
}

$("host").addEventListener("change", (event) => { state.host = event.target.value; drawHost(); });
$("ratio").addEventListener("input", (event) => { state.at = +event.target.value; drawRatio(); drawVariants(); });
$("row").addEventListener("change", (event) => { state.row = event.target.value; drawConfusion(); });
$("pair").addEventListener("change", (event) => { state.pair = event.target.value; drawEmbedding(); });
let wide = document.documentElement.clientWidth;
window.addEventListener("resize", () => {
  if (document.documentElement.clientWidth === wide) return;
  wide = document.documentElement.clientWidth;
  drawAll();
});
sortable($("hosts"));
drawHost();
