"""The engine in a process of its own: a crash, a hang or a leak there leaves the server alive to say so."""

from nanoworks.engine.remote.engine import RemoteEngine
from nanoworks.engine.remote.spec import EngineSpec

__all__ = ["EngineSpec", "RemoteEngine"]
