"""Everything about a server that its operator can set. Each option of `nanoworks serve` is one field here."""

from __future__ import annotations

from pydantic import Field

from nanoworks.config.base import Frozen


class ServerSettings(Frozen):
    """Sizes are counts unless a field says otherwise."""

    # ------------------------------------------------------------------------------------ what a request may ask
    max_n: int = Field(default=64, gt=0, description="answers to one prompt")
    max_prompts: int = Field(default=128, gt=0, description="prompts of one completions or embeddings request")

    # -------------------------------------------------------------------------------- who may ask, and what is kept
    auth: bool = Field(default=False, description="every request but a probe needs a key")
    keys_db: str | None = Field(default=None, repr=False, description="of keys and usage: a file or a PostgreSQL URL")
    redis_url: str | None = Field(default=None, repr=False, description="of the limits that several servers share")
    cors_origins: tuple[str, ...] = Field(default=(), description="other sites whose pages may call; * is every site")
    max_body_bytes: int = Field(default=16 * 2**20, gt=0, description="of one request")
    tls_cert: str | None = Field(default=None, description="a PEM file with the certificate and what leads to it")
    tls_key: str | None = Field(default=None, description="a PEM file with its private key, if that is not in tls_cert")
    max_header_bytes: int = Field(default=64 * 2**10, gt=0, description="of one request")
    header_seconds: float = Field(default=30, gt=0, description="in which a request must have begun")
    access_log: str | None = Field(default=None, description="a file, - for standard error, or none")
    log_prompts: bool = Field(default=False, description="write what was asked into the access log")

    # ------------------------------------------------------------------------------------ when it starts, fails, ends
    drain_seconds: float = Field(default=20, ge=0, description="that answers may go on after a signal to stop")
    canary_seconds: float = Field(default=5, gt=0, description="without a computed token after which it is not ready")
