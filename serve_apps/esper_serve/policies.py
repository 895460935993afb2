"""The policies of the service: which there are, which is asked, and what it decides."""

import json
import logging
import time
from collections import OrderedDict
from importlib import import_module

import numpy as np

from esper.config.base import ConfigError
from esper.config.run import GrowthConfig, build_options
from esper.controller import CONTROLLERS, Shield
from esper.controller.adaptations import draws_of
from esper.controller.base import ControllerOptions, may_grow, memory_of, remind
from esper.controller.wire import (
    ActionWire,
    DecideRequest,
    DecideResponse,
    ReportWire,
    WireError,
    report_hash,
)
from esper.monitoring.metrics import Exporter
from esper.release.errors import ReleaseError
from esper.release.snapshot import Snapshot, snapshot
from esper.seeds.actions import Germinate
from esper.seeds.report import Report, SiteReport
from esper_serve.admin_log import AdminLog
from esper_serve.guard import Refusal
from esper_serve.settings import ServiceSettings

_log = logging.getLogger(__name__)
# how long what other replicas or operators changed may go unnoticed
FRESH_S = 1.0
REMEMBERED = 4096


class Policies:
    """Every version, built once; decides, and remembers the latest answers by request id.

    Args:
        settings: Which versions there are.
        admin_log: Which of them is active.
        environ: The process's variables, for the flags.
        metrics: Where decisions are counted.

    Raises:
        ConfigError: If a version's controller or options do not exist, or a rollout's flags
            cannot be read.
        ReleaseError: If the flags lack the rollout's.
    """

    def __init__(
        self, settings: ServiceSettings, admin_log: AdminLog, environ: dict[str, str],
        metrics: Exporter,
    ) -> None:  # fmt: skip
        for module in settings.plugins:
            import_module(module)
        self._settings, self._admin_log, self._environ = settings, admin_log, environ
        self._metrics = metrics
        self.versions: dict[str, ControllerOptions] = {
            version: build_options(CONTROLLERS, plugin, f"policies.{version}")
            for version, plugin in settings.policies.items()
        }
        self._active: tuple[float, str] | None = None
        self._flags: tuple[float, Snapshot] | None = None
        self._answers: OrderedDict[tuple[str, str], tuple[str, str]] = OrderedDict()
        self.active(fresh=True)
        self.version_for("probe")

    def active(self, *, fresh: bool = False) -> str:
        """The active version, as of the last second or as of now.

        Raises:
            ConfigError: If it is none of the settings' policies.
        """
        now = time.monotonic()
        if fresh or self._active is None or now - self._active[0] > FRESH_S:
            last = self._admin_log.last()
            version = self._settings.active if last is None else last.policy
            if version not in self.versions:
                raise ConfigError("policies", (
                    f"the active version must be among them, but '{version}' is not; add it, or "
                    f"activate one of {', '.join(self.versions)}.",
                ))  # fmt: skip
            self._active = now, version
        return self._active[1]

    def version_for(self, model: str) -> str:
        """The version that a model gets which asks for none.

        Raises:
            ConfigError: If the file of flags cannot be read.
            ReleaseError: If it lacks the flag.
        """
        rollout = self._settings.rollout
        if rollout is None:
            return self.active()
        now = time.monotonic()
        if self._flags is None or now - self._flags[0] > FRESH_S:
            self._flags = now, snapshot(rollout.flags, self._environ)
        chosen = self._flags[1].evaluate(rollout.flag, model).enabled
        return rollout.policy if chosen else self.active()

    def decide(
        self, request: DecideRequest, asker: str, deadline_ms: int | None = None
    ) -> DecideResponse:
        """What a version does with a report. The same request id gets the same answer again.

        Args:
            request: The request.
            asker: Whose token it came with; request ids are each asker's own.
            deadline_ms: The request's deadline, for the answer.

        Raises:
            Refusal: If the version does not exist, the request id stood for another request, or
                the policy cannot decide on this report.
        """
        try:
            version = request.policy or self.version_for(request.model)
        except (ConfigError, ReleaseError) as error:
            # under the flags of before, a kill switch would not be seen
            raise Refusal(503, f"the flags must be readable, but: {error}", retry_s=1) from None
        options = self.versions.get(version)
        if options is None:
            raise Refusal(404, f"policy must be one of {', '.join(self.versions)}, "
                               f"but got '{version}'.")  # fmt: skip
        digest = report_hash(request.report, request.memory, request.seed)
        asked = f"{digest} {request.policy} {request.model}"
        key = asker, request.request_id
        if (known := self._answers.get(key)) is not None:
            if known[0] != asked:
                raise Refusal(409, f"request_id must be new for a new request, but "
                                   f"'{request.request_id}' was used; choose another.")  # fmt: skip
            first = DecideResponse.model_validate_json(known[1])
            return first.model_copy(update={"deadline_ms": deadline_ms})
        started = time.perf_counter()
        answer = self._decided(request, version, options, digest, deadline_ms)
        self._metrics.observe("esper_tamiyo_decision_seconds", time.perf_counter() - started)
        self._count(answer)
        # as texts, which the search for garbage need not look through
        self._answers[key] = asked, answer.model_dump_json()
        if len(self._answers) > REMEMBERED:
            self._answers.popitem(last=False)
        return answer

    def _decided(
        self, request: DecideRequest, version: str, options: ControllerOptions, digest: str,
        deadline_ms: int | None,
    ) -> DecideResponse:  # fmt: skip
        controller = options.build(request.seed)
        try:
            report = request.report.report()
            if request.memory is not None:
                remind(controller, json.loads(json.dumps(request.memory)))
            shield = Shield(controller)
            actions = shield.decide(report)
            draws = draws_of(controller)
            memory, grows = memory_of(controller), may_grow(controller, report.interval + 1)
        except WireError as error:
            raise Refusal(422, "the request must be one that can be decided on.",
                          (str(error),)) from None  # fmt: skip
        except Exception as error:
            # a decision depends on nothing but the request, so that trying again cannot help
            _log.exception("policy %s could not decide on request %s", version, request.request_id)
            raise Refusal(
                422, f"the report and memory must be such that '{version}' can decide, but: "
                f"{type(error).__name__}: {str(error)[:500]}",
            ) from None  # fmt: skip
        # our own, and checked again by whoever gets it
        return DecideResponse.model_construct(
            request_id=request.request_id,
            policy=version,
            report_hash=digest,
            actions=tuple(
                ActionWire.of(a, draws.get((a.site, a.seed)) if isinstance(a, Germinate) else None)
                for a in actions
            ),
            vetoes=tuple(f"{v.action}: {v.reason}" for v in shield.vetoes),
            memory=memory,
            may_grow=grows,
            deadline_ms=deadline_ms,
        )

    def _count(self, answer: DecideResponse) -> None:
        grown = [a.fields["blueprint"] for a in answer.actions if a.action == "Germinate"]
        kind, policy = "grow" if grown else "wait", answer.policy
        self._metrics.count("esper_tamiyo_decisions_total", policy=policy, kind=kind)
        for blueprint in grown:
            self._metrics.count(
                "esper_tamiyo_germinations_total", policy=policy, blueprint=str(blueprint)
            )
        self._metrics.count("esper_tamiyo_vetoes_total", len(answer.vetoes), policy=policy)

    def probe(self) -> None:
        """Decide once, on a small report, as the active version; for health checks.

        Raises:
            Refusal: If it cannot.
        """
        request = DecideRequest(request_id="probe", model="probe", report=_probe_report())
        self._decided(request, version := self.active(), self.versions[version], "", None)


def _probe_report() -> ReportWire:
    seeds = 4
    ints, floats = np.zeros(seeds, np.int32), np.full(seeds, 0.5, np.float32)
    site = SiteReport(
        name="probe", geometry="chunk", stage=ints, blueprint_id=ints, epochs=ints, graft_id=ints,
        alpha=floats * 0, progress=floats * 0, grad_energy=floats, bottleneck=floats,
        silent_frac=floats, variance=floats, dead_frac=floats, explained_frac=floats,
        graft_loss=floats, grad_ratio=floats, gain=floats, gain_se=floats,
        seed_parameters={"mlp_relu": 10, "mlp_gelu": 10}, unexplained=0.5,
    )  # fmt: skip
    return ReportWire.of(Report(
        interval=1, step=1, loss=1.0, held_out_loss=1.0, grad_norm=1.0, host_drift_frac=0.0,
        host_parameters=100, parameters=100, growth=GrowthConfig(), sites=(site,),
    ))  # fmt: skip
