"""The micro-world as a data source: plain text for pretraining, generated as it is read.

A page is generated from (seed, split, page) alone, so any page can be read at any time and in any process with
the same result. Train pages hold no question of a test split; validation pages ask only such questions.
"""

from __future__ import annotations

from random import Random

from pydantic import Field, field_validator

from nanoworks.common.errors import nearest
from nanoworks.data.microworld.documents import DOCUMENTS
from nanoworks.data.registry import SOURCES
from nanoworks.data.source import Source, SourceOptions

DOCUMENTS_A_PAGE = 64


@SOURCES.register("microworld")
class MicroworldSource(Source):
    class Options(SourceOptions):
        seed: int = Field(default=0, description="another seed gives other documents about the same world")
        pages: int = Field(default=1024, gt=0, description="pages of 64 documents in an epoch")
        mix: dict[str, float] = Field(
            default_factory=lambda: {name: kind.weight for name, kind in DOCUMENTS.items()},
            min_length=1,
            description="how many documents of each kind, relative to the others: " + ", ".join(DOCUMENTS),
        )

        @field_validator("mix")
        @classmethod
        def _known(cls, mix: dict[str, float]) -> dict[str, float]:
            for name, weight in mix.items():
                if name not in DOCUMENTS:
                    raise ValueError(f"unknown kind {name!r}{nearest(name, DOCUMENTS)}")
                if weight <= 0:
                    raise ValueError(f"the weight of {name} must be positive; leave the kind out instead")
            return mix

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._kinds = [DOCUMENTS[name] for name in options.mix]
        self._weights = list(options.mix.values())

    def __len__(self) -> int:
        return self.options.pages

    def read(self, page: int) -> list[str]:
        split = self.options.split
        rng = Random(f"{self.options.seed}/{split}/{page}")  # a string seeds through SHA-512, the same everywhere
        kinds = rng.choices(self._kinds, self._weights, k=DOCUMENTS_A_PAGE)
        return [kind.write(rng, "test" if split == "val" else "train") for kind in kinds]

    def __str__(self) -> str:
        return "the micro-world"
