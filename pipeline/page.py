"""The report as one self-contained page. Every string that comes from data is escaped."""

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --line: #ddd; --soft: #f5f5f5; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --paper: #161616; --line: #444; --soft: #222; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 70rem; margin: 0 auto; padding: 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
thead th { border-bottom: 2px solid var(--ink); }
tr.with { background: var(--soft); font-weight: 600; }
figure { margin: 1.5rem 0; } figure svg { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<h2>Results</h2>
<div class="wide"><table>
<caption>Test accuracy and calibration error in percent; mean ± standard deviation over head seeds,
last epoch.</caption>
<thead><tr><th scope="col">host</th><th scope="col">head</th><th scope="col">ratio</th>
<th scope="col">statistics</th>{% for f in figures %}<th scope="col">{{ f }}</th>{% endfor %}</tr></thead>
<tbody>
{% for result in results %}{% for key, label in rows.items() %}{% set entry = result.metrics[key] %}
<tr class="{{ 'with' if key == 'with_h2t' else '' }}"><td>{{ result.name }}</td><td>{{ label }}</td>
<td>{{ "–" if entry is none or entry.ratio is none else entry.ratio }}</td>
<td>{{ "–" if entry is none else entry.statistics }}</td>
{% for f in figures %}<td>{{ cell(entry, f) }}</td>{% endfor %}</tr>
{% endfor %}{% endfor %}
</tbody></table></div>
<p>“without H2T” is ratio 0. “with H2T” is donor instance, random channels, at the ratio with the best mean validation
accuracy where there is a validation split, else at the ratio set beforehand. Nothing is chosen on the test split.</p>
{% for caption, picture in pictures.items() %}
<figure role="img" aria-label="{{ caption }}"><figcaption><h2>{{ caption }}</h2></figcaption>
<div class="wide">{{ picture }}</div></figure>
{% endfor %}
</main>
</body>
</html>
"""


def page(
    title: str,
    results: Sequence[Any],
    rows: Mapping[str, str],
    figures: Sequence[str],
    pictures: Mapping[str, str],
) -> str:
    """The page; `pictures` maps a caption to SVG text made by `pipeline.figures`."""

    def cell(entry: Mapping[str, Any] | None, figure: str) -> str:
        if entry is None or entry[figure] is None:
            return "–"
        spread = entry[f"{figure}_std"]
        return f"{entry[figure]:.2f}" + (f" ± {spread:.2f}" if spread is not None else "")

    template = Environment(autoescape=True).from_string(TEMPLATE)
    safe = {caption: Markup(svg) for caption, svg in pictures.items()}
    return template.render(title=title, results=results, rows=rows, figures=figures, pictures=safe, cell=cell)
