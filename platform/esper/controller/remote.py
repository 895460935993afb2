"""A controller in another process: asks Tamiyo's service, and decides itself when that fails.

Training never waits for the service longer than a deadline, and after a few failures in a row it
does not ask for a while: an outage costs at most a hundredth of the time. A local controller sees
every report, so that it can decide at any moment; what it decides is used in an outage alone.

A decision is applied at most once, whatever the network does: the service changes nothing, a retry
bears the id of the request, and an answer that is not for this report is refused. Every action's
reason says who decided, and `sources` keeps where each change of the source happened and why.

What became of the adaptations goes to the service, too, when it answers; reports wait until then.
"""

import logging
import os
import time
import uuid
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import urllib3
from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from esper.config.base import ConfigError
from esper.config.run import Plugin, build_options
from esper.controller.adaptations import Adaptations, Draw, FieldReport, draws_of
from esper.controller.base import (
    CONTROLLERS,
    Controller,
    ControllerOptions,
    GrowthEvent,
    may_grow,
    memory_of,
    remind,
    switch,
)
from esper.controller.wire import (
    DEADLINE_HEADER,
    MSGPACK,
    DecideRequest,
    DecideResponse,
    FeedbackRequest,
    FeedbackResponse,
    ReportWire,
    WireError,
    pack,
    report_hash,
    unpack,
)
from esper.seeds.actions import Action
from esper.seeds.report import Report
from esper.surgery.growth_log import pack_action, unpack_action

_log = logging.getLogger(__name__)
FLAG = "tamiyo.remote"
TOKEN_VARIABLE = "ESPER_TAMIYO_TOKEN"
# of the time that an outage lasts, what it may cost
MAX_OUTAGE_FRAC = 0.01
# within the service's limit for a body even if each was drawn from 64 candidates
REPORTS_A_REQUEST = 32

AnyAnswer = TypeVar("AnyAnswer", DecideResponse, FeedbackResponse)


class RemoteError(RuntimeError):
    """The service gave no decision."""

    def __init__(self, cause: str, *, may_pass: bool = False) -> None:
        super().__init__(cause, may_pass)
        self.cause, self.may_pass = cause, may_pass

    def __str__(self) -> str:
        return self.cause


class Client:
    """One connection to the service.

    Args:
        options: Where it is, and how long to wait.

    Raises:
        ValueError: If there is no token.
    """

    def __init__(self, options: "RemoteOptions") -> None:
        self._options = options
        self._url = options.url.rstrip("/")
        self._headers = {
            "authorization": f"Bearer {options.token()}", "content-type": MSGPACK,
            "accept": MSGPACK,
        }  # fmt: skip
        self._pool = urllib3.PoolManager(retries=False)

    def decide(self, request: DecideRequest) -> DecideResponse:
        """Ask, and ask again as long as it may help and there is time.

        Raises:
            RemoteError: If no answer came in time, or none to this request.
        """
        answer = self._answer("/v1/decide", request.dump(binary=True), DecideResponse)
        digest = report_hash(request.report, request.memory, request.seed)
        if (answer.request_id, answer.report_hash) != (request.request_id, digest):
            raise RemoteError("the answer must be to this report, but is to another.")
        return answer

    def feed_back(self, reports: Sequence[FieldReport]) -> None:
        """Tell what became of adaptations; the service keeps each once, however often it is told.

        Raises:
            RemoteError: If no answer came in time, or they were refused.
        """
        request = FeedbackRequest(reports=tuple(reports))
        self._answer("/v1/feedback", request.model_dump(mode="json"), FeedbackResponse)

    def _answer(self, path: str, request: dict[str, Any], kind: type[AnyAnswer]) -> AnyAnswer:
        ends = time.monotonic() + self._options.deadline_s
        body = pack(request, MSGPACK)
        for tries_left in range(self._options.retries, -1, -1):
            left = ends - time.monotonic()
            # a replica that died may leave a try without an answer: the next one needs time, too
            until = ends - left / 2 if tries_left else ends
            try:
                return self._tried(path, body, kind, until, ends)
            except RemoteError as error:
                if not (error.may_pass and tries_left and time.monotonic() < ends):
                    raise
        raise AssertionError("the last try returns or raises")

    def _tried(
        self, path: str, body: bytes, kind: type[AnyAnswer], until: float, ends: float
    ) -> AnyAnswer:
        status, content, content_type = self._posted(path, body, until, ends)
        if status != 200:
            raise RemoteError(
                f"the service answered {status}: {_message(content)}", may_pass=status >= 500
            )
        try:
            return kind.model_validate(unpack(content, content_type))
        except (WireError, ValidationError) as error:
            raise RemoteError(
                f"the answer must be a {kind.__name__}, but: {str(error)[:300]}"
            ) from None

    def _posted(self, path: str, body: bytes, until: float, ends: float) -> tuple[int, bytes, str]:
        """Answer of one try, which waits for it until a time; the decision may take longer."""
        left = ends - time.monotonic()
        try:
            response = self._pool.request(
                "POST", self._url + path, body=body, preload_content=False, redirect=False,
                headers={**self._headers, DEADLINE_HEADER: str(max(1, int(1000 * left)))},
                timeout=urllib3.Timeout(total=max(until - time.monotonic(), 0.001)),
            )  # fmt: skip
            try:
                content = b""
                # a timeout counts from byte to byte: an answer that drips would never end
                while part := response.read1(1 << 16):
                    content += part
                    if time.monotonic() > until:
                        raise RemoteError("the answer did not come in time.", may_pass=True)
                return response.status, content, response.headers.get("content-type", "")
            finally:
                response.release_conn()
        except urllib3.exceptions.HTTPError as error:
            raise RemoteError(f"{type(error).__name__}: {error}"[:300], may_pass=True) from None


