"""The page's style sheet and its few lines of script; without ``<`` and ``&``, so that the page is XML too."""

from __future__ import annotations

from trisparse.bench.report.charts import COLORS

_DARK = ("#4aa8e0", "#f08a4b", "#35c79b", "#e08fc0", "#e8b84a", "#8fd0f5")  # COLORS, lighter

_LIGHT_THEME = """
  --page: #f6f7f9; --card: #ffffff; --text: #1c2430; --soft: #5a6675; --line: #dfe3e8; --grid: #e8ebef;
  --muted: #8c97a5; --link: #0b5cad; --warn: #fff3d6; --warn-text: #6b4700; --code: #eef1f5;
  color-scheme: light;
"""
_DARK_THEME = """
  --page: #11151b; --card: #1a2029; --text: #e4e8ee; --soft: #a3aebc; --line: #2f3844; --grid: #29313c;
  --muted: #7b8795; --link: #7cc0ff; --warn: #3d3013; --warn-text: #ffdf9e; --code: #242c37;
  color-scheme: dark;
"""


def _colors(colors: tuple[str, ...]) -> str:
    return " ".join(f"--c{index}: {color};" for index, color in enumerate(colors))


def style() -> str:
    """The style sheet: light, and dark where the system or the reader asks for it."""
    light, dark = _LIGHT_THEME + _colors(COLORS), _DARK_THEME + _colors(_DARK)
    series = "\n".join(
        f".c{index} {{ fill: var(--c{index}); stroke: var(--c{index}); }}" for index in range(len(COLORS))
    )
    return (
        f":root {{{light}}}\n@media (prefers-color-scheme: dark) {{ :root:not([data-theme=light]) {{{dark}}} }}\n"
        f":root[data-theme=dark] {{{dark}}}\n{_RULES}\n{series}\n{_MARKS}"
    )


