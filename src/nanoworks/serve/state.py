"""What the routes of one app share."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fastapi import Request

from nanoworks import __version__
from nanoworks.serve.canary import Canary
from nanoworks.serve.protocol.models import ModelCard
from nanoworks.serve.settings import ServerSettings
from nanoworks.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nanoworks.engine.client import EngineClient
    from nanoworks.serve.observer import Observer


@dataclass
class ServerState:
    engine: EngineClient
    tokenizer: Tokenizer
    card: ModelCard
    settings: ServerSettings
    observers: list[Observer] = field(default_factory=list)
    """They see every generation, in this order: who may refuse one comes before who counts it."""
    guard: Any = None
    """Decides who may call; None: everybody."""
    metrics: Any = None
    canary: Canary = field(init=False)

    def __post_init__(self) -> None:
        self.canary = Canary(self.engine, patience=self.settings.canary_seconds)

    @property
    def head(self) -> dict[str, Any]:
        """The fields of an answer that say what made it; the same fingerprint and seed give the same answer."""
        return {"model": self.card.id, "system_fingerprint": self.fingerprint}

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token: no text has fewer tokens than its bytes divided by it."""
        return max(self.tokenizer.token_bytes())

    @cached_property
    def fingerprint(self) -> str:
        made_of = f"{__version__} {self.card.model_dump_json(exclude={'created'})}"
        return "fp_" + hashlib.sha256(made_of.encode()).hexdigest()[:10]


def server_state(request: Request) -> ServerState:
    """Return the state of the app that `request` came to."""
    return request.app.state.server
