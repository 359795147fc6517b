"""The report: what it shows, what it must not show, and that it is a page without any network."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest

from bench.fake_results import ARMS, PROVENANCE, Fake, FakeArm, sampled, with_arm, write
from specdec.errors import ConfigError, SpecdecError
from specdec_bench.report.command import run_report
from specdec_bench.report.format import NONE, facts, fine, seconds, times
from specdec_bench.report.headline import stamps
from specdec_bench.report.options import ReportOptions
from specdec_bench.report.page import escaped, markdown, page
from specdec_bench.report.svg import NARROW, WIDE, Scale, spread, ticks
from specdec_bench.results.records import Results, Setting, ViewRecord
from specdec_bench.summary.intervals import Ratio
from specdec_bench.summary.summarize import summarize

EAGLE = "eagle3:depth=3,top_k=1"
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;|`*_"
STYLE = files("specdec_bench.report").joinpath("templates/style.css").read_text("utf-8")
VOID = {"meta", "br", "wbr"}
X = "\u00d7"  # the sign of multiplication
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Page(HTMLParser):
    """Reads a page strictly: every element is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words += data + " "


def shown(run: Fake | Results) -> Page:
    results = run.results() if isinstance(run, Fake) else run
    return Page(page(summarize(results)))


def test_page_is_closed_and_loads_nothing() -> None:
    found = shown(Fake(settings=(Setting(), Setting(batch=4))))
    names = {tag for tag, _ in found.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in found.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert "url(" not in (value or "")
            if name in ("src", "href", "xlink:href", "action", "srcset"):
                assert value is not None
                assert value.startswith("#")
    policy = next(a["content"] for t, a in found.tags if a.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert "url(" not in STYLE
    assert "@import" not in STYLE
    assert "@font-face" not in STYLE


def test_links_lead_somewhere() -> None:
    found = shown(Fake(settings=(Setting(), Setting(batch=4))))
    ids = [a["id"] for _, a in found.tags if "id" in a]
    assert len(ids) == len(set(ids))
    targets = [a["href"][1:] for t, a in found.tags if t == "a" and a["href"]]
    assert targets
    assert set(targets) <= set(ids)


def test_everything_that_the_issue_names_is_there() -> None:
    words = shown(Fake()).words
    for title in (
        "Speed-up", "Acceptance", "Where the time goes", "Theory and measurement", "By category",
        "Latency and memory", "Cost of a forward", "Token view", "Machine and versions",
    ):  # fmt: skip
        assert title in words
    assert words.index("A/A: loop0 over itself") < words.index(EAGLE, words.index("Speed-up"))
    assert "feed" * 16 in words


@pytest.mark.parametrize("drawing", ["wide", "narrow"])
def test_drawings_stay_inside_and_say_what_they_show(drawing: str) -> None:
    text = page(summarize(Fake().results()))
    svgs = re.findall(rf'<svg class="{drawing}".*?</svg>', text)
    assert len(svgs) == 4
    for svg in svgs:
        title, description = re.match(r".*?<title>(.*?)</title><desc>(.*?)</desc>", svg).groups()
        assert title
        assert description
        width, height = map(float, re.search(r'viewBox="0 0 (\d+) (\d+)"', svg).groups())
        assert width <= {"wide": WIDE, "narrow": NARROW}[drawing]
        for name, limit in (("x", width), ("y", height), ("cx", width), ("cy", height)):
            for value in re.findall(rf' {name}[12]?="(-?[\d.]+)"', svg):
                assert -0.5 <= float(value) <= limit + 0.5, (title, name)
        for x, w in re.findall(r'<rect[^>]* x="([\d.]+)"[^>]* width="([\d.]+)"', svg):
            assert float(x) + float(w) <= width + 0.5


def test_hostile_words_stay_words() -> None:
    arms = {**ARMS, f"arm{HOSTILE}": FakeArm(1.3, 2.0)}
    results = replace(
        Fake(arms=arms, categories=("code", HOSTILE)),
        provenance={**PROVENANCE, HOSTILE: {"a": [HOSTILE]}},
    ).results()
    view = ViewRecord(0, "prompt0/0", f"arm{HOSTILE}", HOSTILE, [[HOSTILE], ["\x00", "\u202e"]])
    found = shown(replace(results, views=[view]))
    assert not {"script", "img"} & {tag for tag, _ in found.tags}
    assert found.words.count(HOSTILE) > 5
    text = markdown(summarize(results))
    assert "<script" not in text.replace("\\<script", "")


def test_wrong_text_is_stamped_and_its_speed_is_nowhere() -> None:
    run = with_arm(Fake(noise=0.0, drift=0.0), EAGLE, wrong=(3,), speed=7.77)
    summary = summarize(run.results())
    html, text = page(summary), markdown(summary)
    found = Page(html)
    assert ("WRONG TEXT", "bad") in [(words, tone) for tone, words, _ in stamps(summary)]
    assert [a["class"] for t, a in found.tags if a.get("role") == "alert"] == ["stamp bad"]
    assert "WRONG TEXT, no speed-up" in found.words
    assert "> **WRONG TEXT**" in text
    for content in (html, text):
        every = set(re.findall(rf"(\d+\.\d+){X}", content))
        assert every <= {"1.00"}  # of no arm, and not of the wrong one only
        assert "WRONG TEXT, first at unit prompt3/0" in content.replace("\\", "")
        assert EAGLE not in content.partition("Where the time goes")[2].partition("By cat")[0]
    assert "this arm has WRONG texts" in found.words


def test_a_wrong_distribution_is_stamped() -> None:
    results = Fake(noise=0.0, drift=0.0).results()
    summary = summarize(replace(results, sampling=[sampled(EAGLE, False)]))
    assert [words for _, words, _ in stamps(summary)] == ["WRONG DISTRIBUTION"]
    html, text = page(summary), markdown(summary)
    assert "WRONG DISTRIBUTION, no speed-up" in Page(html).words
    for content in (html, text):
        assert f"1.62{X}" not in content
        assert f"1.21{X}" in content


def test_texts_that_are_not_promised_are_named() -> None:
    facts = {**PROVENANCE, "not_promised": {"0": ["hf_prompt_lookup"]}}
    hot = Fake(settings=(Setting(temperature=1.0),), provenance=facts)
    summary = summarize(with_arm(hot, "hf_prompt_lookup", own_texts=True).results())
    assert stamps(summary) == []
    html, text = page(summary), markdown(summary)
    for content in (html, text):
        assert "not promised" in content
        assert "check-sampling" in content.replace("\\", "")
    assert "<b>60 of 60</b>" in html
    assert "12 more are not promised to be" in html


def test_provenance_stands_at_the_head() -> None:
    facts = {
        **PROVENANCE,
        "device_name": "a chip",
        "time": "2026-01-01",
        "packages": {"torch": "9"},
    }
    facts["revision"] = "ab" * 20 + "+changes"
    summary = summarize(Fake(provenance=facts).results())
    line = "Run run0; specdec 0.1.0; torch 9; revision abababababab+changes; "
    line += "target feedfeedfeed; prompts beefbeefbeef; a chip; 1 thread; 2026-01-01"
    html, text = page(summary), markdown(summary)
    assert line in html.partition("</header>")[0]
    assert text.split("\n\n")[1] == escaped(line)


def test_markdown_has_what_the_charts_show() -> None:
    summary = summarize(Fake().results())
    text = markdown(summary)
    for arm in summary.settings[0].arms:
        found = arm.acceptance
        if found is None:
            continue
        cells = [f"{100 * found.histogram.get(n, 0) / found.rounds:.1f} %" for n in (1, 2)]
        cells = cells[: max(found.histogram)]
        assert f"| {escaped(arm.name)} | {found.rounds:,} | {' | '.join(cells)} |" in text
        for kind, rates in (("marginal", found.marginal), ("conditional", found.conditional)):
            shown = " | ".join(f"{100 * rate:.1f} %" for rate in rates)
            assert (f"| {escaped(arm.name)} | {kind} | {shown} |" in text) == bool(rates)


def test_stages_are_called_as_readers_know_them() -> None:
    text = markdown(summarize(Fake().results()))
    assert "| arm | draft | verify | accept | commit | host | round | prefill |" in text
    assert "observe" not in text


def test_on_a_gpu_the_split_is_not_judged() -> None:
    facts = {**PROVENANCE, "device": "cuda"}
    here, there = (
        summarize(Fake(provenance=f, settings=(Setting(),)).results()) for f in (PROVENANCE, facts)
    )
    assert "laps of the host" not in page(here)
    assert "beyond 15 % it is marked" in page(here)
    for content in (page(there), markdown(there)):
        assert "laps of the host" in content
        assert "is marked" not in content
    note = page(here).partition("Predicted and measured")[2]
    assert 'class="warn"' in note
    assert 'class="warn"' not in page(there).partition("Predicted and measured")[2]


def test_noise_is_stamped() -> None:
    noisy = summarize(Fake(noise=0.6, prompts=6).results())
    assert [words for _, words, _ in stamps(noisy)] == ["MACHINE TOO NOISY"]
    assert "MACHINE TOO NOISY" in page(noisy)
    assert "MACHINE TOO NOISY" in markdown(noisy)
    arms = {name: arm for name, arm in ARMS.items() if name != "loop0_again"}
    assert [w for _, w, _ in stamps(summarize(Fake(arms=arms).results()))] == ["NO A/A ROW"]
    assert stamps(summarize(Fake().results())) == []


def test_markdown_tables_have_as_many_cells_as_columns() -> None:
    text = markdown(summarize(Fake(categories=("a|b", "c\nd")).results()))
    tables = [block for block in text.strip().split("\n\n") if block.startswith("|")]
    assert len(tables) == 10
    for block in tables:
        cells = {len(re.findall(r"(?<!\\)\|", line)) for line in block.split("\n")}
        assert len(cells) == 1, block
    assert "A/A: loop0 over itself" in text
    assert escaped("a_b*<c>|\n`d`") == r"a\_b\*\<c\>\| \`d\`"


def test_figures_are_those_of_the_summary() -> None:
    summary = summarize(Fake().results())
    html, text = page(summary), markdown(summary)
    for arm in summary.settings[0].arms:
        if arm.gain is not None:
            assert escaped(times(arm.gain.wall)) in text
            assert f"wall: {times(arm.gain.wall)}" in html
        if arm.costs is not None and arm.costs.residual is not None:
            assert f"{100 * arm.costs.residual:+.1f} %" in html


@pytest.mark.parametrize(
    "run",
    [
        Fake(prompts=1, pairs=1),
        Fake(arms={"loop0": FakeArm()}),
        Fake(arms={"loop0": FakeArm(), "slow": FakeArm(0.05, 1.0)}),
        Fake(arms={"loop0": FakeArm(), "server:x": FakeArm(2.0, 0, in_process=False)}),
        Fake(prompts=40, categories=[f"category {n}" for n in range(20)]),
        Fake(token_seconds=1e-9),
        Fake(token_seconds=1e4, prompts=2),
        with_arm(Fake(pairs=1), EAGLE, errors=range(12)),
        with_arm(Fake(), "loop0", wrong=(0,)),
        with_arm(Fake(), "eagle3:depth=3,top_k=1", tau=5.9),
        Fake(arms={**ARMS, **{f"arm {n}": FakeArm(1 + n / 10, 1 + n / 10) for n in range(20)}}),
    ],
    ids=lambda run: f"{run.prompts} prompts, {len(run.arms)} arms",
)
def test_odd_runs(run: Fake) -> None:
    summary = summarize(run.results())
    assert Page(page(summary)).words
    assert markdown(summary)
    for word in ("nan", f"inf{X}", "inf]", "inf "):
        assert word not in page(summary).lower().replace("provenance", "")


def test_runs_without_extras() -> None:
    results = replace(Fake().results(), curves={}, passes={}, views=[], checks=[])
    words = shown(results).words
    assert "Cost of a forward" not in words
    assert "None was recorded." in words


def test_words_for_figures() -> None:
    assert times(Ratio(1.234, 1.2, 1.27)) == f"1.23{X} [1.20, 1.27]"
    assert times(Ratio(1.234, 1.2, 1.27, "repeats")) == f"1.23{X} [1.20, 1.27]*"
    assert times(Ratio(1.2, 0, float("inf"), "nothing")) == f"1.20{X} [no interval]"
    assert fine(Ratio(1.0021, 0.99, 1.01)) == "1.002 [0.990, 1.010]"
    assert [seconds(s) for s in (12.3456, 0.01234, 1.5e-6, 0.0)] == [
        "12.3 s", "12.3 ms", "1.50 µs", "0.00 µs",
    ]  # fmt: skip
    assert facts({"a_b": {"c": [1, 2]}, "d": None, "e": True}) == [
        ("a b c", "1, 2"), ("d", NONE), ("e", "yes"),
    ]  # fmt: skip


def test_scales() -> None:
    assert ticks(0.9, 1.6, 8) == pytest.approx([0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6])
    assert ticks(1, 1) == [1]
    assert Scale(0, 10, 100, 200)(5) == 150
    assert Scale(0, 10, 100, 200)(99) == 200
    assert spread([10, 11, 40], 15) == [10, 25, 40]


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def mixed(colour: str, ground: str, share: float) -> str:
    parts = [
        round(share * int(colour[i : i + 2], 16) + (1 - share) * int(ground[i : i + 2], 16))
        for i in (1, 3, 5)
    ]
    return "#" + "".join(f"{part:02x}" for part in parts)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme: str) -> None:
    light, dark = (dict(re.findall(r"--(\w+): (#\w+)", part)) for part in STYLE.split("@media")[:2])
    colours = light if scheme == "light" else {**light, **dark}
    pairs = [("ink", "bg"), ("dim", "bg"), ("accent", "bg"), ("bad", "badbg"), ("warn", "warnbg")]
    pairs += [(name, "card") for name in ("ink", "dim", "good", "bad", "warn")]
    pairs += [(f"t{n}", "card") for n in range(6)]
    pairs += [(word, f"tok{n}") for n in range(4) for word in ("ink",)]
    for one, other in pairs:
        assert contrast(colours[one], colours[other]) >= 4.5, (one, other)
    for tint in ("c1", "slow"):  # of the table by category
        ground = mixed(colours[tint], colours["card"], 0.30)
        assert contrast(colours["ink"], ground) >= 4.5
        assert contrast(colours["dim"], ground) >= 3.5
    for n in range(6):  # shapes
        assert contrast(colours[f"c{n}"], colours["card"]) >= 3, n


def test_command_writes_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(Fake().results(), tmp_path / "run.jsonl")
    assert run_report(ReportOptions(source)) == 0
    folder = tmp_path / "run-report"
    assert sorted(p.name for p in folder.iterdir()) == ["report.html", "report.md"]
    assert "report.html: open it in a browser" in capsys.readouterr().out
    assert run_report(ReportOptions(source, tmp_path / "new" / "deep")) == 0
    assert (tmp_path / "new" / "deep" / "report.html").read_bytes() == (
        folder / "report.html"
    ).read_bytes()


def test_refused(tmp_path: Path) -> None:
    whole = write(Fake().results(), tmp_path / "run.jsonl")
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(SpecdecError, match="truncated"):
        run_report(ReportOptions(cut))
    assert not (tmp_path / "cut-report").exists()
    with pytest.raises(SpecdecError, match="cannot read"):
        run_report(ReportOptions(tmp_path / "none.jsonl"))
    with pytest.raises(ConfigError, match="is a file; give a folder"):
        run_report(ReportOptions(whole, whole))
    nothing = replace(Fake().results(), units={}, times=[], passes={}, checks=[], views=[])
    lines = 1 + len(nothing.curves)
    assert nothing.end is not None
    empty = write(replace(nothing, end=replace(nothing.end, records=lines)), tmp_path / "e.jsonl")
    with pytest.raises(SpecdecError, match="has no units"):
        run_report(ReportOptions(empty))


def test_half_a_surrogate_pair_is_written(tmp_path: Path) -> None:
    view = ViewRecord(0, "prompt0/0", "loop0", "\ud83d", [["\ude00", "x"]])
    source = write(replace(Fake().results(), views=[view] * 1), tmp_path / "run.jsonl")
    lines = source.read_text(encoding="utf-8").splitlines()
    last = json.loads(lines[-1])
    last["records"] = len(lines) - 1
    source.write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n", encoding="utf-8")
    assert run_report(ReportOptions(source)) == 0
    (tmp_path / "run-report" / "report.html").read_text(encoding="utf-8")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_browser_asks_for_nothing_and_complains_of_nothing(tmp_path: Path) -> None:
    source = write(Fake().results(), tmp_path / "run.jsonl")
    run_report(ReportOptions(source))
    log, place = tmp_path / "net.json", tmp_path / "run-report" / "report.html"
    assert CHROMIUM is not None
    done = subprocess.run(
        [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
            "--disable-background-networking", "--disable-component-update", "--no-first-run",
            f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}",
            "--window-size=390,800", "--dump-dom", place.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "Token view" in done.stdout
    assert "CONSOLE" not in done.stderr
    assert place.name in log.read_text(encoding="utf-8", errors="replace")
    document = re.findall(r'"initiator":"([^"]*)"', log.read_text(encoding="utf-8"))
    assert not [origin for origin in document if origin.startswith(("file", "null"))]
