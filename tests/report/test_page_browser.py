"""report.html in a real browser, where there is one: nothing is wider than the screen, no word of a figure is cut."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest
from helpers.run_folders import make_run

from tune.report.html.page import write_page
from tune.report.report import make_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
MEASURE = """<pre id="measured"></pre><script>
addEventListener("load", () => {
  const width = document.documentElement.clientWidth, inside = ".scroll, svg, nav, pre";
  const box = e => e.getBoundingClientRect();
  const wide = [...document.querySelectorAll("body *")].filter(e => box(e).right > width + 1 && !e.closest(inside));
  const cut = [...document.querySelectorAll("svg.plot text")].filter(e => {
    const a = box(e), b = box(e.ownerSVGElement);
    return a.width > 0 && (a.left < b.left - 1 || a.right > b.right + 1 || a.bottom > b.bottom + 1);
  });
  const small = [...document.querySelectorAll("svg.plot")].filter(e => box(e).width > 0 && box(e).width < 0.85 * 360);
  document.getElementById("measured").textContent = JSON.stringify({
    width, scroll: document.documentElement.scrollWidth, wide: wide.map(e => e.outerHTML.slice(0, 80)),
    cut: cut.map(e => e.textContent), small: small.length,
  });
});
</script></body>"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    arms = ("plain", "macdrop", "random_rows", "all_rows", "activations")
    make_run(folder / "run", judge=True, arms=arms, cells=[{"use_dora": False}, {"use_dora": True}], tried=6)
    return write_page([make_report(folder / "run")], folder / "page.html")[0]


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1366])
def test_the_page_fits_the_screen(page, tmp_path, width):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser ({', '.join(BROWSERS)})")
    # A headless window may not be as narrow as a phone; a frame may.
    source = html.escape(page.read_text(encoding="utf-8").replace("</body>", MEASURE), quote=True)
    outer = tmp_path / "outer.html"
    script = "onload = () => { out.textContent = f.contentDocument.getElementById('measured').textContent }"
    frame = f'<iframe id="f" style="width:{width}px;height:900px;border:0" srcdoc="{source}"></iframe>'
    outer.write_text(f'<meta charset="utf-8">{frame}<pre id="out"></pre><script>{script}</script>', encoding="utf-8")
    command = [browser, "--headless=new", "--no-sandbox", "--hide-scrollbars", f"--user-data-dir={tmp_path}"]
    command += ["--virtual-time-budget=10000", "--dump-dom", outer.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = json.loads(html.unescape(re.search(r'<pre id="out">(.*?)</pre>', dom, re.DOTALL)[1]))
    assert found["width"] == width and found["scroll"] == width
    assert not found["wide"] and not found["cut"] and not found["small"]
