"""JSON as every answer is written, and the usage in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from nanoworks.serve.generation import Generation

encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def usage_of(jobs: Sequence[Generation]) -> dict[str, Any]:
    """Return the tokens of `jobs` so far, in OpenAI's form."""
    prompt, completion = sum(job.prompt_tokens for job in jobs), sum(job.completion_tokens for job in jobs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(job.cached_tokens for job in jobs)},
    }
