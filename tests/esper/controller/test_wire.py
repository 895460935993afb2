"""What is decided on over HTTP is what was measured, in every form of a body."""

import dataclasses
import json

import numpy as np
import pytest
from pydantic import ValidationError

from esper.controller.contract import random_reports
from esper.controller.wire import (
    JSON,
    MAX_SEEDS,
    MSGPACK,
    ActionWire,
    DecideRequest,
    ReportWire,
    WireError,
    pack,
    report_hash,
    unpack,
)
from esper.seeds.actions import Advance, Cancel, Cull, Germinate, Promote, Rollback
from esper.seeds.blueprints import BLUEPRINTS
from esper.seeds.report import Report, SiteReport


def request(report, **more):
    return DecideRequest(request_id="r-1", model="m", report=ReportWire.of(report), **more)


def body(report, kind):
    return pack(request(report).dump(kind == MSGPACK), kind)


def assert_equal(first, second):
    for field in dataclasses.fields(Report):
        if field.name != "sites":
            assert getattr(first, field.name) == getattr(second, field.name), field.name
    for one, two in zip(first.sites, second.sites, strict=True):
        for field in dataclasses.fields(SiteReport):
            np.testing.assert_array_equal(getattr(one, field.name), getattr(two, field.name))


def with_nan(report):
    sites = [
        dataclasses.replace(
            site,
            gain=np.where(np.arange(24) % 2, site.gain, np.nan).astype(np.float32),
            bottleneck=np.full(24, np.nan, np.float32),
            graft_loss=np.full(24, np.inf, np.float32),
            unexplained=float("nan"),
        )
        for site in report.sites
    ]
    return dataclasses.replace(report, sites=tuple(sites), held_out_loss=None)


@pytest.mark.parametrize("kind", [JSON, MSGPACK])
def test_a_report_comes_back_bit_for_bit(kind):
    for report in random_reports(0):
        for sent in (report, with_nan(report)):
            got = DecideRequest.model_validate(unpack(body(sent, kind), kind))
            assert_equal(got.report.report(), sent)
            assert report_hash(got.report, None, 3) == report_hash(ReportWire.of(sent), None, 3)


def test_lists_single_values_and_base64_say_the_same():
    report = with_nan(next(random_reports(0)))
    plain = request(report).dump(binary=False)
    for site, measured in zip(plain["report"]["sites"], report.sites, strict=True):
        for name in site["columns"]:
            values = getattr(measured, name)
            if not np.isinf(values).any():
                site["columns"][name] = [None if np.isnan(v) else v.item() for v in values]
    got = DecideRequest.model_validate(json.loads(json.dumps(plain)))
    assert_equal(got.report.report(), report)


def test_thousands_of_dormant_seeds_are_a_small_body():
    site = next(random_reports(0)).sites[0]
    columns = {
        f.name: np.zeros(MAX_SEEDS, getattr(site, f.name).dtype)
        for f in dataclasses.fields(SiteReport) if isinstance(getattr(site, f.name), np.ndarray)
    }  # fmt: skip
    columns["grad_energy"] = np.random.default_rng(0).random(MAX_SEEDS, dtype=np.float32)
    report = dataclasses.replace(
        next(random_reports(0)), sites=(dataclasses.replace(site, **columns),)
    )
    assert len(body(report, MSGPACK)) < 4 * MAX_SEEDS + 4_000


@pytest.mark.parametrize("change", ["value", "nan", "memory", "seed", "growth", "name"])
def test_the_hash_tells_every_difference(change):
    report = next(random_reports(0))
    before = report_hash(ReportWire.of(report), {"a": 1}, 0)
    site = report.sites[0]
    gain = site.gain.copy()
    gain[3] = np.nan if change == "nan" else np.nextafter(gain[3], np.float32(1))
    if change in ("value", "nan"):
        report = dataclasses.replace(report, sites=(dataclasses.replace(site, gain=gain),))
    if change == "name":
        report = dataclasses.replace(report, sites=(dataclasses.replace(site, name="other"),))
    if change == "growth":
        growth = report.growth.model_copy(update={"min_gain": 0.1})
        report = dataclasses.replace(report, growth=growth)
    memory = {"a": 2} if change == "memory" else {"a": 1}
    assert report_hash(ReportWire.of(report), memory, int(change == "seed")) != before