class RemoteController:
    """Asks the service, and falls back on a local controller.

    Args:
        options: Its settings.
        seed: Seed of the policy's draws.
        local: Decides when the service does not.

    Attributes:
        sources: Interval, source ('remote' or 'local') and cause of every change of the source.
        counts: Intervals that each of the sources decided.
    """

    def __init__(self, options: "RemoteOptions", seed: int, local: Controller) -> None:
        self._options, self._seed, self._local = options, seed, local
        self._client = Client(options)
        self._memory: dict[str, Any] | None = None
        self._may_grow = True
        # of this run, however often it goes back or is resumed
        self._run = uuid.uuid4().hex[:16]
        self._asked = 0
        self._failures = 0
        self._shut_until = 0.0
        self._off = False
        self._adaptations = Adaptations(options.model)
        # field reports by request id, until the service has them
        self._outbox: dict[str, FieldReport] = {}
        self._mute_until = 0.0
        self.sources: list[dict[str, Any]] = []
        self.counts = {"remote": 0, "local": 0}

    def decide(self, report: Report) -> list[Action]:
        """The service's actions, or the local controller's if it gives none in time."""
        own = self._local.decide(report)
        try:
            answer = self._answered(report)
            actions = [action.unpack() for action in answer.actions]
        except (RemoteError, WireError) as error:
            self._note(report.interval, "local", str(error))
            self._observe(report, own, "local", draws_of(self._local))
            return [_told(action, "local") for action in own]
        self._memory, self._may_grow = answer.memory, answer.may_grow
        self._note(report.interval, "remote", answer.policy)
        draws = {
            (action.site, action.seed): wire.draw
            for action, wire in zip(actions, answer.actions, strict=True)
            if wire.draw is not None
        }
        self._observe(report, actions, answer.policy, draws)
        self._deliver()
        return [_told(action, answer.policy) for action in actions]

    def _observe(
        self, report: Report, actions: list[Action], policy: str,
        draws: dict[tuple[str, int], Draw],
    ) -> None:  # fmt: skip
        ended = self._adaptations.observe(report, actions, policy, draws)
        self._outbox |= {field_report.request_id: field_report for field_report in ended}

    def _deliver(self) -> None:
        """Send what waits; after a failure nothing is sent for a while."""
        if not self._outbox or time.monotonic() < self._mute_until:
            return
        batch = [*self._outbox.values()][:REPORTS_A_REQUEST]
        try:
            self._client.feed_back(batch)
        except RemoteError as error:
            self._mute_until = time.monotonic() + self._options.rest_s
            _log.warning("%d field reports wait: %s", len(self._outbox), error)
            return
        for sent in batch:
            del self._outbox[sent.request_id]

    def _answered(self, report: Report) -> DecideResponse:
        if self._off:
            raise RemoteError(f"the flag {FLAG} is off.")
        if time.monotonic() < self._shut_until:
            raise RemoteError("the service failed just now and is not asked for a while.")
        self._asked += 1
        request = DecideRequest(
            request_id=f"{self._run}.{report.interval}.{self._asked}", model=self._options.model,
            policy=self._options.policy, seed=self._seed, memory=self._memory,
            report=ReportWire.of(report),
        )  # fmt: skip
        try:
            answer = self._client.decide(request)
        except RemoteError as error:
            self._failures += 1
            if self._failures >= self._options.max_failures:
                self._shut_until = time.monotonic() + self._options.rest_s
            raise error from None
        self._failures = 0
        return answer

    def _note(self, interval: int, source: Literal["remote", "local"], cause: str) -> None:
        self.counts[source] += 1
        if self.sources and self.sources[-1]["source"] == source:
            return
        self.sources.append({"interval": interval, "source": source, "cause": cause})
        level = logging.INFO if source == "remote" else logging.WARNING
        _log.log(level, "from interval %d on decisions are %s: %s", interval, source, cause)

    def may_grow(self, interval: int) -> bool:
        """What the service said last, or what the local controller says if that decides."""
        if self.sources and self.sources[-1]["source"] == "remote":
            return self._may_grow
        return may_grow(self._local, interval)

    def switch(self, on: Set[str]) -> Set[str]:
        """Ask the service, or let the local controller decide, as the flag says."""
        self._off = FLAG not in on
        return {FLAG} | switch(self._local, on)

    def state_dict(self) -> dict[str, Any]:
        """What the policy remembers, there and here, who decided when, and what waits."""
        return {
            "memory": self._memory,
            "may_grow": self._may_grow,
            "local": memory_of(self._local),
            "sources": [dict(change) for change in self.sources],
            "counts": dict(self.counts),
            "adaptations": self._adaptations.state_dict(),
            "outbox": [r.model_dump(mode="json") for r in self._outbox.values()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember what `state_dict` returned."""
        self._memory, self._may_grow = state["memory"], state["may_grow"]
        remind(self._local, state["local"])
        self._adaptations.load_state_dict(state["adaptations"])
        # what was found out since then stays; what was sent since then is known there
        then = [FieldReport.model_validate(r) for r in state["outbox"]]
        self._outbox = {r.request_id: r for r in then} | self._outbox
        # a run that goes back does not undo who decided what it goes back from
        if sum(self.counts.values()) <= sum(state["counts"].values()):
            self.sources = [dict(change) for change in state["sources"]]
            self.counts = dict(state["counts"])


def _told(action: Action, by: str) -> Action:
    """The action, with who decided in its reason."""
    line = pack_action(action)
    line["fields"]["reason"] = f"{line['fields']['reason']} [{by}]".lstrip()
    return unpack_action(line)


def _message(content: bytes) -> str:
    """What the body of a failure says."""
    try:
        error = unpack(content, "application/json")["error"]
        return " ".join([error["message"], *error["problems"]])[:500]
    except (WireError, KeyError, TypeError):
        return content[:200].decode("utf-8", "replace")


@CONTROLLERS.register("remote")
class RemoteOptions(ControllerOptions):
    """Where the service is, how long it is waited for, and who decides without it."""

    url: str = Field(
        "http://127.0.0.1:8000", pattern=r"^https?://", description="Of the service, without path."
    )
    model: str = Field(
        min_length=1, max_length=200, description="Name of the model, which rollouts mean."
    )
    policy: str | None = Field(
        None, description="Version; None: the one that the service has for the model."
    )
    token_file: Path | None = Field(
        None, description=f"File that holds the token alone; None: the variable {TOKEN_VARIABLE}."
    )
    deadline_s: PositiveFloat = Field(
        0.25, le=10, description="What a decision may take, with all its tries."
    )
    retries: NonNegativeInt = Field(
        2, description="Tries after the first, within the deadline: each but the last waits half "
        "of the time that is left.",
    )  # fmt: skip
    max_failures: PositiveInt = Field(
        3, description="Failures in a row after which the service is not asked for a while."
    )
    rest_s: PositiveFloat = Field(30.0, description="That while, in s; then one try is made.")
    local: Plugin = Field(
        Plugin(name="tamiyo"), description="The controller that decides when the service does not."
    )

    @field_validator("local")
    @classmethod
    def _here(cls, plugin: Plugin) -> Plugin:
        if plugin.name == "remote":
            raise ValueError("local must be a controller in this process, but got 'remote'.")
        try:
            build_options(CONTROLLERS, plugin, "local")
        except ConfigError as error:
            raise ValueError("; ".join(error.problems)) from None
        return plugin

    @model_validator(mode="after")
    def _cheap(self) -> Self:
        if self.deadline_s > MAX_OUTAGE_FRAC * self.rest_s:
            raise ValueError(
                f"rest_s must be at least {1 / MAX_OUTAGE_FRAC:.0f} deadlines "
                f"({self.deadline_s / MAX_OUTAGE_FRAC:g} s), or an outage costs more than "
                f"{MAX_OUTAGE_FRAC:.0%} of the time, but got {self.rest_s:g}."
            )
        return self

    def token(self) -> str:
        """The bearer token.

        Raises:
            ConfigError: If there is none.
        """
        if self.token_file is None:
            token = os.environ.get(TOKEN_VARIABLE, "").strip()
            where = f"the variable {TOKEN_VARIABLE}"
        else:
            where = str(self.token_file)
            file = self.token_file.expanduser()
            token = file.read_text(encoding="utf-8").strip() if file.is_file() else ""
        if not token or not token.isascii() or any(c.isspace() for c in token):
            raise ConfigError("controller", (
                f"{where} must hold the service's token, but does not; `esper serve token NAME` "
                "makes one where the service runs.",
            ))  # fmt: skip
        return token

    def build(self, seed: int, events: tuple[GrowthEvent, ...] = ()) -> Controller:
        """A remote controller with its local one.

        Raises:
            ConfigError: If there is no token.
        """
        local = build_options(CONTROLLERS, self.local, "controller.options.local")
        return RemoteController(self, seed, local.build(seed, events))
