"""The HTTP interface: routes, their documentation, and what errors look like.

A plain FastAPI application that knows nothing of Ray, so that it can be tested, and run, alone.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Body, FastAPI, Request, Response
from fastapi.responses import PlainTextResponse
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field, ValidationError
from starlette.concurrency import run_in_threadpool

from esper import __version__
from esper.config.base import Config, explain
from esper.controller.adaptations import Candidate, FieldReport
from esper.controller.contract import random_reports
from esper.controller.field_reports import FieldReports
from esper.controller.wire import (
    JSON,
    MSGPACK,
    DecideRequest,
    DecideResponse,
    FeedbackRequest,
    FeedbackResponse,
    ReportWire,
    WireError,
    pack,
    unpack,
)
from esper.monitoring.metrics import Exporter, PrometheusExporter
from esper_serve.admin_log import AdminLog
from esper_serve.guard import OPEN, Asked, Guard, Refusal
from esper_serve.policies import Policies
from esper_serve.settings import ServiceSettings
from esper_serve.tokens import read_tokens

PROBED_S = 1.0
Parsed = TypeVar("Parsed", DecideRequest, FeedbackRequest)


class Problem(BaseModel):
    """What was wrong."""

    status: int = Field(description="The HTTP status.")
    message: str = Field(description="What must be otherwise.")
    problems: tuple[str, ...] = Field(description="One for each wrong field, with its path.")


class Failure(BaseModel):
    """The body of every answer that is not 200."""

    error: Problem = Field(description="Why there is no other answer.")


class PolicyInfo(Config):
    """One version of the policy."""

    version: str = Field(description="Name of the version.")
    controller: str = Field(description="Registered name of its controller.")
    options: dict[str, Any] = Field(description="Options of the controller.")
    active: bool = Field(description="Whether it answers requests that name no version.")


class ActivateRequest(Config):
    """Why a version is activated."""

    reason: str = Field(min_length=1, max_length=1000, description="It goes into the record.")


def create_app(settings: ServiceSettings, replica: str = "alone") -> FastAPI:
    """The application, ready to answer.

    Args:
        settings: Its settings.
        replica: Name of this replica, for its metrics.

    Raises:
        ConfigError: If a policy or the file of tokens is wrong, or the database cannot be used.
    """
    tokens = read_tokens(settings.tokens_file)
    admin_log = AdminLog(settings.database_url)
    metrics = PrometheusExporter("esper_tamiyo", constant={"replica": replica})
    policies = Policies(settings, admin_log, dict(os.environ), metrics)
    policies.probe()
    app = FastAPI(
        title="Tamiyo", version=__version__, docs_url="/docs", redoc_url=None,
        summary="Decides where, when and what a growing network grows.",
    )  # fmt: skip
    app.state.policies = policies
    _handle_errors(app)
    _add_health(app, policies)
    _add_metrics(app, policies, metrics)
    _add_decide(app, policies)
    _add_feedback(app, FieldReports(settings.database_url), metrics)
    _add_policies(app, settings, policies, admin_log)
    app.add_middleware(
        Guard, settings=settings, tokens=tokens,
        answered=lambda route, status: metrics.count(
            "esper_tamiyo_requests_total", route=route, status=str(status)
        ),
    )  # fmt: skip
    _describe(app)
    return app


def _who(request: Request) -> Asked:
    asked: Asked = request.scope["esper"]
    return asked


_CODES = {
    400: "The body is not what its content type says.",
    401: "No valid token.",
    403: "The token's role does not suffice.",
    404: "There is no such policy.",
    408: "The body did not arrive before the deadline.",
    409: "The request id stood for another request.",
    413: "The body is too long.",
    415: "The content type is neither JSON nor MessagePack.",
    422: "A field is wrong, or the policy cannot decide on this report; trying again is no use.",
    429: "Too many requests.",
    500: "A fault of the service; its log knows more.",
    503: "Too busy, or not ready.",
}


def _failures(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {s: {"model": Failure, "description": _CODES[s]} for s in statuses}


_COMMON = (400, 401, 408, 413, 422, 429, 500, 503)


class _Direct(APIRoute):
    """A route whose function takes the request and makes the response: nothing to work out."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The function itself."""
        return self.endpoint


