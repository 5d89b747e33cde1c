"""What a report says, read back from its HTML: texts and tables by section, and what its figures are drawn from."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace


class Page(HTMLParser):
    """sections: id -> words; tables: id -> tables, each a list of rows; tags: how often an element stands there."""

    def __init__(self, path):
        super().__init__()
        self.text = Path(path).read_text()
        self.sections, self.tables, self.tags, self._at = {"": []}, {}, {}, [""]
        self._cells = None
        self.feed(self.text)
        self.sections = {name: " ".join(" ".join(words).split()) for name, words in self.sections.items()}

    def handle_starttag(self, tag, attrs):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        if tag == "section":
            self._at.append(dict(attrs)["id"])
            self.sections[self._at[-1]] = []
        elif tag == "table":
            self.tables.setdefault(self._at[-1], []).append([])
        elif tag == "tr":
            self.tables[self._at[-1]][-1].append([])
        elif tag in ("td", "th"):
            self.tables[self._at[-1]][-1][-1].append("")
        self._cells = tag in ("td", "th")

    def handle_endtag(self, tag):
        if tag == "section":
            self._at.pop()
        self._cells = False

    def handle_data(self, data):
        if self._cells:
            self.tables[self._at[-1]][-1][-1][-1] += data
        if self.cdata_elem is None:
            self.sections[self._at[-1]].append(data)

    def figure(self, section):
        """Traces and layout of a section's figure."""
        start = re.search(rf'Plotly\.newPlot\(\s*"figure-{section}",\s*', self.text).end()
        decoder, parts = json.JSONDecoder(), []
        for _ in range(2):
            value, start = decoder.raw_decode(self.text, start)
            parts.append(value)
            start = re.compile(r"\s*,\s*").match(self.text, start).end()
        return SimpleNamespace(data=parts[0], layout=parts[1])
