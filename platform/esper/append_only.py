"""Tables whose rows are never changed, in any database that SQLAlchemy knows."""

import sqlalchemy as sql

from esper.config.base import ConfigError

_TRIES = 3


def open_database(url: str, tables: sql.MetaData) -> sql.Engine:
    """A database with such tables, which are made if need be.

    On SQLite, triggers refuse changes; elsewhere, grant INSERT and SELECT alone.

    Args:
        url: SQLAlchemy URL.
        tables: The tables.

    Raises:
        ConfigError: If it cannot be used.
    """
    try:
        engine = sql.create_engine(url)
        for tries_left in range(_TRIES - 1, -1, -1):
            try:
                _make(engine, tables)
                break
            except sql.exc.OperationalError:
                # another process may just be making the same tables
                if not tries_left:
                    raise
    except (sql.exc.SQLAlchemyError, ImportError) as error:
        # a password may stand in the URL
        shown = url.partition("@")[2] or url
        raise ConfigError("database", (
            f"{shown} must be a database that can be written, but: "
            f"{str(error).splitlines()[0]}.",
        )) from None  # fmt: skip
    return engine


def _make(engine: sql.Engine, tables: sql.MetaData) -> None:
    with engine.begin() as connection:
        tables.create_all(connection)
        if connection.dialect.name == "sqlite":
            for table in tables.tables:
                for deed in ("update", "delete"):
                    connection.execute(sql.text(
                        f"CREATE TRIGGER IF NOT EXISTS {table}_no_{deed} BEFORE {deed} ON "
                        f"{table} BEGIN SELECT RAISE(ABORT, 'rows are never changed'); END"
                    ))  # fmt: skip
