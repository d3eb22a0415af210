"""Answers the rows of a batch job with an `LLM`, all pending rows together."""

from sarathi_jax.jobs.rows import InputRow
from sarathi_jax.llm import LLM
from sarathi_jax.request import RequestOutput


class LLMService:
    """Serves `sarathi_jax.jobs.batch.run_job`.

    Args:
      llm: serves nobody else meanwhile.
    """

    def __init__(self, llm: LLM):
        self._llm = llm

    def submit(self, row: InputRow) -> str:
        """Takes a row on; see `Service.submit`."""
        prompt = row.prompt if row.messages is None else self._llm.chat_tokens(row.messages)
        assert prompt is not None
        return self._llm.submit(prompt, row.params)

    def wait(self) -> list[RequestOutput]:
        """Runs one step; see `Service.wait`."""
        return [output for output in self._llm.engine.step() if output.finished]
