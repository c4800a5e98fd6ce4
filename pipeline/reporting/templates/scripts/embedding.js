"use strict";
// Test samples in the plane, and the regions of the predicted classes.
const CLASS_COLOURS = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#b2436f", "#999933", "#8468c9", "#7f7f7f"];
const CLASS_SHAPES = ["circle", "square", "triangle", "diamond", "star", "wye", "cross"];
const NEIGHBOURS = 5;
const CELLS = 90;

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

/** `colour` over the page's background, as if it had this opacity: an image knows no other way to show nothing. */
function washed(colour, opacity) {
  const over = d3.rgb(colour), under = d3.rgb(getComputedStyle(document.body).backgroundColor);
  return d3.interpolateRgb(under, over)(opacity);
}

function drawEmbedding() {
  const h = hosts[state.host], e = h.embedding, labels = [...new Set(e.label)].sort((a, b) => a - b);
  const shown = state.pair ? state.pair.split(",").map(Number) : labels;
  const place = (label) => labels.indexOf(label);
  const colour = (label) => (place(label) >= 0 ? CLASS_COLOURS[place(label) % CLASS_COLOURS.length] : "#808080");
  const shape = (label) => CLASS_SHAPES[place(label) % CLASS_SHAPES.length];
  for (const [id, row] of [["without", "without_h2t"], ["with", "with_h2t"]]) {
    const guesses = e[row], there = guesses.length > 0 && guesses.every(known);
    if (!there) {
      noChart(id, guesses.length ? "This method has no such classifier." : "Too few samples to embed.");
      continue;
    }
    const key = `regions_${row}`;
    e[key] = e[key] || regions(e, guesses);
    const points = e.label.map((label, i) => ({ label, guess: guesses[i], x: e.x[i], y: e.y[i], right: guesses[i] === label })).filter((p) => shown.includes(p.label));
    const middles = shown.map((label) => {
      const own = points.filter((p) => p.label === label);
      return { label, x: d3.median(own, (p) => p.x), y: d3.median(own, (p) => p.y) };
    }).filter((m) => known(m.x));
    const [x0, x1] = d3.extent(e.x), [y0, y1] = d3.extent(e.y), width = Math.min($(id).clientWidth || 500, 560);
    chart(id, {
      width, height: width * 0.85, margin: 8, marginLeft: 8, marginBottom: 8, axis: null, x: { domain: [x0, x1] }, y: { domain: [y0, y1] }, symbol: { type: "identity" },
      marks: [
        Plot.raster(e[key].map((l) => (shown.includes(l) ? washed(colour(l), 0.3) : washed("#808080", 0))), { fill: Plot.identity, width: CELLS, height: CELLS, x1: x0, x2: x1, y1: y1, y2: y0, imageRendering: "pixelated" }),
        Plot.dot(points.filter((p) => p.right), { x: "x", y: "y", r: 2.5, fill: (p) => colour(p.label), symbol: (p) => shape(p.label), tip: true, title: (p) => e.names[p.label] }),
        Plot.dot(points.filter((p) => !p.right), { x: "x", y: "y", r: 4, symbol: "times", stroke: (p) => colour(p.label), strokeWidth: 2, tip: true, title: (p) => `${e.names[p.label]}, predicted as ${e.names[p.guess]}` }),
        Plot.text(middles, { x: "x", y: "y", text: (m) => short(e.names[m.label], 12), fontSize: 13, fontWeight: 700, stroke: "var(--paper)", strokeWidth: 4, fill: "currentColor" }),
        Plot.frame({ stroke: "var(--line)" }),
      ],
    }, ["class", "samples shown", "correct", "regions (% of the figure)"], labels.map((l) => [
      e.names[l], String(e.label.filter((x) => x === l).length), String(e.label.filter((x, i) => x === l && guesses[i] === l).length), (100 * e[key].filter((x) => x === l).length) / e[key].length]));
    legend(id, shown.map((l) => [e.names[l], colour(l), shape(l)]));
  }
  const pair = h.pairs.find((p) => p.classes.join(",") === state.pair);
  $("pair-text").textContent = pair ? `${pairName(e, pair)}: confused with each other on average ${confused(pair)}, of ${counted(pair.samples, "test image")} of both classes.` : "";
}

const pairName = (e, pair) => pair.classes.map((c) => e.names[c]).join(" and ");
const confused = (pair) => ["without", "with"].filter((k) => known(pair[k])).map((k) => `${text(pair[k], 1).replace(/\.0$/, "")} times ${k} H2T`).join(", ");

/** Offers the pairs of classes that are confused most often. */
function choosePairs() {
  const { embedding: e, pairs } = hosts[state.host];
  $("pair").replaceChildren(element("option", "all classes", { value: "" }), ...pairs.map((p) => element("option", `${pairName(e, p)}: ${confused(p)}`, { value: p.classes.join(",") })));
  if (!pairs.some((p) => p.classes.join(",") === state.pair)) state.pair = "";
  $("pair").value = state.pair;
}
