"""The report in a browser: it draws every figure, asks for nothing, says nothing, and its controls work."""

import browser
import pytest

RAIL = "rail-touch-rect"
SHOWN = "(() => { const plot = document.getElementById('figure-kept'); return %s; })()"


@pytest.fixture(scope="module")
def tab(made, tmp_path_factory):
    """A tab that shows the report."""
    if browser.FOUND is None:
        pytest.skip("there is no Chromium")
    with browser.browser(tmp_path_factory.mktemp("profile")) as tab:
        tab.open(made.file)
        yield tab


def kept(tab, what):
    """A value of the figure of kept output."""
    return tab.ask(SHOWN % what)


def test_every_figure_is_drawn_and_nothing_is_asked_for(made, tab):
    sections = [name for name in made.page.sections if f'"figure-{name}"' in made.page.text]
    assert len(sections) == 5
    for name in sections:
        assert tab.ask(f"document.querySelectorAll('#figure-{name} .main-svg').length") >= 2, name
        assert tab.ask(f"document.querySelectorAll('#figure-{name} .trace, #figure-{name} .hm').length") > 0, name
    assert [url for url in tab.requests if not url.startswith("data:")] == [made.file.as_uri()]
    assert tab.problems == []


def test_the_slider_sets_the_rank_and_the_menu_the_basis(made, tab):
    steps = made.page.figure("kept").layout["sliders"][0]["steps"]
    for number in (0, len(steps) - 1):
        tick, rail = (tab.middle(f"#figure-kept .slider-{part}", i) for part, i in (("tick-rect", number), (RAIL, 0)))
        tab.click(tick[0], rail[1])
        change = steps[number]["args"][0]
        tab.until(SHOWN % f"plot.data[0].z[0][0] == {change['z'][0][0][0]}")
        assert kept(tab, "plot.data[0].z") == change["z"][0] and kept(tab, "plot.data[1].z") == change["z"][1]
        label = tab.ask("document.querySelector('#figure-kept .slider-label').textContent")
        assert label == f"rank {steps[number]['label']}"
    tab.click(*tab.middle("#figure-kept .updatemenu-header", 0))
    tab.click(*tab.middle("#figure-kept .updatemenu-dropdown-button", 1))
    tab.until(SHOWN % "plot.data[1].visible")
    assert kept(tab, "plot.data.map((trace) => trace.visible)") == [False, True, False, False]
    assert kept(tab, "plot.data[1].z") == change["z"][1]  # at the rank that was set
    assert tab.problems == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_stands_out_from_the_page(made, tab, dark):
    tab.open(made.file, dark=dark)
    paper = tab.ask("getComputedStyle(document.body).backgroundColor")
    for words in ("body", "#figure-kept .xtick text", "#figure-bases .legendtext", "#figure-data .ytick text"):
        colour = "color" if words == "body" else "fill"
        ink = tab.ask(f"getComputedStyle(document.querySelector('{words}')).{colour}")
        assert contrast(ink, paper) > 7, (words, ink, paper)


def test_the_printed_page_is_as_wide_as_paper(made, tab):
    tab.open(made.file)
    tab.call("Emulation.setEmulatedMedia", media="print")
    tab.ask("dispatchEvent(new Event('beforeprint'))")
    assert tab.ask("Math.max(...[...document.querySelectorAll('.main-svg')].map((s) => s.width.baseVal.value))") <= 720
    tab.ask("dispatchEvent(new Event('afterprint'))")
    tab.call("Emulation.setEmulatedMedia", media="")
    assert tab.ask("document.querySelector('#figure-kept .main-svg').width.baseVal.value") > 800


def contrast(one, other):
    """Of two CSS colours, as WCAG defines it."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour):
    parts = [int(part) / 255 for part in colour.partition("(")[2].rstrip(")").split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
