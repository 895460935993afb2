"""The table of field reports: append-only, in any database that SQLAlchemy knows."""

import json
from collections.abc import Iterable
from datetime import UTC, datetime

import sqlalchemy as sql

from esper.append_only import open_database
from esper.controller.adaptations import FieldReport

_META = sql.MetaData()
_TABLE = sql.Table(
    "field_reports",
    _META,
    sql.Column("number", sql.Integer, primary_key=True),
    sql.Column("stored_at", sql.String(40), nullable=False),
    sql.Column("request_id", sql.String(128), nullable=False, unique=True),
    sql.Column("model", sql.String(200), nullable=False),
    sql.Column("policy", sql.String(200), nullable=False),
    sql.Column("outcome", sql.String(20), nullable=False),
    # everything, as JSON; the columns beside it are for people who look
    sql.Column("report", sql.Text, nullable=False),
)


class FieldReports:
    """The table.

    Args:
        url: SQLAlchemy URL.

    Raises:
        ConfigError: If the database cannot be used.
    """

    def __init__(self, url: str) -> None:
        self._engine = open_database(url, _META)

    def append(self, reports: Iterable[FieldReport]) -> list[FieldReport]:
        """Store reports, all or none; a request id that is stored already is left as it is.

        Returns:
            Those that were new.
        """
        new = {r.request_id: r for r in reports}
        while new:
            known = sql.select(_TABLE.c.request_id).where(_TABLE.c.request_id.in_(list(new)))
            with self._engine.connect() as connection:
                for request_id in connection.execute(known).scalars():
                    del new[request_id]
            try:
                with self._engine.begin() as connection:
                    if new:
                        connection.execute(sql.insert(_TABLE), [_row(r) for r in new.values()])
                break
            except sql.exc.IntegrityError:
                # somebody stored one of them meanwhile; it is found the next time
                continue
        return list(new.values())

    def read(self, after: int = 0) -> list[FieldReport]:
        """Reports in the order of their arrival.

        Args:
            after: How many of the first to leave out.
        """
        query = sql.select(_TABLE.c.report).order_by(_TABLE.c.number).offset(after)
        with self._engine.connect() as connection:
            return [
                FieldReport.model_validate(json.loads(text))
                for text in connection.execute(query).scalars()
            ]


def _row(report: FieldReport) -> dict[str, str]:
    return {
        "stored_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": report.request_id,
        "model": report.model,
        "policy": report.policy,
        "outcome": report.outcome,
        "report": report.model_dump_json(),
    }
