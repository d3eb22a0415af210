"""The HTTP server: an asyncio front that speaks OpenAI's API before one thread that drives the engine."""