def _add_decide(app: FastAPI, policies: Policies) -> None:
    routes = APIRouter(route_class=_Direct)

    @routes.post(
        "/v1/decide",
        response_model=DecideResponse,
        responses=_failures(*_COMMON, 404, 409, 415),
        openapi_extra={"requestBody": _request_body("DecideRequest", example())},
        tags=["decisions"],
    )
    async def decide(request: Request) -> Response:
        """Decide what a run grows, keeps and culls.

        The answer depends on the report, the memory, the seed and the policy's version alone.
        Send the answer's `memory` with the run's next report.
        """
        who, kind = _who(request), request.headers.get("content-type", "")
        asked = _parsed(DecideRequest, await request.body(), kind)
        who.require_time()
        answer = policies.decide(asked, who.token.name, who.deadline_ms)
        who.require_time()
        wanted = MSGPACK if MSGPACK in request.headers.get("accept", "") else JSON
        return Response(pack(answer.model_dump(mode="json"), wanted), media_type=wanted)

    app.include_router(routes)


def _add_feedback(app: FastAPI, field_reports: FieldReports, metrics: Exporter) -> None:
    @app.post(
        "/v1/feedback",
        response_model=FeedbackResponse,
        responses=_failures(*_COMMON, 415),
        openapi_extra={"requestBody": _request_body("FeedbackRequest", example_feedback())},
        tags=["decisions"],
    )
    async def feedback(request: Request) -> FeedbackResponse:
        """Tell what became of adaptations; policies learn from it.

        A report whose request id was stored before is left as it was.
        """
        who, kind = _who(request), request.headers.get("content-type", "")
        told = _parsed(FeedbackRequest, await request.body(), kind)
        who.require_time()
        # other requests are answered while the database works
        stored = await run_in_threadpool(field_reports.append, told.reports)
        for outcome, number in Counter(r.outcome for r in stored).items():
            metrics.count("esper_tamiyo_field_reports_total", number, outcome=outcome)
        return FeedbackResponse(stored=len(stored), known=len(told.reports) - len(stored))


def _add_policies(
    app: FastAPI, settings: ServiceSettings, policies: Policies, admin_log: AdminLog
) -> None:
    def info(version: str) -> PolicyInfo:
        return PolicyInfo(
            version=version,
            controller=settings.policies[version].name,
            options=policies.versions[version].model_dump(mode="json"),
            active=version == policies.active(fresh=True),
        )

    routes = APIRouter(prefix="/v1", tags=["policies"])
    failures = _failures(401, 408, 413, 422, 429, 500, 503)

    @routes.get("/policy", responses=failures)
    def policy() -> PolicyInfo:
        """The active policy."""
        return info(policies.active(fresh=True))

    @routes.get("/policies", responses=failures)
    def every_policy() -> list[PolicyInfo]:
        """All policies of the service."""
        return [info(version) for version in policies.versions]

    @routes.post("/policies/{version}:activate", responses=_failures(*_COMMON, 403, 404))
    def activate(
        version: str, why: Annotated[ActivateRequest, Body(embed=False)], request: Request
    ) -> PolicyInfo:
        """Let a version decide from now on, within a second on all replicas; admins only.

        Requests that name a version, and models that a rollout gives another one, are not affected.
        """
        who = _who(request)
        who.require_admin()
        if version not in policies.versions:
            known = ", ".join(policies.versions)
            raise Refusal(404, f"the policy must be one of {known}, but got '{version[:200]}'.")
        admin_log.activate(version, who.token.name, why.reason)
        return info(version)

    app.include_router(routes)


