"use strict";
// Accuracy against confidence, and the norms of the weights.

function drawCalibration() {
  const h = hosts[state.host];
  const kinds = present(h).map((key) => [rows[key], h.rows[key]]);
  const scales = { color: { domain: Object.keys(ROW_COLOUR), range: Object.values(ROW_COLOUR) }, symbol: { domain: Object.keys(ROW_COLOUR), range: Object.values(ROW_SHAPE) } };
  const bins = kinds.flatMap(([row, r]) => r.reliability.map((b) => ({ ...b, row })));
  chart("reliability", {
    ...scales, height: 340, x: { domain: [0, 100], label: "confidence (%)", grid: true }, y: percent("accuracy (%)"), r: { range: [2, 8] },
    marks: [
      Plot.line([[0, 0], [100, 100]], { stroke: "currentColor", strokeDasharray: "4 3" }),
      Plot.line(bins, { x: "confidence", y: "accuracy", z: "row", stroke: "row" }),
      Plot.dot(bins, { x: "confidence", y: "accuracy", fill: "row", symbol: "row", r: "count", tip: true, title: (b) => `${b.row}: confidence ${text(b.confidence, 1)} %, accuracy ${text(b.accuracy, 1)} %, ${b.count} ${b.count === 1 ? "sample" : "samples"}` }),
    ],
  }, ["classifier", "confidence", "accuracy", "samples"], bins.map((b) => [b.row, b.confidence, b.accuracy, String(b.count)]));
  rowLegend("reliability", kinds.map(([n]) => n));
  const norms = kinds.filter(([, r]) => r.norms).flatMap(([row, r]) => r.norms.map((norm, i) => ({ row, i, norm, name: h.classes[i].name })));
  chart("norms", {
    ...scales, height: 340, x: { label: "class, in descending order of training images", ticks: [] }, y: { label: "L2 norm", grid: true, zero: true },
    marks: [Plot.line(norms, { x: "i", y: "norm", z: "row", stroke: "row" }), Plot.dot(norms, { x: "i", y: "norm", fill: "row", symbol: "row", r: 3, tip: true, title: (n) => `${n.name}, ${n.row}: ${text(n.norm, 3)}` })],
  }, ["class", ...kinds.map(([n]) => n)], h.classes.map((c, i) => [c.name, ...kinds.map(([, r]) => (r.norms ? r.norms[i] : null))]));
  rowLegend("norms", kinds.map(([n]) => n));
}
