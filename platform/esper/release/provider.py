"""Esper's flags behind the OpenFeature interface, so that another backend can take their place.

Code that asks an OpenFeature client does not know who answers: `api.set_provider(EsperProvider(
snapshot(...)))` here, flagd or a vendor's provider elsewhere. The targeting key is the model.
"""

from collections.abc import Mapping, Sequence
from typing import NoReturn

from openfeature.evaluation_context import EvaluationContext
from openfeature.event import ProviderEventDetails
from openfeature.exception import FlagNotFoundError, TypeMismatchError
from openfeature.flag_evaluation import FlagResolutionDetails, FlagValueType
from openfeature.flag_evaluation import Reason as StandardReason
from openfeature.provider import AbstractProvider, Metadata

from esper.release.errors import UnknownFlagError
from esper.release.flags import Attribute
from esper.release.snapshot import Reason, Snapshot

STANDARD_REASON = {
    Reason.ENVIRONMENT: StandardReason.STATIC,
    Reason.KILLED: StandardReason.DISABLED,
    Reason.BLOCKED: StandardReason.TARGETING_MATCH,
    Reason.PREREQUISITE: StandardReason.TARGETING_MATCH,
    Reason.ALLOWED: StandardReason.TARGETING_MATCH,
    Reason.RULE: StandardReason.TARGETING_MATCH,
    Reason.IN_ROLLOUT: StandardReason.SPLIT,
    Reason.OUT_OF_ROLLOUT: StandardReason.SPLIT,
    Reason.NO_MODEL: StandardReason.DEFAULT,
    Reason.DEFAULT: StandardReason.STATIC,
}


class EsperProvider(AbstractProvider):
    """Answers from a snapshot until it is given another.

    Args:
        snapshot: What it answers from.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__()
        self._snapshot = snapshot

    def replace(self, snapshot: Snapshot) -> None:
        """Answer from another snapshot from now on, and tell whoever listens."""
        changed = list(dict.fromkeys((*self._snapshot.names(), *snapshot.names())))
        self._snapshot = snapshot
        self.emit_provider_configuration_changed(ProviderEventDetails(flags_changed=changed))

    def get_metadata(self) -> Metadata:
        """The provider's name."""
        return Metadata(name="esper")

    def resolve_boolean_details(
        self,
        flag_key: str,
        default_value: bool,
        evaluation_context: EvaluationContext | None = None,
    ) -> FlagResolutionDetails[bool]:
        """Whether the flag is on for the model that the targeting key names.

        Raises:
            FlagNotFoundError: If there is no such flag; a client then gives its own default.
        """
        context = evaluation_context or EvaluationContext()
        attributes: dict[str, Attribute] = {
            k: v for k, v in context.attributes.items() if isinstance(v, str | int | bool)
        }
        try:
            answer = self._snapshot.evaluate(flag_key, context.targeting_key, attributes)
        except UnknownFlagError as error:
            raise FlagNotFoundError(str(error)) from None
        return FlagResolutionDetails(
            value=answer.enabled,
            reason=STANDARD_REASON[answer.reason],
            variant="on" if answer.enabled else "off",
            flag_metadata={
                "reason": str(answer.reason),
                "detail": answer.detail,
                "flags_hash": self._snapshot.hash,
            },
        )

    def resolve_string_details(
        self,
        flag_key: str,
        default_value: str,
        evaluation_context: EvaluationContext | None = None,
    ) -> FlagResolutionDetails[str]:
        """Refused: flags are boolean."""
        self._refuse(flag_key)

    def resolve_integer_details(
        self,
        flag_key: str,
        default_value: int,
        evaluation_context: EvaluationContext | None = None,
    ) -> FlagResolutionDetails[int]:
        """Refused: flags are boolean."""
        self._refuse(flag_key)

    def resolve_float_details(
        self,
        flag_key: str,
        default_value: float,
        evaluation_context: EvaluationContext | None = None,
    ) -> FlagResolutionDetails[float]:
        """Refused: flags are boolean."""
        self._refuse(flag_key)

    def resolve_object_details(
        self,
        flag_key: str,
        default_value: Sequence[FlagValueType] | Mapping[str, FlagValueType],
        evaluation_context: EvaluationContext | None = None,
    ) -> FlagResolutionDetails[Sequence[FlagValueType] | Mapping[str, FlagValueType]]:
        """Refused: flags are boolean."""
        self._refuse(flag_key)

    def _refuse(self, flag_key: str) -> NoReturn:
        if flag_key not in self._snapshot.names():
            raise FlagNotFoundError(str(UnknownFlagError(flag_key, self._snapshot.names())))
        raise TypeMismatchError(f"flag {flag_key} must be asked for as a boolean; it is on or off.")
