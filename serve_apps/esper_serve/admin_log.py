"""The record of admin actions, and with it which policy is active: the one activated last.

An append-only table, each row chained to the one before it by a hash. Triggers refuse updates and
deletions on SQLite; on other databases, grant the service INSERT and SELECT alone. Every replica
reads the same table, so that an activation reaches all of them.
"""

import hashlib
import json
from datetime import UTC, datetime

import sqlalchemy as sql
from pydantic import Field

from esper.append_only import open_database
from esper.config.base import Config

_META = sql.MetaData()
_TABLE = sql.Table(
    "tamiyo_admin",
    _META,
    sql.Column("number", sql.Integer, primary_key=True, autoincrement=False),
    sql.Column("at", sql.String(40), nullable=False),
    sql.Column("actor", sql.String(64), nullable=False),
    sql.Column("policy", sql.String(200), nullable=False),
    sql.Column("reason", sql.Text, nullable=False),
    sql.Column("previous", sql.String(64), nullable=False),
    sql.Column("hash", sql.String(64), nullable=False),
)
_FIRST = "0" * 64
_TRIES = 5


class AdminLogError(RuntimeError):
    """The record does not hold together, or cannot be written."""


class Activation(Config):
    """One activation of a policy."""

    number: int = Field(description="From 1, without gaps.")
    at: str = Field(description="When (UTC, ISO 8601).")
    actor: str = Field(description="Name of the admin's token.")
    policy: str = Field(description="Version that was activated.")
    reason: str
    previous: str = Field(description="Hash of the record before it.")
    hash: str = Field(description="SHA-256 of everything else.")

    def computed_hash(self) -> str:
        """What `hash` must be."""
        content = json.dumps(self.model_dump(exclude={"hash"}), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()


class AdminLog:
    """The table in a database.

    Args:
        url: SQLAlchemy URL; the table is made if need be.

    Raises:
        ConfigError: If the database cannot be used.
    """

    def __init__(self, url: str) -> None:
        self._engine = open_database(url, _META)

    def last(self) -> Activation | None:
        """The activation in force; None before the first."""
        query = sql.select(_TABLE).order_by(_TABLE.c.number.desc()).limit(1)
        with self._engine.connect() as connection:
            row = connection.execute(query).mappings().first()
        return None if row is None else Activation(**row)

    def activate(self, policy: str, actor: str, reason: str) -> Activation:
        """Append an activation.

        Raises:
            AdminLogError: If others write at the same time, again and again.
        """
        for _ in range(_TRIES):
            last = self.last()
            record = Activation(
                number=1 if last is None else last.number + 1,
                at=datetime.now(UTC).isoformat(timespec="milliseconds"),
                actor=actor, policy=policy, reason=reason,
                previous=_FIRST if last is None else last.hash, hash="",
            )  # fmt: skip
            record = record.model_copy(update={"hash": record.computed_hash()})
            try:
                with self._engine.begin() as connection:
                    connection.execute(sql.insert(_TABLE), record.model_dump())
            except sql.exc.IntegrityError:
                continue
            return record
        raise AdminLogError(
            f"an activation must find its turn, but {_TRIES} others came first; try again."
        )

    def records(self) -> list[Activation]:
        """Every activation, oldest first, verified.

        Raises:
            AdminLogError: At the first record that does not follow the one before it.
        """
        with self._engine.connect() as connection:
            rows = connection.execute(sql.select(_TABLE).order_by(_TABLE.c.number)).mappings()
            found = [Activation(**row) for row in rows]
        previous = _FIRST
        for number, record in enumerate(found, start=1):
            fits = (record.number, record.previous) == (number, previous)
            if not fits or record.hash != record.computed_hash():
                raise AdminLogError(
                    f"record {record.number} must follow the one before it, but was changed or "
                    "one is missing; restore the database from a backup."
                )
            previous = record.hash
        return found
