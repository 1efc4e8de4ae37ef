"""``trisparse bench report``: what each section says of rows, what is escaped, and that the page needs nothing else."""

import math
import re
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from PIL import Image, ImageStat

from trisparse.bench.report.charts import Bar, Bars, Scale, pareto_frontier
from trisparse.bench.report.numbers import number, ratio, seconds, signed, size
from trisparse.bench.report.page import write_report
from trisparse.bench.report.plots import frontier, perplexity, roofline
from trisparse.bench.report.reading import sparsity
from trisparse.bench.report.sections import SECTIONS, papers
from trisparse.bench.rows import Row, append_rows, newest

ENVIRONMENT = {
    "commit": "0123456789abcdef",
    "dirty": False,
    "python": "3.11.7",
    "packages": {"torch": "2.13.0", "triton": "3.8.0"},
    "cpu": {"model": "Example(R) Processor CPU @ 2.00GHz", "cores": 2, "threads": 2, "memory_gib": 8.0},
}
PEAKS = {"bytes_per_s": 2e12, "flops_per_s": 300e12, "dtype": "bfloat16", "source": "datasheet"}
EVIL = "<script>alert('1')</script> & \"x\" $y$"


def row(benchmark, case, contestant, **given):
    given = {"parameters": {}, "kind": "measurement", "device": "cpu", "environment": ENVIRONMENT, **given}
    about = {"run": "1", "time": "2026-01-02T03:04:05+00:00", "command": f"trisparse bench run {benchmark}"}
    return Row(benchmark, case, contestant, **{**about, **given})


def times(median):
    return {"min": median / 2, "median": median, "p90": median * 2}


def rows():
    """One or more rows for every section."""
    found = []
    for case, speedup in (("row 50%, 4096x4096", 4.0), (EVIL, 0.25)):
        found.append(row("select", case, "usual", baseline="usual", seconds=times(0.004), speedup=1.0))
        found.append(row("select", case, "trisparse", baseline="usual", seconds=times(0.001), speedup=speedup))
    for contestant, speed, held in (("dense", 20.0, 270e6), ("compressed 2:4", 5.0, 160e6)):
        metrics = {"peak_bytes": 2 * held, "model_bytes": held}
        for phase in ("prefill", "decode"):
            about = {"parameters": {"phase": phase, "model": "smollm2"}, "baseline": "dense", "metrics": metrics}
            found.append(row("tokens", f"{phase}, batch 1", contestant, tokens_per_s=speed, **about))
    for share, quality in ((0.3, 16.0), (0.5, 25.0), ("2:4", 40.0)):
        about = {"parameters": {"sparsity": share, "model": "smollm2"}, "baseline": "magnitude"}
        for contestant, worse, speedup in (("magnitude", 2, 1.0), ("wanda", 1, 0.5)):
            metrics = {"perplexity": worse * quality}
            found.append(row("prune", f"{share}", contestant, metrics=metrics, speedup=speedup, **about))
    gpu = {"device": "GPU", "environment": {**ENVIRONMENT, "dirty": True, "peaks": PEAKS}}
    found.append(row("linear", "16 tokens", "triton", tflop_per_s=16.0, gb_per_s=1000.0, **gpu))
    bound = {"kind": "bound", "parameters": {"gpu": "GPU"}, "environment": {**ENVIRONMENT, "peaks": PEAKS}}
    counted = {"flops": 32e9, "bytes": 1e9, "bound_us": 500.0}
    found.append(row("roofline", "32 tokens", "product", metrics=counted, **bound))
    found.append(row("roofline", "select", "registers", metrics={"registers": 128}, **bound))
    cell = {"row": "PERP", "column": "50%", "model": "opt", "scale": "small"}
    found.append(
        row(
            "papers/perp-table-10",
            "PERP, 50%",
            "ours",
            parameters=cell,
            metrics={"perplexity": 31.5, "published": 30.0},
        )
    )
    found.append(row("papers/perp-table-2", "50%", "none", metrics={"perplexity": math.inf, "published": 6000.0}))
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    (file,) = write_report(rows(), tmp_path_factory.mktemp("report"), png=False)
    return file


@pytest.fixture(scope="module")
def tree(page):
    return ElementTree.fromstring(page.read_text())


def text_of(tree, key):
    section = next(part for part in tree.iter("section") if part.get("id") == key)
    return " ".join(" ".join(section.itertext()).split())