def test_indices_are_looked_up_by_name():
    report = next(random_reports(0))
    wire = ReportWire.of(report)
    turned = tuple(BLUEPRINTS)[::-1]
    sites = tuple(
        site.model_copy(
            update={
                "columns": {
                    **site.columns,
                    "blueprint_id": len(BLUEPRINTS) - 1 - site.columns["blueprint_id"],
                }
            }
        )
        for site in wire.sites
    )
    there = wire.model_copy(update={"blueprints": turned, "sites": sites})
    assert_equal(there.report(), report)
    names = tuple("nobodys" if n == "mlp_relu" else n for n in wire.blueprints)
    with pytest.raises(WireError, match="nobodys"):
        wire.model_copy(update={"blueprints": names}).report()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("columns", "alpha"), [0.1], "alpha must have one value for each of the 24 seeds"),
        (("columns", "alpha"), "not base64!", "alpha must be base64"),
        (("columns", "alpha"), "AAAA", "alpha must be 96 bytes"),
        (("columns", "alpha"), [True] * 24, "alpha must be numbers"),
        (("columns", "stage"), [0.5] * 24, "stage must be whole numbers"),
        (("columns", "stage"), 99, "sites.0.columns.stage must be in 0..10"),
        (("columns", "graft_id"), -1, "sites.0.columns.graft_id must be in"),
        (("columns", "nonsense"), 1, "must be one of"),
        (("seeds",), MAX_SEEDS + 1, "less than or equal to 4096"),
        (("geometry",), "sphere", "chunk"),
        (("name",), "span->span", "names of their own"),
    ],
)
def test_what_is_wrong_is_said(path, value, message):
    plain = request(next(random_reports(0))).dump(binary=False)
    place = plain["report"]["sites"][0]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValidationError, match=message):
        DecideRequest.model_validate(plain)


def test_a_missing_column_is_an_error():
    plain = request(next(random_reports(0))).dump(binary=False)
    del plain["report"]["sites"][1]["columns"]["gain"]
    with pytest.raises(ValidationError, match="gain must be given"):
        DecideRequest.model_validate(plain)


def test_too_many_seeds_are_refused_where_they_are():
    site = next(random_reports(0)).sites[0]
    many = {
        f.name: np.resize(getattr(site, f.name), MAX_SEEDS + 1)
        for f in dataclasses.fields(SiteReport) if isinstance(getattr(site, f.name), np.ndarray)
    }  # fmt: skip
    report = dataclasses.replace(
        next(random_reports(0)), sites=(dataclasses.replace(site, **many),)
    )
    with pytest.raises(WireError, match="at most 4096 seeds"):
        ReportWire.of(report)


def test_bodies_that_are_no_bodies():
    with pytest.raises(WireError, match="must be application/json"):
        unpack(b"{", JSON)
    with pytest.raises(WireError, match="must be application/msgpack"):
        unpack(b"\xc1", MSGPACK)
    with pytest.raises(WireError, match="but got 'text/plain'"):
        unpack(b"", "text/plain; charset=utf-8")
    with pytest.raises(WireError, match="application/json"):
        unpack(b"[" * 100_000, JSON)


def test_actions_travel():
    for action in (
        Germinate("a", 1, "glu", "cosine", "why"), Promote("a", 2, "why"), Advance("a", 3),
        Cull("a", 4, "why"), Cancel("a", 5), Rollback("a", 6, "why"),
    ):  # fmt: skip
        wire = ActionWire.model_validate_json(ActionWire.of(action, None).model_dump_json())
        assert wire.unpack() == action
    with pytest.raises(WireError, match="Cull must have its fields"):
        ActionWire(action="Cull", fields={"nowhere": 1}).unpack()
