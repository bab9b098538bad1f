"""Pages, and the browser that opens them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape

import pytest

from cli.main import main

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--virtual-time-budget=10000", "--enable-logging=stderr", "--dump-dom",
)  # fmt: skip
# Selects every tab, then writes down what has been drawn where.
PROBE = """<script>
window.addEventListener('load', () => setTimeout(() => {
  const hidden = [];
  for (const input of document.querySelectorAll('.tabs input')) {
    input.click();
    const panes = input.closest('.choice').querySelectorAll('.pane');
    hidden.push([...panes].filter(pane => !pane.hidden).map(pane => pane.dataset.key).join());
  }
  const charts = {};
  for (const chart of document.querySelectorAll('.plotly-graph-div'))
    charts[chart.id] = chart.querySelectorAll(
      '.heatmaplayer .hm image, .scatterlayer .trace, .barlayer .point').length;
  const told = document.createElement('pre');
  told.id = 'told';
  told.textContent = JSON.stringify({charts, seen: hidden, title: document.title,
    sections: [...document.querySelectorAll('section')].map(each => each.id),
    images: document.querySelectorAll('body img').length,
    bold: document.querySelectorAll('td b').length});
  document.body.append(told);
}, 500));
</script>"""


@pytest.fixture
def report(tmp_path):
    """Write a page of runs, and return its place."""
    pytest.importorskip("plotly")

    def make(*runs):
        out = tmp_path / "report.html"
        assert main(["report", *map(str, runs), "-o", str(out), "--force"]) == 0
        return out

    return make


@pytest.fixture
def browse(tmp_path):
    """Open a page in a browser; return what it holds, and what it complains about."""
    if BROWSER is None:
        pytest.skip("needs chromium or google-chrome")

    def see(page):
        probed = tmp_path / "probed.html"
        text = page.read_text(encoding="utf-8")
        probed.write_text(text.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
        words = [BROWSER, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", probed.as_uri()]
        done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=120)
        told = re.search('<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)
        assert told, done.stderr[-2000:]
        complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return json.loads(unescape(told[1])), complaints

    return see
