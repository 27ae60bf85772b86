"""From the engine's deltas to OpenAI's answers, whole or in chunks."""
