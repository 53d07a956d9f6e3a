"""What a page shows in a browser: what sticks out, what cannot be read, what went wrong."""

import pytest


class Look:
    """What a page shows at one width and in one colour scheme."""

    def __init__(self, browser, width, scheme):
        self.context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
        self.page, self.faults = self.context.new_page(), []
        self.page.set_default_timeout(60_000)
        self.page.on("console", lambda said: self.faults.append(said.text) if said.type == "error" else None)
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("requestfailed", lambda asked: self.faults.append(f"not loaded: {asked.url}"))

    def open(self, address):
        """Go there and wait for what it loads."""
        self.page.goto(str(address), wait_until="load")
        return self

    def overflow(self):
        """Elements that stick out of the window and lie in nothing that scrolls; empty when nothing does."""
        return self.page.evaluate(
            """() => {
              const wide = document.documentElement.clientWidth, found = [];
              const scrolls = (e) => e && e !== document.documentElement && e !== document.body &&
                (getComputedStyle(e).overflowX !== 'visible' || scrolls(e.parentElement));
              for (const e of document.body.querySelectorAll('*')) {
                const box = e.getBoundingClientRect();
                if (box.width && box.height && box.right > wide + 1 && box.left < wide && !scrolls(e.parentElement))
                  found.push(e.tagName + '.' + e.className + ' to ' + Math.round(box.right));
              }
              if (document.documentElement.scrollWidth > wide) found.push('the page scrolls sideways');
              return found;
            }"""
        )

    def low_contrast(self):
        """Texts below WCAG's ratios of 4.5, or 3 for large ones, by axe-core."""
        axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is missing")
        options = {"runOnly": ["color-contrast"], "resultTypes": ["violations"]}
        found = axe.Axe().run(self.page, options=options).response["violations"]
        return [f"{n['target'][-1]}: {n['any'][0]['message']}" for rule in found for n in rule["nodes"]]
