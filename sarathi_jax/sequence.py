"""`Sequence`: the tokens of one sample of a request and how far they are computed. No clock, no device."""

import enum

import numpy as np

from sarathi_jax.request import FinishReason, Request


class Status(enum.Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """One sample of a request.

    The host may be one step behind the device: ``num_in_flight`` tokens have been drawn by launched steps but are not
    known here yet. Lengths count them, so the next step can be planned before its input token is known.

    Attributes:
      seq_id: unique in the engine; smaller arrived earlier.
      request: what was asked.
      index: which of the request's ``n`` samples.
      tokens: prompt and output known on the host.
      num_prompt, num_tokens: of the prompt; of prompt and output, those in flight included.
      max_tokens: most tokens of prompt and output.
      num_computed: leading tokens whose keys and values are in the cache once every launched step has ended.
      num_in_flight: tokens drawn on the device and not committed here yet (0 or 1).
      row: the device row that holds this sequence's newest token while it runs; None while it waits.
      num_preemptions: how often its blocks were taken away.
      block_keys: of its leading full blocks, as far as anybody asked for them (`kv.blocks.extend_keys`).
      allowed: i32[ceil(V / 32)], a bit for each token that may follow those known here; None: any may.
    """

    def __init__(self, seq_id: int, request: Request, index: int = 0):
        self.seq_id = seq_id
        self.request = request
        self.index = index
        self.tokens = list(request.prompt_token_ids)
        self.num_prompt = len(self.tokens)
        self.num_tokens = self.num_prompt
        self.max_tokens = self.num_prompt + request.max_tokens
        self.num_computed = 0
        self.num_in_flight = 0
        self.row: int | None = None
        self.num_preemptions = 0
        self.block_keys: list[bytes] = []
        self.allowed: np.ndarray | None = None
        self.status = Status.WAITING
        self.finish_reason: FinishReason | None = None
        self._is_guided = request.params.structured_outputs is not None

    def __repr__(self) -> str:
        return (
            f"Sequence({self.seq_id}, {self.status.value}, prompt={self.num_prompt}, output={self.num_output}, "
            f"computed={self.num_computed})"
        )

    @property
    def rank(self) -> tuple[int, int]:
        """Who is less goes first: by the request's priority, then by arrival."""
        return self.request.priority, self.seq_id

    @property
    def num_output(self) -> int:
        """Output tokens, those in flight included."""
        return self.num_tokens - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        return self.num_tokens - self.num_computed

    @property
    def output_token_ids(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    @property
    def is_decode(self) -> bool:
        """Only the newest token is left to compute and it is an output (a prompt's last token is prefill work)."""
        return self.num_tokens - self.num_computed == 1 and self.num_tokens > self.num_prompt

    @property
    def is_held(self) -> bool:
        """Its next token depends on one that is in flight in a way that only the host can work out (a grammar), so no
        step may draw it before that one is committed."""
        return self._is_guided and self.num_in_flight > 0

    @property
    def is_runnable(self) -> bool:
        """Whether a further token may be drawn; false once the tokens in flight reach the limit."""
        return self.num_tokens < self.max_tokens and self.status is not Status.FINISHED

    def advance(self, length: int, samples: bool) -> None:
        """Records that a step with the next `length` tokens is being launched."""
        self.num_computed += length
        self.num_in_flight += samples
        self.num_tokens += samples

    def commit(self, token: int) -> None:
        """Makes the oldest token in flight known to the host."""
        self.num_in_flight -= 1
        self.tokens.append(token)

    def preempt(self) -> None:
        """Forgets what is computed; tokens are kept and computed again later."""
        self.num_computed = 0
        self.row = None
        self.num_preemptions += 1
        self.status = Status.WAITING

    def finish(self, reason: FinishReason) -> None:
        self.status = Status.FINISHED
        self.finish_reason = reason
