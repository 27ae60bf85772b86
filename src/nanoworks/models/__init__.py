"""Model families over the shared components of `nanoworks.nn`."""

from nanoworks.models.decoder import Decoder
from nanoworks.models.registry import (
    ARCHITECTURES,
    Architecture,
    build_model,
    config_from_dict,
    config_from_hf,
)

__all__ = ["ARCHITECTURES", "Architecture", "Decoder", "build_model", "config_from_dict", "config_from_hf"]
