"""The wire format: OpenAI's requests and answers as pydantic types, one file for each endpoint.

What happens to fields, on every endpoint:

- A field that is not known is an error (400, `param` names it): nothing is silently ignored, and a typo never passes.
- A field given as null counts as not given. Types are taken as JSON has them: "3" is no number.
- OpenAI's bookkeeping (`metadata`, `store`, `service_tier`, `safety_identifier`, ...) is accepted without effect.
- What this server does not do is accepted only with the value that asks for nothing (`best_of` = `n`, `suffix` = "").
- Beyond OpenAI's: `top_k`, `min_p`, `repetition_penalty`, `min_tokens`, `ignore_eos` and `priority`, as in vLLM.
"""
