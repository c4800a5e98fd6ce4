"use strict";
// What all scripts of the page share: its data, the state that the address keeps, and how a chart is drawn.
// Below every chart is a table of the same values.
const { hosts, rows, answers } = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const FIGURES = ["top1", "head", "medium", "tail"];
const NAMES = { top1: "all", head: "head", medium: "medium", tail: "tail" };
const GROUPS = ["head", "medium", "tail"];
const LINES = 300; // most rows in the table of the confusion matrix

// One meaning for one colour, and a shape or dash with it: docs/report.md.
const COLOUR = { top1: "var(--top1)", head: "var(--head)", medium: "var(--medium)", tail: "var(--tail)" };
const SHAPE = { top1: "circle", head: "square", medium: "diamond", tail: "triangle" };
const DASH = { top1: null, head: "6 3", medium: "2 3", tail: null };
const ROW_COLOUR = { "stage I": "var(--stage1)", "without H2T": "var(--without)", "with H2T": "var(--with)" };
const ROW_SHAPE = { "stage I": "circle", "without H2T": "square", "with H2T": "triangle" };

const known = (v) => v !== null && v !== undefined;
const text = (v, digits = 2) => (known(v) ? Number(v).toFixed(digits) : "–");
const short = (name, most) => (name.length > most ? `${name.slice(0, most - 1)}…` : name);
const signed = (v) => (v > 0 ? "+" : "") + text(v);
/** A difference and, where it has one, its interval. */
const interval = (d) => signed(d.mean) + (known(d.low) ? ` [${signed(d.low)}, ${signed(d.high)}]` : "");
const counted = (n, what) => `${n} ${what}${n === 1 ? "" : "s"}`;
const percent = (label = "test accuracy (%)") => ({ domain: [0, 100], grid: true, label });

/** Pixels that the first labels, leaning by 35 degrees, need to the left of a chart. */
const reach = (labels) => Math.max(44, 5.2 * Math.max(...labels.slice(0, 3).map((l) => l.length)));

/** What the reader chose. The address keeps it, so that a copied link shows the same. */
const state = { host: Object.keys(hosts)[0], at: 0, row: "with_h2t", pair: "", rank: Object.keys(answers)[0] || "top1" };

/** The state that the address names; what does not fit this page is left out. */
function readAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  if (asked.get("method") in hosts) state.host = asked.get("method");
  const h = hosts[state.host], ratio = h.ratios.indexOf(Number(asked.get("ratio")));
  state.at = asked.has("ratio") && ratio >= 0 ? ratio : reportedAt(h);
  if (asked.get("classifier") in rows) state.row = asked.get("classifier");
  if (asked.get("rank") in answers) state.rank = asked.get("rank");
  if (asked.has("pair")) state.pair = asked.get("pair");
  return asked.get("at");
}

/** Writes the state into the address; `at` names the section to show first. */
function writeAddress(at = null) {
  const h = hosts[state.host], said = new URLSearchParams({ method: state.host });
  if (h.ratios.length) said.set("ratio", h.ratios[state.at]);
  said.set("classifier", state.row);
  if (state.pair) said.set("pair", state.pair);
  said.set("rank", state.rank);
  if (at) said.set("at", at);
  history.replaceState(null, "", `#${said}`);
}

/** The place of the reported ratio among those of the method. */
const reportedAt = (h) => Math.max(0, h.ratios.indexOf(h.reported));

/** The rows of metrics.json that this method has, in the order of the table. */
const present = (h) => Object.keys(rows).filter((key) => h.rows[key]);

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

/** An SVG by Plot, as wide as `place` allows. */
function plotted(place, options) {
  const width = Math.max(260, Math.min(place.clientWidth || 640, options.most || 900));
  const all = { width, height: 300, marginLeft: 44, marginBottom: 46, ...options, style: { overflow: "visible" } };
  const drawn = Plot.plot({ ...all, x: { labelOffset: all.marginBottom - 6, ...options.x } });
  drawn.setAttribute("aria-hidden", "true");
  return drawn;
}

/** Puts a chart with these Plot options into #id, and the same values into the table #id-table. */
function chart(id, options, columns, lines) {
  $(id).replaceChildren(plotted($(id), options));
  table(id, columns, lines);
}

/** Empties the chart #id and its table; says why, if `reason` is given. */
function noChart(id, reason = null) {
  $(id).replaceChildren(...(reason ? [element("p", reason, { class: "quiet" })] : []));
  $(`${id}-table`).replaceChildren();
}

/** The legend of chart #id: [name, colour, shape] each. */
function legend(id, entries) {
  const figure = $(id).parentElement;
  const list = figure.querySelector(".legend") || figure.insertBefore(element("ul", null, { class: "legend" }), $(id));
  list.replaceChildren(...entries.map(([name, colour, shape]) => {
    const entry = element("li", name);
    entry.prepend(swatch(colour, shape));
    return entry;
  }));
}

/** A small picture of a colour and, with it, of a shape. */
function swatch(colour, shape) {
  const svg = d3.create("svg").attr("width", 14).attr("height", 14).attr("viewBox", "-7 -7 14 14").attr("aria-hidden", "true");
  if (shape) svg.append("path").attr("d", d3.symbol(SYMBOLS[shape], 60)()).attr("fill", colour);
  else svg.append("rect").attr("x", -6).attr("y", -6).attr("width", 12).attr("height", 12).attr("fill", colour);
  return svg.node();
}
const SYMBOLS = { circle: d3.symbolCircle, square: d3.symbolSquare, diamond: d3.symbolDiamond, triangle: d3.symbolTriangle, star: d3.symbolStar, wye: d3.symbolWye, cross: d3.symbolCross };

const groupLegend = (id, classes) => legend(id, GROUPS.filter((g) => classes.some((c) => c.group === g)).map((g) => [`${g} classes`, COLOUR[g]]));
const rowLegend = (id, names) => legend(id, names.map((n) => [n, ROW_COLOUR[n], ROW_SHAPE[n]]));
