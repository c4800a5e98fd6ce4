"use strict";
// Accuracy against the ratio: every method, then one method at one ratio, and its other donors and channels.

/** A picture for each method, on the same axes: what each ratio changes, compared with ratio 0. */
function drawMultiples() {
  const names = Object.keys(hosts).filter((name) => hosts[name].ratios.length), place = $("multiples");
  const gap = 16, columns = Math.max(1, Math.min(names.length, Math.floor((place.clientWidth + gap) / (272 + gap)))); // as in page.css
  const width = Math.floor((place.clientWidth - gap * (columns - 1)) / columns);
  const used = FIGURES.filter((f) => names.some((name) => hosts[name].mean[f].some(known)));
  const changes = Object.fromEntries(names.map((name) => [name, used.flatMap((f) => changesOf(hosts[name], f))]));
  const all = Object.values(changes).flat(), most = Math.max(0.1, ...all.map((c) => c.ratio));
  const domain = d3.nice(Math.min(-1, ...all.map((c) => c.low)), Math.max(1, ...all.map((c) => c.high)), 5);
  place.replaceChildren(...names.map((name) => {
    const h = hosts[name], cell = element("div", null, { class: "multiple" }), points = changes[name];
    cell.append(element("p", name, { class: "name" }));
    if (!points.length) {
      cell.append(element("p", "not trained at ratio 0 and another one", { class: "quiet under" }));
      return cell;
    }
    cell.append(plotted({ clientWidth: width }, {
      height: 220, marginLeft: 42, marginBottom: 36, marginTop: 12,
      x: { label: "ratio", domain: [0, most], ticks: 5 }, y: { label: null, domain, grid: true, ticks: 5, tickFormat: (v) => (v ? d3.format("+~r")(v) : "0") }, symbol: { type: "identity" },
      marks: [
        Plot.ruleY([0]),
        Plot.ruleX(known(h.reported) ? [h.reported] : [], { stroke: "currentColor", strokeDasharray: "4 3" }),
        Plot.areaY(points, { x: "ratio", y1: "low", y2: "high", z: "figure", fill: (c) => COLOUR[c.figure], fillOpacity: 0.15 }),
        ...used.map((f) => Plot.lineY(points.filter((c) => c.figure === f), { x: "ratio", y: "mean", stroke: COLOUR[f], strokeWidth: f === "top1" ? 2.5 : 1.5, strokeDasharray: DASH[f] })),
        Plot.dot(points, { x: "ratio", y: "mean", fill: (c) => COLOUR[c.figure], symbol: (c) => SHAPE[c.figure], r: 3, tip: true, title: (c) => `${name}, ${NAMES[c.figure]} at ratio ${c.ratio}: ${text(c.level)}${c.ratio ? `, ${c.said}` : ""}` }),
      ],
    }));
    return cell;
  }));
  table("multiples", ["method", "ratio", ...used.flatMap((f) => [NAMES[f], "change"])], names.flatMap((name) => hosts[name].ratios.map((r, i) => [
    name, String(r), ...used.flatMap((f) => [hosts[name].mean[f][i], hosts[name].difference[f][i] ? interval(hosts[name].difference[f][i]) : "–"]),
  ])));
  legend("multiples", used.map((f) => [f === "top1" ? "all test images" : `${f} classes`, COLOUR[f], SHAPE[f]]));
}

/** What each ratio changes in one figure of a method: 0 at ratio 0, and nothing if no other ratio was compared with it. */
function changesOf(h, figure) {
  const compared = h.ratios.flatMap((ratio, i) => {
    const d = h.difference[figure][i];
    return d ? [{ ratio, figure, level: h.mean[figure][i], mean: d.mean, low: d.low ?? d.mean, high: d.high ?? d.mean, said: interval(d) }] : [];
  });
  const start = { ratio: 0, figure, level: h.mean[figure][h.ratios.indexOf(0)], mean: 0, low: 0, high: 0 };
  return compared.length ? [start, ...compared] : [];
}

function drawRatio() {
  const h = hosts[state.host], at = state.at, zero = h.ratios.indexOf(0);
  if (!h.ratios.length) {
    $("ratio-text").textContent = `${state.host} was not trained with donor instance and random channels.`;
    noChart("groups");
    noChart("bars");
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

  const each = h.classes.map((c, i) => ({ ...c, i, accuracy: h.accuracy[at][i], zero: zero < 0 ? null : h.accuracy[zero][i] }));
  const labels = each.length <= 20, steep = $("bars").clientWidth < 500;
  const label = (i) => `${short(each[i].name, 12)} (${each[i].count})`;
  chart("bars", {
    most: 1100, height: labels ? 360 : 300, marginLeft: labels && !steep ? reach(each.map((_, i) => label(i))) : 44, marginBottom: labels ? (steep ? 128 : 100) : 46, y: percent(), className: "bars",
    x: { type: "band", label: labels ? null : "class, in descending order of training images", tickRotate: labels ? (steep ? -70 : -35) : 0, tickFormat: labels ? label : () => "", tickSize: labels ? 4 : 0 },
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
    return `${NAMES[f]} ${interval(d)}` + (known(d.low) ? `, ${d.verdict || "no verdict"}` : "");
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
    if (!lines.length) { noChart(id); continue; }
    const apart = (v) => v.verdict === "higher" || v.verdict === "lower";
    chart(id, {
      height: 70 + 26 * lines.length, marginLeft: 120, marginBottom: 46, x: { label: "difference in percentage points", grid: true }, y: { type: "band", domain: lines.map((v) => v.name), label: null, tickSize: 0 },
      marks: [
        Plot.ruleX([0], { stroke: "currentColor" }),
        Plot.ruleY(lines.filter((v) => known(v.low)), { y: "name", x1: "low", x2: "high", stroke: "currentColor", strokeWidth: 2 }),
        Plot.dot(lines, { y: "name", x: "mean", r: 4.5, stroke: "currentColor", strokeWidth: 2, fill: (v) => (apart(v) ? "currentColor" : "var(--paper)"), tip: true, title: (v) => `${v.name}: ${interval(v)}, ${v.verdict}` }),
      ],
    }, ["donor, channels", "difference", "95 % interval", "verdict", NAMES[figure], "std"], others.map((v) => {
      const d = v.difference[figure];
      return [v.name, d ? signed(d.mean) : "–", d && known(d.low) ? `${signed(d.low)} to ${signed(d.high)}` : "–", d ? d.verdict || "no verdict" : "–", v.mean[figure], v.std[figure]];
    }));
  }
}
