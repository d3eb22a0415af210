"""Answers the rows of a batch job with an `LLM`, all pending rows together."""

from collections.abc import Mapping, Sequence
from typing import Any

from sarathi_jax.jobs.rows import InputRow
from sarathi_jax.llm import LLM
from sarathi_jax.request import RequestError, RequestOutput
from sarathi_jax.tokenizer import TokenizerError


class LLMService:
    """Serves `sarathi_jax.jobs.batch.run_job`.

    Args:
      llm: serves nobody else meanwhile.
    """

    def __init__(self, llm: LLM):
        self._llm = llm

    def submit(self, row: InputRow) -> str:
        """Takes a row on; see `Service.submit`."""
        try:
            prompt = row.prompt if row.messages is None else self._chat_tokens(row.messages)
            assert prompt is not None
            return self._llm.submit(prompt, row.params)
        except TokenizerError as error:
            raise RequestError(str(error)) from None

    def wait(self) -> list[RequestOutput]:
        """Runs one step; see `Service.wait`."""
        return [output for output in self._llm.engine.step() if output.finished]

    def _chat_tokens(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        tokenizer = self._llm.tokenizer
        if tokenizer is None:
            raise RequestError("the model has no tokenizer, so no chat template: give prompt_token_ids")
        return tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)