def _add_health(app: FastAPI, policies: Policies) -> None:
    probed: list[float] = []

    @app.get("/healthz", responses=_failures(503), tags=["operations"])
    async def healthz() -> dict[str, str]:
        """Whether decisions are made: makes one, at most once a second."""
        now = time.monotonic()
        if not probed or now - probed[-1] > PROBED_S:
            try:
                policies.probe()
            except Refusal as refusal:
                raise Refusal(503, refusal.message) from None
            probed[:] = [now]
        return {"status": "ok", "policy": policies.active()}

    @app.get("/readyz", responses=_failures(503), tags=["operations"])
    def readyz() -> dict[str, str]:
        """Whether requests may come: the policies are built and the database answers."""
        try:
            return {"status": "ready", "policy": policies.active(fresh=True)}
        except Exception as error:
            raise Refusal(503, f"the database must answer, but: {type(error).__name__}") from None


def _add_metrics(app: FastAPI, policies: Policies, metrics: PrometheusExporter) -> None:
    @app.get("/metrics", responses=_failures(401, 429), tags=["operations"])
    def show_metrics() -> PlainTextResponse:
        """Metrics of this replica, for Prometheus."""
        active = policies.active()
        for version in policies.versions:
            metrics.set("esper_tamiyo_policy_active", version == active, policy=version)
        text = generate_latest(metrics.registry).decode()
        return PlainTextResponse(text, media_type=CONTENT_TYPE_LATEST)


def _parsed(model: type[Parsed], body: bytes, content_type: str) -> Parsed:
    try:
        content = unpack(body, content_type)
    except WireError as error:
        status = 415 if "content type" in str(error) else 400
        raise Refusal(status, str(error)) from None
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise Refusal(422, "the request's fields must be valid.", explain(error)) from None


def _handle_errors(app: FastAPI) -> None:
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    def refused(refusal: Refusal) -> Response:
        return Response(refusal.body(), refusal.status, refusal.headers())

    async def own(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        return refused(error)

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        problems = tuple(
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}" for problem in error.errors()
        )
        return refused(Refusal(422, "the request's fields must be valid.", problems))

    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        response = refused(Refusal(error.status_code, str(error.detail)))
        response.headers.update(error.headers or {})
        return response

    async def unforeseen(_: Request, error: Exception) -> Response:
        # starlette raises it again for the log; nobody outside sees more than this
        return refused(Refusal(500, "the service has a fault; its log knows more."))

    app.add_exception_handler(Refusal, own)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unforeseen)


def _request_body(model: str, shown: dict[str, Any]) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{model}"}
    return {
        "required": True,
        "content": {
            JSON: {"schema": schema, "examples": {"a small one": {"value": shown}}},
            MSGPACK: {"schema": schema},
        },
    }


def example() -> dict[str, Any]:
    """A request that is answered, as plain values."""
    report = ReportWire.of(next(random_reports(0)))
    request = DecideRequest(request_id="run-7.interval-1", model="example", report=report)
    return request.dump(binary=False)


def example_feedback() -> dict[str, Any]:
    """A field report that is stored, as plain values."""
    chosen = Candidate(
        site="fc1", seed=17, blueprint="mlp_relu", graft="linear",
        features={"grad_energy": 0.31, "cost_frac": 0.004},
    )  # fmt: skip
    report = FieldReport(
        request_id="run-7.3.0.17", model="example", policy="heuristic-1", interval=3, ended=9,
        chosen=chosen, outcome="kept", before=0.412, after=0.398, gain_se=0.003,
    )  # fmt: skip
    return FeedbackRequest(reports=(report,)).model_dump(mode="json")


def _describe(app: FastAPI) -> None:
    """Add what FastAPI does not see: bodies that are parsed here, and the guard's tokens."""
    make: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = make()
            parts = schema["components"]["schemas"]
            for model in (DecideRequest, FeedbackRequest):
                form = model.model_json_schema(ref_template="#/components/schemas/{model}")
                parts |= form.pop("$defs")
                parts[model.__name__] = form
            schema["components"]["securitySchemes"] = {"bearer": {
                "type": "http", "scheme": "bearer", "description": "Made by `esper serve token`.",
            }}  # fmt: skip
            for path, deeds in schema["paths"].items():
                for deed in () if path in OPEN else deeds.values():
                    deed["security"] = [{"bearer": []}]
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
