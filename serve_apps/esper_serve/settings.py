"""Settings of the service: what stands under `args` in Serve's own configuration file."""

from pathlib import Path
from typing import Self

from limits import parse
from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from esper.config.base import Config
from esper.config.run import Plugin

HEURISTIC = "heuristic-1"
# requests are counted in each replica
MEMORY = "memory://"


class RolloutSettings(Config):
    """A second policy for a share of the models, by a feature flag."""

    policy: str = Field(description="Version that models get for which the flag is on.")
    flags: Path = Field(description="File of flags; read again every second.")
    flag: str = Field("tamiyo.learned", description="The flag that decides for which models.")


class ServiceSettings(Config):
    """Which policies there are, who may ask, and how much."""

    home: Path = Field(
        Path("~/.esper/serve"),
        description="Folder of tokens.yaml and, without `database`, of tamiyo.db.",
    )
    database: str | None = Field(
        None,
        description="SQLAlchemy URL of field reports and admin actions, seen by every replica; "
        "null: SQLite in `home`.",
    )
    policies: dict[str, Plugin] = Field(
        {HEURISTIC: Plugin(name="tamiyo")},
        min_length=1,
        description="A controller and its options by version; a version never changes its meaning.",
    )
    active: str = Field(HEURISTIC, description="Version until an admin activates another.")
    rollout: RolloutSettings | None = Field(
        None, description="A second policy for a share of the models; null: none."
    )
    plugins: tuple[str, ...] = Field((), description="Modules to import: they register plug-ins.")
    rate_limit: str = Field(
        "1000/second", description="Requests of one token that are answered; the rest get 429."
    )
    rate_storage: str = Field(
        MEMORY,
        description="Where requests are counted: in each replica, or for all of them in a URL "
        "that the package `limits` knows, such as redis://host:6379.",
    )
    max_body_bytes: PositiveInt = Field(1 << 20, description="Longer bodies get 413.")
    max_deadline_s: PositiveFloat = Field(
        10.0, description="The longest that a request may take, and its time if it names none."
    )

    @field_validator("rate_limit")
    @classmethod
    def _a_rate(cls, text: str) -> str:
        try:
            parse(text)
        except ValueError:
            raise ValueError(
                f"rate_limit must be such as 100/second or 5000/minute, but got '{text}'."
            ) from None
        return text

    @model_validator(mode="after")
    def _known(self) -> Self:
        named = {"active": self.active}
        if self.rollout is not None:
            named["rollout.policy"] = self.rollout.policy
        for key, version in named.items():
            if version not in self.policies:
                raise ValueError(
                    f"{key} must be one of {', '.join(self.policies)}, but got '{version}'; "
                    "add it to policies."
                )
        return self

    @property
    def folder(self) -> Path:
        """`home` as an absolute path."""
        return self.home.expanduser().absolute()

    @property
    def tokens_file(self) -> Path:
        """Where the tokens are."""
        return self.folder / "tokens.yaml"

    @property
    def database_url(self) -> str:
        """The database, wherever it is."""
        return self.database or f"sqlite:///{self.folder / 'tamiyo.db'}"