class Elements(HTMLParser):
    """The elements as HTML reads them, with how they nest."""

    def __init__(self):
        super().__init__()
        self.open, self.names, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs
        self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in ("meta", "link"), f"<{tag}/> is not closed in HTML"
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_well_formed_html_and_loads_nothing(page):
    text = page.read_text()
    assert text.startswith("<!DOCTYPE html>")
    elements = Elements()
    elements.feed(text)
    elements.close()
    assert not elements.open
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    loaded = [value for name, value in elements.attributes if name in ("src", "href", "data")]
    assert loaded
    assert all(value.startswith("#") or value == "data:," for value in loaded)
    anchors = {value for name, value in elements.attributes if name == "id"}
    assert all(value[1:] in anchors for value in loaded if value.startswith("#"))


def test_every_string_is_escaped(page):
    elements = Elements()
    elements.feed(page.read_text())
    assert elements.names.count("script") == 1  # the theme's
    assert "&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt; &amp; &quot;x&quot; $y$" in page.read_text()


def test_all_sections_have_content_and_the_commands(tree):
    for section in (*SECTIONS, "other"):
        key = section if section == "other" else section.key
        assert "Measured by" in text_of(tree, key), key
    assert "trisparse bench run select 2026-01-02 03:04:05 UTC, commit 0123456789ab, Example" in text_of(
        tree, "speed-up"
    )


def test_summary_names_machine_versions_and_changed_code(tree):
    summary = text_of(tree, "summary")
    assert "1 of 19 rows come from a checkout with uncommitted changes" in summary
    assert "17 rows were measured. 2 are bounds" in summary
    assert "Example, 2 cores, threads: 2, 8.0 GiB" in summary
    assert "python 3.11.7, torch 2.13.0, triton 3.8.0" in summary
    assert "Not measured yet" not in summary


def test_speed_up_names_ratios_and_their_geometric_mean(tree):
    shown = text_of(tree, "speed-up")
    assert "Geometric mean of 2 cases trisparse 1×" in shown  # sqrt(4 * 0.25)
    assert "row 50%, 4096x4096 trisparse 4×" in shown
    assert "times as fast as usual, log scale" in shown
    assert "500 µs 1 ms 2 ms 4×" in shown  # of the table: min, median, p90


def test_tokens_are_apart_by_phase_with_the_baseline(tree):
    shown = text_of(tree, "tokens")
    assert "Prefill, tokens, smollm2 on Example prefill, batch 1 dense 20 compressed 2:4 5" in shown
    assert "Decode, tokens, smollm2 on Example decode, batch 1 dense 20 compressed 2:4 5" in shown


def test_tokens_of_a_single_layer_are_not_a_models():
    layer = row("linear", "x", "triton", tokens_per_s=5.0, parameters={"rows": 8, "cols": 8})
    assert not SECTIONS[1].build([layer]).rows


def test_memory_shows_peak_and_model(tree):
    shown = text_of(tree, "memory")
    assert "Peak memory, tokens, smollm2 on Example prefill, batch 1 dense 540 MB compressed 2:4 320 MB" in shown
    assert "The model's bytes, tokens, smollm2 on Example prefill, batch 1 dense 270 MB" in shown


def test_papers_have_ours_published_and_difference_in_the_order_of_numbers(tree):
    shown = text_of(tree, "papers")
    assert "PERP 50% opt, small perplexity 31.5 30 +1.5" in shown
    assert "50% none perplexity ∞ 6,000 –" in shown
    assert [table.caption for table in papers(rows()).shown] == ["perp-table-2", "perp-table-10"]


def test_what_no_section_shows_is_under_other_numbers(tree):
    assert "roofline select registers bound registers 128" in text_of(tree, "other")


def test_curves_join_scopes_and_leave_patterns_as_points():
    (chart,) = perplexity(rows()).charts
    series = {one.name: one for one in chart.series}
    assert list(series) == ["magnitude", "wanda", "magnitude, 2:4", "wanda, 2:4"]
    assert [(point.x, point.y) for point in series["wanda"].points] == [(30, 16), (50, 25)]
    assert series["wanda"].line
    assert not series["wanda, 2:4"].line
    assert perplexity(rows()).remarks == ["Left out: 1 perplexities that are not finite."]


@pytest.mark.parametrize(
    ("given", "share"), [(0.5, 0.5), ("60%", 0.6), ("50% balanced", 0.5), ("2:4", 0.5), ("1:4", 0.75), ("dense", None)]
)
def test_sparsity_from_numbers_shares_and_patterns(given, share):
    assert sparsity(row("prune", "x", "y", parameters={"sparsity": given})) == share


def test_pareto_frontier_by_hand():
    # speed, perplexity: b beats c (as fast, better), e beats d (faster, as good), a is slowest and best
    a, b, c, d, e = (1.0, 10.0), (2.0, 12.0), (2.0, 13.0), (3.0, 20.0), (4.0, 20.0)
    assert pareto_frontier([e, d, c, b, a, a]) == [a, b, e]
    assert pareto_frontier([(1.0, 5.0), (2.0, 4.0)]) == [(2.0, 4.0)]
    assert pareto_frontier([]) == []


