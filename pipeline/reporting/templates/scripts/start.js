"use strict";
// Connects the controls with what they change, and draws everything once.

function drawHost() {
  const h = hosts[state.host], kept = present(h);
  $("host").value = state.host;
  $("ratio").max = Math.max(0, h.ratios.length - 1);
  $("ratio").disabled = h.ratios.length < 2;
  $("ratio").value = state.at;
  if (!kept.includes(state.row)) state.row = kept[kept.length - 1];
  $("row").replaceChildren(...kept.map((k) => element("option", rows[k], { value: k, ...(k === state.row ? { selected: "" } : {}) })));
  choosePairs();
  drawMethod();
}

function drawMethod() { drawRatio(); drawVariants(); drawCounts(); drawChanged(); drawTail(); drawConfusion(); drawEmbedding(); drawCalibration(); }
function drawAll() { drawMultiples(); drawMethod(); }

/** Sorts the methods by their better classifier of stage II; the rows of a method stay together. */
function sortable(made) {
  made.querySelectorAll("thead button").forEach((button) => button.addEventListener("click", () => {
    const head = button.parentElement, figure = button.dataset.figure, column = head.cellIndex;
    const down = head.getAttribute("aria-sort") !== (figure ? "descending" : "ascending") ? Boolean(figure) : !figure;
    const better = figure === "ece" ? d3.min : d3.max;
    const value = (body) => figure ? better([...body.querySelectorAll("tr.without_h2t, tr.with_h2t")], (line) => (line.cells[column].dataset.value === "" ? undefined : +line.cells[column].dataset.value)) : body.dataset.host;
    const order = [...made.tBodies].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      return known(x) && known(y) ? (down ? -1 : 1) * d3.ascending(x, y) : known(y) - known(x);
    });
    made.querySelectorAll("th[aria-sort]").forEach((h) => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    made.append(...order);
    $("sorted").textContent = `Sorted by ${figure ? button.textContent : "name"}, ${down ? "largest" : "smallest"} first.`;
  }));
}

/** Shows a section without losing what the address keeps. */
function show(id) {
  const target = $(id);
  if (!target) return;
  target.scrollIntoView();
  target.setAttribute("tabindex", "-1");
  target.focus({ preventScroll: true });
}

const section = readAddress();
const change = (id, event, apply) => $(id).addEventListener(event, (e) => { apply(e.target.value); writeAddress(); });
change("host", "change", (value) => { state.host = value; state.at = reportedAt(hosts[value]); state.pair = ""; drawHost(); });
change("ratio", "input", (value) => { state.at = +value; drawRatio(); drawVariants(); });
change("row", "change", (value) => { state.row = value; drawConfusion(); });
change("pair", "change", (value) => { state.pair = value; drawEmbedding(); });
document.querySelectorAll('nav a, .skip, a[href="#statistics"]').forEach((link) => link.addEventListener("click", (event) => {
  event.preventDefault();
  const id = link.getAttribute("href").slice(1);
  writeAddress(id);
  show(id);
}));
window.addEventListener("hashchange", () => { const at = readAddress(); startOver(); if (at) show(at); });
function startOver() { if ($("rank")) $("rank").value = state.rank; drawRank(); drawHost(); }
let wide = document.documentElement.clientWidth;
window.addEventListener("resize", () => {
  if (document.documentElement.clientWidth === wide) return;
  wide = document.documentElement.clientWidth;
  drawAll();
});
// Regions of the embedding are images in the page's colours.
for (const media of ["(prefers-color-scheme: dark)", "print"]) matchMedia(media).addEventListener("change", drawEmbedding);
window.addEventListener("beforeprint", () => document.querySelectorAll(".words").forEach((words) => { words.open = true; }));
sortable($("hosts"));
startFirstScreen();
drawMultiples();
drawHost();
if (section) show(section);
