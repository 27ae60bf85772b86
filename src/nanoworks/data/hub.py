"""Text sets on the Hugging Face hub kept as numbered parquet shards, the last of which is for validation.

`fineweb_edu` and `climbmix` are the two that nanochat trains on, in the order in which it reads them. Shards are
fetched when the source is opened, once, into the cache; `HF_ENDPOINT` names a mirror, `HF_TOKEN` opens a
private repository.
"""

from __future__ import annotations

import os

from pydantic import Field

from nanoworks.common.errors import UserError
from nanoworks.data.download import Unreachable, cache_dir, fetch
from nanoworks.data.parquet import ColumnOptions, RowGroups
from nanoworks.data.registry import SOURCES

ENDPOINT = "https://huggingface.co"


class HubOptions(ColumnOptions):
    repo: str = Field(pattern=r"^[^/\s]+/[^/\s]+$", description="owner/name of the data set")
    file: str = Field(default="shard_{:05d}.parquet", description="name of a shard, from its number")
    last_shard: int = Field(ge=1, description="number of the last shard: the validation split")
    shards: int = Field(default=8, gt=0, description="training shards to fetch; more than there are: all")
    revision: str = "main"
    endpoint: str | None = Field(default=None, description="address of a mirror; default: $HF_ENDPOINT")


@SOURCES.register("hub")
class HubSource(RowGroups):
    Options = HubOptions

    def __init__(self, options: HubOptions) -> None:
        endpoint = (options.endpoint or os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
        base = f"{endpoint}/datasets/{options.repo}/resolve/{options.revision}"
        numbers = list(range(min(options.shards, options.last_shard))) if options.split != "val" else []
        numbers += [options.last_shard] if options.split != "train" else []
        folder = cache_dir() / "datasets" / options.repo.replace("/", "--") / options.revision
        urls = {folder / name: f"{base}/{name}" for name in map(options.file.format, numbers)}
        try:
            fetch(urls, token=os.environ.get("HF_TOKEN"))
        except Unreachable as error:
            raise UserError(
                f"{error}. Without a network, use the sources stdlib (the Python standard library), microworld "
                "(generated), or text, jsonl or parquet with a path to your own files; or set HF_ENDPOINT to a "
                f"mirror; or put the shards ({next(iter(urls)).name}, ...) into {folder}"
            ) from error
        super().__init__(options, list(urls))

    def __str__(self) -> str:
        return f"the hub's data set {self.options.repo}"


@SOURCES.register("fineweb_edu")
class FineWebEdu(HubSource):
    """FineWeb-Edu, 100B tokens shuffled: shards of about 250M characters, 100 MB."""

    class Options(HubOptions):
        repo: str = "karpathy/fineweb-edu-100b-shuffle"
        last_shard: int = 1822


@SOURCES.register("climbmix")
class ClimbMix(HubSource):
    """ClimbMix, 400B tokens shuffled."""

    class Options(HubOptions):
        repo: str = "karpathy/climbmix-400b-shuffle"
        last_shard: int = 6542
