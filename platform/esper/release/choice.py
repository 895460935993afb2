"""What the flags of the migration choose for a run: how its seeds compute, and whether it grows.

release.snapshots   off: the flags are read and recorded, but the run's own settings apply
kasmina.parallel    off: one seed after another, as the legacy layer does
kasmina.triton      off: all seeds at once in plain PyTorch; on: by the kernels
kasmina.lifecycle   off: no new seed is woken; those that live go on under their gates
tamiyo.remote       off: a remote controller does not ask the service, and its local one decides
tamiyo.learned      off: a learned controller decides as the heuristic one
"""

from collections.abc import Mapping

from esper.config.run import Execution, FlagsConfig
from esper.evidence.records import FlagsRecord
from esper.release.flags import ENVIRONMENT_VARIABLE
from esper.release.snapshot import Snapshot, snapshot

POLICIES = ("tamiyo.remote", "tamiyo.learned")


def read_choice(
    config: FlagsConfig, device: str, fixed: Execution, environ: Mapping[str, str]
) -> FlagsRecord:
    """Read the flags once, and say what they choose until they are read again.

    A file that cannot be read is an error at any time. To go on under the flags of before would
    mean not to see a kill switch, and to call them in force without knowing it.

    Args:
        config: File, model and environment.
        device: Where the run computes, such as 'cuda:0'.
        fixed: How it computes without flags.
        environ: The process's variables, `os.environ`.

    Raises:
        ConfigError: If the file or a variable is wrong.
        UnknownFlagError: If the file lacks a flag.
    """
    if config.environment is not None:
        environ = {**environ, ENVIRONMENT_VARIABLE: config.environment}
    return choose(snapshot(config.file, environ), config, device, fixed)


def choose(flags: Snapshot, config: FlagsConfig, device: str, fixed: Execution) -> FlagsRecord:
    """What a snapshot chooses; arguments and errors as for `read_choice`."""
    attributes = {"device": device.partition(":")[0]}

    def on(name: str) -> bool:
        return flags.evaluate(name, config.model, attributes).enabled

    if not on("release.snapshots"):
        return FlagsRecord(hash=flags.hash, execution=fixed, grows=True)
    if not on("kasmina.parallel"):
        execution: Execution = "loop"
    else:
        execution = "kernels" if on("kasmina.triton") else "vectorised"
    return FlagsRecord(
        hash=flags.hash, execution=execution, grows=on("kasmina.lifecycle"),
        policies=tuple(name for name in POLICIES if on(name)),
    )  # fmt: skip
