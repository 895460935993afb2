"""Who may ask: bearer tokens with a role, of which only hashes are kept.

The file may be read by its owner alone. A token is 256 random bits, so that a plain SHA-256 of it
tells nobody anything; it is compared in constant time.
"""

import hashlib
import hmac
import secrets
import stat
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, field_validator

from esper.atomic import write_atomically
from esper.config.base import Config, ConfigError, read_yaml, validate

Role = Literal["client", "admin"]


class Token(Config):
    """One token: who has it, what for, and the hash of what they have."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    role: Role
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class _TokenFile(Config):
    tokens: tuple[Token, ...] = Field(min_length=1)

    @field_validator("tokens")
    @classmethod
    def _once(cls, tokens: tuple[Token, ...]) -> tuple[Token, ...]:
        names = [token.name for token in tokens]
        if twice := next((n for n in names if names.count(n) > 1), None):
            raise ValueError(f"names must be given once, but '{twice}' is given twice.")
        return tokens


def read_tokens(file: Path) -> tuple[Token, ...]:
    """Every token that is valid.

    Raises:
        ConfigError: If there is no such file, others than its owner may read it, or it is wrong.
    """
    how = "`esper serve token NAME` makes one"
    if not file.exists():
        raise ConfigError(str(file), (f"the file of tokens must exist, but does not; {how}.",))
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(str(file), (
            f"the file of tokens must be its owner's alone, but has mode {mode:o}; "
            f"`chmod 600 {file}`.",
        ))  # fmt: skip
    return validate(_TokenFile, read_yaml(file), source=str(file)).tokens


def add_token(file: Path, name: str, role: Role) -> str:
    """Make a token and keep its hash; the token itself is nowhere else.

    Args:
        file: File of tokens; made with its folder if need be.
        name: Who has it; the records of admin actions say this name.
        role: What it is for.

    Returns:
        The token.

    Raises:
        ConfigError: If the name is taken or malformed, or the file is wrong.
    """
    known = read_tokens(file) if file.exists() else ()
    secret = secrets.token_urlsafe(32)
    entry = {"name": name, "role": role, "sha256": _digest(secret.encode()).hex()}
    tokens = [*(token.model_dump() for token in known), entry]
    validate(_TokenFile, {"tokens": tokens}, source=str(file))
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # a new file is its owner's alone
    write_atomically(file, yaml.safe_dump({"tokens": tokens}, sort_keys=False).encode())
    return secret


def identify(tokens: tuple[Token, ...], authorization: bytes) -> Token | None:
    """Whose token an Authorization header holds; None if nobody's.

    Every token is compared, and each in constant time.
    """
    scheme, _, secret = authorization.partition(b" ")
    digest = _digest(secret.strip())
    found = None
    for token in tokens:
        if hmac.compare_digest(bytes.fromhex(token.sha256), digest):
            found = token
    return found if scheme.lower() == b"bearer" else None


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()