def test_frontier_compares_one_case_and_draws_the_steps():
    charts = {chart.title: chart for chart in frontier(rows()).charts}
    (line,) = charts["prune, smollm2: 0.3, on Example"].guides
    # wanda: half as fast, perplexity 16; magnitude 1x, 32; nothing reached lies below the corner between them
    assert line.points == [(0.5, 16.0), (0.5, 32.0), (1.0, 32.0)]
    assert len(charts) == 3


def test_roofline_has_measurements_filled_bounds_hollow_and_the_roof():
    (chart,) = roofline(rows()).charts
    measured, bound = chart.series
    assert (measured.name, measured.hollow) == ("linear: triton", False)
    assert (measured.points[0].x, measured.points[0].y) == (16.0, 16.0)  # 16 TFLOP/s over 1 TB/s
    assert (bound.name, bound.hollow) == ("roofline: product", True)
    assert (bound.points[0].x, bound.points[0].y) == (32.0, pytest.approx(64.0))  # 32 GFLOP in 500 us
    (roof,) = chart.guides
    assert roof.name == "roof, bfloat16: 2,000 GB/s, 300 TFLOP/s"
    assert all(y == pytest.approx(min(2 * x, 300)) for x, y in roof.points)


def test_bounds_have_a_chart_of_their_own_that_says_so(tree, tmp_path):
    both = [
        row("select", "x", name, kind=kind, speedup=speedup, baseline="usual")
        for kind in ("measurement", "bound")
        for name, speedup in (("usual", 1.0), ("ours", 2.0))
    ]
    measured, bound = SECTIONS[0].build(both).charts
    assert (measured.bound, bound.bound) == (False, True)
    (file,) = write_report(both, tmp_path, png=False)
    shown = ElementTree.fromstring(file.read_text())
    captions = ["".join(part.itertext()) for part in shown.iter("figcaption")]
    assert captions == ["select on Example", "select on Examplebound, not measured"]
    assert [part.get("class") for part in shown.iter("rect")] == ["c0", "c0 hollow"]


def test_missing_rows_are_named(tmp_path):
    (file,) = write_report(rows()[:2], tmp_path, png=False)
    summary = text_of(ElementTree.fromstring(file.read_text()), "summary")
    assert "Not measured yet No row has tokens/s: trisparse bench run tokens" in summary


def test_many_cases_are_folded_away(tmp_path):
    many = [row("select", f"case {i}", "ours", baseline="usual", speedup=2.0) for i in range(20)]
    (file,) = write_report(many, tmp_path, png=False)
    assert "Show 13 more cases" in file.read_text()  # the mean and seven cases come first


def test_numbers():
    assert [number(value) for value in (0, 0.012346, 12345.6, 1.5e9, math.inf)] == [
        "0",
        "0.01235",
        "12,346",
        "1.5e9",
        "∞",
    ]
    assert [seconds(value) for value in (2, 0.0025, 3e-6, 4e-9)] == ["2 s", "2.5 ms", "3 µs", "4 ns"]
    assert [size(value) for value in (12, 1234, 270e6, 3.2e9)] == ["12 B", "1.23 kB", "270 MB", "3.2 GB"]
    assert (ratio(0.2134), signed(1.5), signed(-1.5)) == ("0.213×", "+1.5", "−1.5")


def test_scales():
    assert Scale(0, 10, log=False).share(2.5) == 0.25
    assert Scale(1, 100, log=True).share(10) == pytest.approx(0.5)
    assert Scale(0, 10, log=False).ticks(5) == [0, 2, 4, 6, 8, 10]
    assert Scale(0.8, 120, log=True).ticks(4) == [1, 10, 100]
    groups = [("a", [Bar("x", 1.0, 0)]), ("b", [Bar("x", 100.0, 0)])]
    apart = Bars("name", "title", "tokens/s", groups, number)
    assert [scale.high for scale in apart.scales] == [1.0, 100.0]
    assert apart.label == "tokens/s; each case has a scale of its own"


def test_two_models_have_charts_of_their_own():
    both = [row("tokens", "prefill", "dense", tokens_per_s=9.0, parameters={"model": name}) for name in ("a", "b")]
    assert newest(both) == both
    assert [chart.title for chart in SECTIONS[1].build(both).charts] == [
        "Prefill, tokens, a on Example",
        "Prefill, tokens, b on Example",
    ]


