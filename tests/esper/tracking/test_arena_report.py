"""The report of an arena: one file with every verdict, every figure and every picture in it."""

import re
from datetime import UTC, datetime
from html.parser import HTMLParser

import pytest
from PIL import Image

from esper.config.arena import Scale
from esper.evidence.arena import ArenaRegistration, TaskEvidence, summarise_arena
from esper.tracking.arena_pictures import fronts, performance_profiles, score_intervals
from esper.tracking.arena_report import headline, markdown_verdicts, write_report
from esper.tracking.pictures import growth_curves
from esper.tracking.style import SPARE_COLORS

FOLLOWERS = frozenset({"static-final", "random", "schedule"})
CONTROLS = ["host", "static-final", "random", "schedule", "peer<1>"]
REASON = "needs the package 'peer' & a licence"


def summarised(registration, records, zero="host"):
    absent = {"peer<1>": REASON}
    names = ("first", "second & last")
    tasks = {n: TaskEvidence(registration, records, FOLLOWERS, absent=absent) for n in names}
    draft = ArenaRegistration(
        arena="demo", treatment="esper", controls=CONTROLS, scale=Scale(zero=zero),
        sweeps=dict.fromkeys(names, registration.registration_hash),
        absent=dict.fromkeys(names, absent),
        registered_at=datetime(2026, 11, 23, tzinfo=UTC), registration_hash="",
    )  # fmt: skip
    return summarise_arena(draft.model_copy(update={"registration_hash": draft.digest()}), tasks)


@pytest.fixture(scope="module")
def summary(registration, sweep_records):
    return summarised(registration, sweep_records)


class Page(HTMLParser):
    """Collects text, images, and tags that were not closed."""

    def __init__(self, page):
        super().__init__()
        self.text, self.images, self.open = "", [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        elif tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def report(summary, tmp_path):
    pictures = {"Scores": score_intervals(summary, tmp_path / "scores.png")}
    of_tasks = {
        name: {"Front": fronts(summary, name, tmp_path / "front.png")} for name in summary.tasks
    }
    path = tmp_path / "deep" / "report.html"
    write_report(summary, pictures, of_tasks, "esper arena demo.yaml", path)
    return path.read_text(encoding="utf-8")


def test_the_report_is_one_file_that_holds_every_verdict_figure_and_picture(summary, tmp_path):
    html = report(summary, tmp_path)
    page = Page(html)
    assert page.open == []
    assert len(page.images) == 3
    assert all(src.startswith("data:image/png;base64,") for src in page.images)
    assert not re.search(r"https?:|<link|<script", html)
    for verdict in summary.verdicts():
        assert verdict.verdict in page.text
        assert verdict.rule in page.text
        assert f"{verdict.mean_difference:+.3g}" in page.text
    for task in summary.tasks.values():
        for method in task.methods.values():
            assert f"{method.arm.mean:.4g}" in page.text
            assert f"{method.arm.parameters_mean:,.0f}" in page.text
            assert f"{method.arm.train_flops_mean / 1e6:,.0f}" in page.text
    for name, aggregate in summary.aggregates.items():
        assert name in page.text
        assert f"{aggregate.iqm:z.3f}" in page.text
    assert "esper arena demo.yaml" in page.text
    assert "and 1 of the control collapsed" in page.text


def test_what_does_not_apply_is_shown_with_its_reason_and_names_are_escaped(summary, tmp_path):
    html = report(summary, tmp_path)
    assert "against peer&lt;1&gt;" in html
    assert "needs the package &#x27;peer&#x27; &amp; a licence" in html
    assert "second &amp; last" in html


def test_headline_and_markdown_say_the_same(summary):
    verdicts = [v.verdict for v in summary.verdicts()]
    assert headline(summary).startswith(f"esper: {verdicts.count('WIN')} WIN")
    assert headline(summary).endswith("of 8 comparisons")
    table = markdown_verdicts(summary)
    assert table.count("WIN") == verdicts.count("WIN") > 0
    assert "| peer<1> | not applicable | not applicable |" in table


def test_without_a_scale_the_report_says_why_and_nothing_is_drawn(
    registration, sweep_records, tmp_path
):
    unscaled = summarised(registration, sweep_records, zero="esper")
    with pytest.raises(ValueError, match="every task must have a scale to be drawn"):
        score_intervals(unscaled, tmp_path / "scores.png")
    path = write_report(unscaled, {}, {}, "again", tmp_path / "r.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert "No scores over tasks." in page.text
    assert "must be better than 'esper'" in page.text


def test_pictures_have_the_common_width_and_are_not_blank(summary, tmp_path):
    drawn = [
        score_intervals(summary, tmp_path / "a.png"),
        performance_profiles(summary, tmp_path / "b.png"),
        fronts(summary, "first", tmp_path / "c.png"),
    ]
    for path in drawn:
        with Image.open(path) as image:
            assert image.width == 900
            assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 50


def test_a_method_keeps_its_colour_where_another_is_absent(make_trial, tmp_path):
    """Alone, `zeta` would get the first spare colour; beside `alpha` it has the second."""
    records = [make_trial("zeta", pair) for pair in range(2)]
    path = growth_curves(records, "test_accuracy", tmp_path / "c.png", ["alpha", "zeta"])
    with Image.open(path) as image:
        drawn = {color for _, color in image.convert("RGB").getcolors(maxcolors=1 << 24)}
    first, second = (tuple(bytes.fromhex(c[1:])) for c in SPARE_COLORS[:2])
    assert second in drawn
    assert first not in drawn