_RULES = """
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
@media (prefers-reduced-motion: reduce) { html { scroll-behavior: auto; } }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
a { color: var(--link); }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; border-radius: 3px; }
header, main, footer { max-width: 1120px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 28px; display: flex; flex-wrap: wrap; gap: 4px 16px; align-items: baseline; }
header h1 { margin: 0; font-size: 1.6rem; letter-spacing: -.01em; flex: 1 1 auto; }
header p { margin: 0; color: var(--soft); flex: 1 0 100%; }
button { font: inherit; font-size: .875rem; color: var(--text); background: var(--card); border: 1px solid var(--line);
  border-radius: 6px; padding: 4px 12px; cursor: pointer; }
nav { position: sticky; top: 0; z-index: 1; background: var(--page); border-bottom: 1px solid var(--line);
  margin-top: 16px; }
nav ul { max-width: 1120px; margin: 0 auto; padding: 8px 20px; list-style: none; display: flex; gap: 4px 18px;
  overflow-x: auto; white-space: nowrap; font-size: .9rem; }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px 24px;
  margin: 20px 0;
  scroll-margin-top: 56px; }
h2 { margin: 0 0 4px; font-size: 1.25rem; }
h3 { margin: 24px 0 8px; font-size: 1rem; }
.lead { margin: 0 0 16px; color: var(--soft); max-width: 76ch; }
.warning { background: var(--warn); color: var(--warn-text); border-radius: 8px; padding: 10px 14px; margin: 12px 0; }
.empty { color: var(--soft); margin: 12px 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 28px 36px; }
figure { margin: 0; min-width: 0; }
details .charts { margin-top: 16px; }
figcaption { font-weight: 600; margin-bottom: 6px; overflow-wrap: anywhere; }
.tag { display: inline-block; margin-left: 8px; padding: 0 7px; border: 1px dashed var(--soft); border-radius: 999px;
  color: var(--soft); font-size: .75rem; font-weight: 400; white-space: nowrap; }
h4 { margin: 10px 0 2px; font-size: .8125rem; font-weight: 600; overflow-wrap: anywhere; }
.bar { display: grid; grid-template-columns: minmax(5rem, 9.5rem) minmax(0, 1fr) 4.9rem; gap: 0 8px;
  align-items: center;
  font-size: .8125rem; line-height: 1.25; padding: 1px 0; }
.bar .name { color: var(--soft); text-align: right; overflow-wrap: anywhere; }
.bar .value { font-variant-numeric: tabular-nums; white-space: nowrap; }
.bar svg { display: block; overflow: visible; }
p.axis { margin: 0; font-size: .75rem; color: var(--soft); text-align: center; }
p.axis.y { text-align: left; margin-bottom: 8px; }
svg text { font-size: 11.5px; fill: var(--soft); }
svg.plot { display: block; overflow: visible; margin: 8px 0 26px 56px; width: calc(100% - 72px); }
.legend { list-style: none; margin: 8px 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: 2px 16px;
  font-size: .8125rem; }
.legend li { display: flex; align-items: center; gap: 6px; overflow-wrap: anywhere; }
details { margin-top: 10px; }
summary { cursor: pointer; color: var(--link); font-size: .9rem; padding: 2px 0; width: fit-content; }
.charts + details, details + details { margin-top: 8px; }
.scroll { margin: 8px 0 14px; overflow-x: auto; max-height: 34rem; overflow-y: auto; border: 1px solid var(--line);
  border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: .8125rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 8px 10px; color: var(--soft); }
th, td { padding: 5px 10px; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { position: sticky; top: 0; background: var(--card); white-space: nowrap; font-weight: 600; }
.number { text-align: right; white-space: nowrap; }
td.text { min-width: 5.5rem; max-width: 26rem; overflow-wrap: break-word; }
td.text:nth-child(2) { min-width: 11rem; }
code { font: .8125rem/1.4 ui-monospace, SFMono-Regular, Menlo, "DejaVu Sans Mono", monospace; background: var(--code);
  border-radius: 4px; padding: 1px 5px; overflow-wrap: anywhere; }
ol.commands { padding-left: 1.6rem; margin: 6px 0 0; font-size: .8125rem; color: var(--soft); }
ol.commands li { margin: 4px 0; }
ol.commands code { color: var(--text); }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 3px 18px; margin: 8px 0; font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
footer { padding-bottom: 32px; color: var(--soft); font-size: .8125rem; }
@media (max-width: 640px) {
  header, main, footer { padding-left: 12px; padding-right: 12px; }
  header { padding-top: 16px; }
  nav ul { padding: 8px 12px; }
  section { padding: 16px 14px; margin: 14px 0; }
  .bar { grid-template-columns: minmax(0, 1fr) 4.9rem; }
  .bar { padding-top: 4px; }
  .bar .name { grid-column: 1 / -1; text-align: left; }
  .bar.ticks .name { display: none; }
  dl { grid-template-columns: minmax(0, 1fr); }
  dt { margin-top: 4px; }
}
@media print { nav, button { display: none; } section { break-inside: avoid; } }
"""

_MARKS = """
.muted { fill: var(--muted); stroke: var(--muted); }
.bar rect { stroke-width: 0; }
.bar rect.hollow { fill: none; stroke-width: 1.5px; stroke-dasharray: 4 2; }
.grid { stroke: var(--grid); stroke-width: 1px; }
.reference { stroke: var(--text); stroke-width: 1px; }
.line { stroke-width: 2px; stroke-linecap: round; }
.guide { stroke: var(--soft); stroke-width: 1.5px; stroke-dasharray: 6 4; }
.g1 { stroke-dasharray: 2 3; } .g2 { stroke-dasharray: 10 3 2 3; }
.marker path { stroke: var(--card); stroke-width: 1px; }
.marker.hollow path { fill: var(--card); stroke: inherit; stroke-width: 1.6px; }
"""

# The theme of ?theme=dark or light, else the reader's last choice, else the system's.
SCRIPT = """
(function () {
  var root = document.documentElement, key = "trisparse-theme", saved = null;
  try { saved = localStorage.getItem(key); } catch (error) { saved = null; }
  var asked = new URLSearchParams(location.search).get("theme") || saved;
  if (asked === "dark" || asked === "light") { root.dataset.theme = asked; }
  document.addEventListener("DOMContentLoaded", function () {
    var button = document.getElementById("theme");
    button.hidden = false;
    button.addEventListener("click", function () {
      var system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
      var next = (root.dataset.theme || system) === "dark" ? "light" : "dark";
      root.dataset.theme = next;
      try { localStorage.setItem(key, next); } catch (error) { return; }
    });
  });
})();
"""
