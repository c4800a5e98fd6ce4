"use strict";
// The first screen: another figure to rank by, and the command to copy.

function drawRank() {
  const answer = answers[state.rank], lines = $("methods").tBodies[0];
  if (!answer) return;
  const [best, ...rest] = answer.best;
  $("best").replaceChildren(element("strong", best), ` ${rest.join(" ")}`);
  if ($("command")) $("command").replaceChildren(...answer.command.split(" ").flatMap((word, i) => [i ? " " : "", element("span", word)]));
  const all = [...lines.rows], place = (line) => answer.order.indexOf(line.dataset.host);
  const ranked = d3.sort(all.filter((line) => place(line) >= 0), place), others = all.filter((line) => place(line) < 0);
  for (const line of [...ranked, ...others]) {
    const at = answer.places[line.dataset.host], tied = answer.ties.length > 0 && at === 1;
    line.cells[0].textContent = at ? at + (tied ? "=" : "") : "–";
  }
  lines.append(...ranked, ...others);
}

function startFirstScreen() {
  if ($("rank")) {
    $("rank").value = state.rank;
    $("rank").addEventListener("change", (event) => { state.rank = event.target.value; drawRank(); writeAddress(); });
  }
  drawRank();
  if ($("copy")) $("copy").addEventListener("click", async () => {
    const selection = getSelection(), range = document.createRange();
    range.selectNodeContents($("command"));
    selection.removeAllRanges();
    selection.addRange(range); // the command is marked, should the browser refuse the clipboard
    try { await navigator.clipboard.writeText($("command").textContent); } catch { document.execCommand("copy"); }
    $("copy").textContent = "Copied";
  });
}
