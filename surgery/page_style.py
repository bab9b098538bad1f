"""Looks and the one switch of a report page, in light and dark."""

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d8dee4;
  --paper: #ffffff; --card: #f6f8fa; --accent: #0969da; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #30363d;
  --paper: #0d1117; --card: #161b22; --accent: #4493f8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 2rem 1.5rem 4rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.4rem 0 .6rem; }
p, .soft { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .7rem;
  margin: 1.2rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: .6rem .9rem; }
.card b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .85rem; }
.scroll { overflow: auto; max-height: 32rem; }
table { border-collapse: collapse; width: 100%; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .7rem; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--soft); font-weight: 600; white-space: normal; vertical-align: bottom;
  position: sticky; top: 0; background: var(--paper); }
th:first-child, td:first-child { text-align: left; }
code, td:first-child { font-family: ui-monospace, monospace; font-size: .84rem; }
.tabs label { display: inline-block; padding: .25rem .8rem; border: 1px solid var(--line);
  border-radius: 999px; margin: 0 .3rem .4rem 0; cursor: pointer; color: var(--soft); }
.tabs input { position: absolute; opacity: 0; }
.tabs input:focus-visible + label { outline: 2px solid var(--accent); }
.tabs input:checked + label { background: var(--accent); border-color: var(--accent);
  color: #fff; }
.js-plotly-plot svg text { fill: var(--soft) !important; }
.js-plotly-plot .hoverlayer text { fill: #fff !important; }
.js-plotly-plot .hoverlayer .legend text { fill: #111 !important; }
details { margin: .6rem 0; } summary { cursor: pointer; }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
"""

SWITCH = """
for (const input of document.querySelectorAll('.tabs input')) {
  input.addEventListener('change', () => {
    for (const pane of document.querySelectorAll('.pane'))
      pane.hidden = pane.dataset.key !== input.value;
    window.dispatchEvent(new Event('resize'));
  });
}
"""