def test_no_rows_are_an_error(tmp_path, trisparse_error):
    with pytest.raises(ValueError, match="there are no rows to report"):
        write_report([], tmp_path)
    assert f"there are no rows at {tmp_path / 'x'}" in trisparse_error("bench", "report", tmp_path / "x")
    assert "holds no rows (*.jsonl)" in trisparse_error("bench", "report", tmp_path)
    assert "--dirty is for bench/results/dirty" in trisparse_error("bench", "report", tmp_path, "--dirty")


def test_command_writes_the_newest_rows_and_pngs_that_are_not_blank(tmp_path, trisparse_command):
    pytest.importorskip("matplotlib")
    case = {"case": "row 50%, 4096x4096", "baseline": "usual"}
    append_rows([row("select", contestant="trisparse", speedup=99.0, **case)], tmp_path / "rows" / "a.jsonl")
    few = [found for found in rows() if found.benchmark in ("select", "linear", "roofline")]
    append_rows([*few, row("select", contestant=EVIL, speedup=3.0, **case)], tmp_path / "rows" / "b.jsonl")
    out = tmp_path / "out"
    said = trisparse_command("bench", "report", tmp_path / "rows", "--out", out)
    files = sorted(out.glob("*.png"))
    assert said == f"wrote {out / 'index.html'} and 2 PNGs\n"
    assert [file.name for file in files] == ["roofline-gpu.png", "speed-up-select-example.png"]
    for file in files:
        assert len(Image.open(file).convert("RGB").getcolors(1 << 24)) > 20
    assert "99×" not in (out / "index.html").read_text()


def test_charts_of_one_file_name_get_a_number(tmp_path):
    pytest.importorskip("matplotlib")
    both = [row(name, "x", "ours", baseline="usual", speedup=2.0) for name in ("a b", "a-b")]
    names = [file.name for file in write_report(both, tmp_path)]
    assert names == ["index.html", "speed-up-a-b-example.png", "speed-up-a-b-example-2.png"]


def test_a_png_of_many_cases_is_no_longer_than_that_of_those_the_page_shows(tmp_path):
    pytest.importorskip("matplotlib")
    sizes = []
    for cases in (7, 8, 200):  # the means come first
        many = [row("select", f"case {n}", "ours", baseline="usual", speedup=2.0) for n in range(cases)]
        _, file = write_report(many, tmp_path / str(cases))
        sizes.append(Image.open(file).size)
    assert sizes[0] == sizes[1] == sizes[2]


def test_the_line_of_the_reference_does_not_cross_the_cases(tmp_path):
    pytest.importorskip("matplotlib")
    from trisparse.bench.report import png

    bars = Bars("name", "title", "x", [("a case" * 9, [Bar("x", 2.0, 0)])], number, reference=1.0)
    (axes,) = png._bars(bars).axes
    (label,) = (text for text in axes.texts if text.get_text().startswith("a case"))
    assert label.get_bbox_patch() is not None
    assert label.get_zorder() > max(line.get_zorder() for line in axes.lines)


def test_pngs_without_matplotlib_say_what_to_install(tmp_path, monkeypatch, trisparse_error):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    append_rows(rows(), tmp_path / "rows.jsonl")
    said = trisparse_error("bench", "report", tmp_path / "rows.jsonl", "--out", tmp_path / "out")
    assert "pip install 'trisparse[plot]', or give --no-png" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 390])
def test_browser_shows_both_themes_without_errors_or_overflow(chromium, page, width):
    shown = {}
    for scheme in ("light", "dark"):
        chromium.open(page.as_uri(), width=width, scheme=scheme)
        chromium.run("document.querySelectorAll('details').forEach(part => { part.open = true; })")
        assert chromium.run("document.documentElement.scrollWidth") <= width
        path = page.with_name(f"{width}-{scheme}.png")
        path.write_bytes(chromium.screenshot())
        shown[scheme] = Image.open(path).convert("RGB")
    assert not chromium.problems
    assert all(picture.size == (width, 900) for picture in shown.values())
    assert all(len(picture.getcolors(1 << 24)) > 50 for picture in shown.values())  # not blank
    brightness = {scheme: ImageStat.Stat(picture.convert("L")).mean[0] for scheme, picture in shown.items()}
    assert brightness["light"] > 200 > 60 > brightness["dark"]


@pytest.mark.browser
def test_browser_switches_the_theme_by_keyboard_and_by_address(chromium, page):
    theme = "getComputedStyle(document.documentElement).colorScheme"
    chromium.open(page.as_uri() + "?theme=dark", width=800, scheme="light")
    assert chromium.run(theme) == "dark"
    chromium.press("Tab")
    assert chromium.run("document.activeElement.id") == "theme"
    chromium.press("Enter")
    assert chromium.run(theme) == "light"
    assert not chromium.problems
