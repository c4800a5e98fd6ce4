"use strict";
// What tail samples are taken for, without and with H2T side by side, and the confusion matrix.

/** The share of tail samples predicted as each class, in percent; empty without tail samples. */
function takenFor(h, row) {
  const taken = new Map();
  h.rows[row].confusion.forEach((line, t) => line.forEach((n, p) => {
    if (n && h.classes[t].group === "tail") taken.set(p, (taken.get(p) || 0) + n);
  }));
  const total = d3.sum(taken.values());
  return [...taken].sort(([a], [b]) => a - b).map(([p, n]) => ({ ...h.classes[p], i: p, share: (100 * n) / total }));
}

function drawTail() {
  const h = hosts[state.host], many = h.classes.length > 20;
  const sides = [["tail-without", "without_h2t"], ["tail-with", "with_h2t"]].map(([id, row]) => [id, h.rows[row] ? takenFor(h, row) : null]);
  const bars = sides.flatMap(([, found]) => found || []);
  const most = d3.max(bars, (b) => b.share) || 1, places = [...new Set(bars.map((b) => b.i))].sort((a, b) => a - b);
  const label = (i) => short(h.classes[i].name, 12);
  for (const [id, found] of sides) {
    if (!found) { noChart(id, "This method has no such classifier."); continue; }
    if (!found.length) { noChart(id, "There are no tail samples."); continue; }
    chart(id, {
      height: 320, marginLeft: many ? 44 : reach(places.map(label)), marginBottom: many ? 46 : 84, y: { label: "tail samples (%)", grid: true, domain: [0, most] },
      x: { type: "band", domain: places, label: many ? "predicted class, in descending order of training images" : null, tickRotate: many ? 0 : -35, tickFormat: many ? () => "" : label, tickSize: 0 },
      marks: [
        Plot.barY(found, { x: "i", y: "share", fill: (b) => COLOUR[b.group] || "currentColor", tip: true, title: (b) => `${b.name} (${b.group}): ${text(b.share, 1)} %` }),
        many ? null : Plot.text(found, { x: "i", y: "share", dy: -7, text: (b) => text(b.share, 0) }),
        Plot.ruleY([0]),
      ],
    }, ["predicted", "group", "tail samples (%)"], found.map((b) => [b.name, b.group, b.share]));
    groupLegend(id, found);
  }
  const share = (found, group) => d3.sum(found.filter((b) => b.group === group), (b) => b.share);
  const said = sides.filter(([, found]) => found && found.length).map(([id, found]) => `${id === "tail-with" ? "with" : "without"} H2T, ${text(share(found, "tail"), 1)} % are predicted as tail classes and ${text(share(found, "head"), 1)} % as head classes`);
  $("confusion-text").textContent = said.length ? `Tail samples in ${state.host}: ${said.join("; ")}.` : "There are no tail classes.";
}

function drawConfusion() {
  const h = hosts[state.host], counts = h.rows[state.row].confusion, classes = h.classes, many = classes.length > 20;
  const cells = counts.flatMap((line, t) => {
    const total = d3.sum(line);
    return line.map((n, p) => ({ t, p, n, share: total ? n / total : 0, wrong: classes[t].group === "tail" && classes[p].group === "head" && n > 0 }));
  });
  const worth = cells.filter((c) => c.share >= 0.01).sort((a, b) => b.share - a.share);
  const told = worth.slice(0, LINES).sort((a, b) => a.t - b.t || a.p - b.p);
  const width = Math.min($("confusion").clientWidth || 500, 620);
  const tick = (i) => (many ? "" : short(classes[i].name, 10));
  chart("confusion", {
    width, height: width, marginLeft: many ? 30 : 80, marginBottom: many ? 30 : 72, padding: 0,
    x: { type: "band", label: "predicted", tickFormat: tick, tickRotate: many ? 0 : -45, tickSize: 0 }, y: { type: "band", label: "true", tickFormat: tick, tickSize: 0 }, opacity: { domain: [0, 1], range: [0, 1] },
    marks: [
      Plot.cell(cells.filter((c) => c.n), { x: "p", y: "t", fill: "var(--ink)", fillOpacity: "share", tip: true, title: (c) => `${classes[c.t].name} predicted as ${classes[c.p].name}: ${text(100 * c.share, 1)} %` }),
      Plot.cell(cells.filter((c) => c.wrong), { x: "p", y: "t", stroke: "var(--tail)", strokeWidth: many ? 0.5 : 2, inset: 1, fill: "none" }),
      many ? null : Plot.text(cells.filter((c) => c.share >= 0.005), { x: "p", y: "t", text: (c) => text(100 * c.share, 0), fontSize: 11, fill: (c) => (c.share > 0.45 ? "var(--paper)" : "var(--ink)") }),
      Plot.frame({ stroke: "var(--line)" }),
    ],
  }, ["true", "predicted", "share (%)"], [...told.map((c) => [classes[c.t].name, classes[c.p].name, 100 * c.share]), ...(told.length < worth.length ? [["others", `${worth.length - told.length} smaller shares`, "–"]] : [])]);
}
