"""Render a report in Chromium's engine: python benchmarks/check_report.py report.html FOLDER

At 390 and 1,400 px, light and dark, without a display (pip install PyQt6-WebEngine): screenshots in FOLDER, and the
number of console messages, of requests to anything but the page, of pixels by which the page is too wide, and whether
a click sorts. Exit 1 if not clean.
"""

import os
import subprocess
import sys

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
os.environ.setdefault("QTWEBENGINE_DISABLE_SANDBOX", "1")  # root in a container has no sandbox

try:
    from PyQt6.QtCore import QTimer, QUrl
    from PyQt6.QtWebEngineCore import QWebEnginePage, QWebEngineUrlRequestInterceptor
    from PyQt6.QtWebEngineWidgets import QWebEngineView
    from PyQt6.QtWidgets import QApplication
except ImportError:
    raise SystemExit("pip install PyQt6-WebEngine") from None

CLICK = """(() => { const table = document.querySelector("table"), key = () => [...table.tBodies[0].rows].map(
  r => r.children[2].dataset.v).filter(v => v).map(Number);
  table.querySelectorAll("th button")[2].click(); const down = key();
  table.querySelectorAll("th button")[2].click(); const up = key();
  const sorted = a => a.every((v, i) => !i || a[i - 1] <= v);
  return [sorted(up) && sorted([...down].reverse()), document.documentElement.scrollWidth - innerWidth]; })()"""


class Page(QWebEnginePage):
    messages = []

    def javaScriptConsoleMessage(self, level, message, line, source):
        self.messages.append(message)


class Requests(QWebEngineUrlRequestInterceptor):
    seen = []

    def interceptRequest(self, info):
        self.seen.append(info.requestUrl().toString())


def main(path, folder, scheme):
    os.makedirs(folder, exist_ok=True)
    dark = " --blink-settings=preferredColorScheme=0" if scheme == "dark" else ""
    os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = "--disable-gpu" + dark
    app = QApplication(["check"])
    cases = [390, 1400]
    view, requests, failures = QWebEngineView(), Requests(), []
    page = Page(view)
    page.profile().setUrlRequestInterceptor(requests)
    view.setPage(page)
    view.show()

    def start():
        view.resize(cases[0], 900)
        view.load(QUrl.fromLocalFile(os.path.abspath(path)))

    def loaded(ok):
        QTimer.singleShot(700, lambda: page.runJavaScript(CLICK, done))

    def done(result):
        name = f"{cases.pop(0)}_{scheme}.png"
        view.grab().save(os.path.join(folder, name))
        outside = [u for u in requests.seen if not u.startswith(("file:", "data:"))]
        is_sorted, too_wide = result
        print(f"{name}: {len(Page.messages)} console messages, {len(outside)} requests outside, "
              f"{too_wide} px too wide, sorts: {is_sorted}", *Page.messages, *outside, flush=True)  # fmt: skip
        if Page.messages or outside or too_wide > 0 or not is_sorted:
            failures.append(name)
        if cases:
            start()
        else:
            app.quit()

    view.loadFinished.connect(loaded)
    start()
    app.exec()
    return 1 if failures else 0


if __name__ == "__main__":
    if len(sys.argv) == 4:
        sys.exit(main(*sys.argv[1:]))
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    # The engine reads the colour scheme when it starts: a process each.
    sys.exit(max(subprocess.run([sys.executable, *sys.argv, scheme]).returncode for scheme in ("light", "dark")))
