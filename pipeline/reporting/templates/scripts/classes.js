"use strict";
// Accuracy of each class, and the classes that change most.

function drawCounts() {
  const h = hosts[state.host];
  const kinds = present(h).map((key) => [rows[key], h.rows[key]]);
  const points = kinds.flatMap(([name, row]) => h.classes.map((c, i) => ({ ...c, row: name, accuracy: row.accuracy[i] })));
  const [least, largest] = d3.extent(h.classes, (c) => c.count), ticks = d3.range(7).flatMap((p) => [1, 2, 5].map((d) => d * 10 ** p)).filter((t) => t >= least && t <= largest);
  chart("counts", {
    most: 1100, x: { type: "log", label: "training images of the class", grid: true, reverse: true, ticks, tickFormat: (n) => n.toLocaleString("en") }, y: percent(),
    color: { domain: Object.keys(ROW_COLOUR), range: Object.values(ROW_COLOUR), legend: false }, symbol: { domain: Object.keys(ROW_COLOUR), range: Object.values(ROW_SHAPE) },
    marks: [
      Plot.line(points, { x: "count", y: "accuracy", z: "row", stroke: "row", strokeOpacity: h.classes.length > 30 ? 0 : 0.7 }),
      Plot.dot(points, { x: "count", y: "accuracy", stroke: "row", fill: "row", symbol: "row", r: 4, tip: true, title: (p) => `${p.name} (${p.count}), ${p.row}: ${text(p.accuracy)}` }),
    ],
  }, ["class", "training images", ...kinds.map(([n]) => n)], h.classes.map((c, i) => [c.name, text(c.count, 0), ...kinds.map(([, row]) => row.accuracy[i])]));
  rowLegend("counts", kinds.map(([n]) => n));
}

/** Names the classes that change most, on pages with too many classes to draw each. */
function drawChanged() {
  if (!$("changed-text")) return;
  const classes = hosts[state.host].changed || [];
  $("changed-text").textContent = classes.length ? `${state.host}: the classes that gain most, then those that lose most, at the ratio in the table of results.` : `${state.host}: no class changes, or the host was not trained both with and without H2T.`;
  $("changed-table").replaceChildren();
  if (classes.length) table("changed", ["class", "training images", "group", "without H2T", "with H2T", "difference"], classes.map((c) => [c.name, text(c.count, 0), c.group, c.without, c.with, signed(c.with - c.without)]));
}
