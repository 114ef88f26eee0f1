"""The report is one file, complete, escaped, and never half-written."""

import html.parser
import re

import numpy as np
import pytest

from openmm_regflow import plots, report
from openmm_regflow.errors import InputError


@pytest.fixture(scope="module")
def png():
    return plots.to_png(plots.weights(np.zeros(50)))


def arguments(png):
    return {
        "title": "Alanine dipeptide & <flow>",
        "lead": "A lead.",
        "tables": {
            "Figures of merit": report.Table([["ESS", "12 %"], ["E-W1", 0.5]], ["name", "value"]),
            "Mapping": {"a": 1},
            "Rows": [("x", 2)],
        },
        "figures": {"Weights": report.Figure(png, "All equal.")},
        "verdicts": {"flow": "reliable: k-hat 0.1", "ΔF": "do not trust: overlap 0.01", "chain": "use with care: x"},
        "provenance": {"seed": 7},
    }


class Tags(html.parser.HTMLParser):
    """Checks nesting and collects tags."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_is_complete_and_well_formed(tmp_path, png):
    path = report.write_report(tmp_path / "new" / "report.html", **arguments(png))
    text = path.read_text(encoding="utf-8")
    parser = Tags()
    parser.feed(text)
    assert not parser.open
    assert "Alanine dipeptide &amp; &lt;flow&gt;" in text
    for words in ("12 %", "All equal.", "overlap 0.01", "seed"):
        assert words in text
    kinds = [attrs.get("class") for tag, attrs in parser.seen if tag == "li"]
    assert kinds == ["good", "bad", "care"]


def test_verdicts_may_be_plain_sentences():
    text = report.render(title="t", verdicts=["samples: reliable: k-hat 0.1", "chain: 40 crossings against 0"])
    assert '<li class="good"><b>samples</b> reliable: k-hat 0.1</li>' in text
    assert '<li class=""><b></b> chain: 40 crossings against 0</li>' in text


def test_report_loads_nothing_from_elsewhere(png):
    text = report.render(**arguments(png))
    sources = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"')\s>]+)""", text)
    assert sources and all(s.startswith("data:image/png;base64,") for s in sources)
    assert "<script" not in text


def test_figures_from_a_path(tmp_path, png):
    file = tmp_path / "a.png"
    file.write_bytes(png)
    assert report.render(title="t", figures={"a": file}) == report.render(title="t", figures={"a": png})


@pytest.mark.parametrize("image", ["missing.png", b"GIF89a", None])
def test_unusable_figures_are_refused_and_leave_nothing(tmp_path, image):
    with pytest.raises(InputError, match="'a'"):
        report.write_report(tmp_path / "r.html", title="t", figures={"a": image})
    assert list(tmp_path.iterdir()) == []


def test_failed_write_keeps_the_old_report(tmp_path, monkeypatch):
    path = report.write_report(tmp_path / "r.html", title="old")
    old = path.read_text()

    def full_disk(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.os, "fsync", full_disk)
    with pytest.raises(InputError, match="No space"):
        report.write_report(path, title="new")
    assert path.read_text() == old
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


def test_unwritable_folder_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        report.write_report(tmp_path / "file" / "r.html", title="t")
