"""Configuration: the schema and how it is read. Imports no torch."""

from nanoworks.config.base import Frozen, Method
from nanoworks.config.load import load_recipe, to_yaml
from nanoworks.config.model import ModelConfig
from nanoworks.config.recipe import Recipe

__all__ = ["Frozen", "Method", "ModelConfig", "Recipe", "load_recipe", "to_yaml"]
