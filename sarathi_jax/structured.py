"""Grammars as token masks: which tokens may come next in a text that must have a form. On the host, by llguidance."""

import functools
import json
import re
from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from sarathi_jax.request import RequestError, StructuredOutputsParams
from sarathi_jax.tokenizer import Tokenizer

_NUM_CACHED = 64  # compiled grammars kept for the next request with the same

# A hostile grammar ends in an error after some ten milliseconds of one step, or 100 MB; objects of hundreds of optional
# properties stay below.
_LIMITS = LLParserLimits(step_max_items=10_000, max_lexer_states=50_000, verbose_errors=False)

# Without forcing any tokens that spell the text are allowed, and the model chooses; a step then never looks further
# than a token ahead, where forcing would tokenise a million forced characters at once.
_OPTIONS = '%llguidance {"no_forcing": true}'

# The text that we wrote around what the user gave, as errors quote it.
_PLACE = re.compile(r"^at \d+\(\d+\): (failed to compile JSON schema: )?")
_QUOTE = re.compile(r"\n\s+\d+ \| .*", re.DOTALL)


class Matcher:
    """What the next token of one sample may be.

    Attributes:
      allowed: i32[ceil(V / 32)], one bit for each token of the vocabulary, the lowest first; changes in place.
      error: why the grammar cannot be followed any further; None while it can.
    """

    def __init__(self, matcher: LLMatcher, allowed: np.ndarray):
        self._matcher = matcher
        self.allowed = allowed
        self.error: str | None = None

    @classmethod
    def start(cls, matcher: LLMatcher, num_words: int) -> "Matcher":
        """At the beginning of the text, with the mask of the first token."""
        started = cls(matcher, np.zeros(num_words, np.int32))
        started._fill()
        return started

    def copy(self) -> "Matcher":
        """One for another sample, in the same place."""
        return Matcher(self._matcher.deep_copy(), self.allowed.copy())

    def advance(self, token: int) -> bool:
        """Takes a drawn token; `allowed` then is of the next one.

        Returns:
          Whether the text is complete: the grammar takes it and cannot go on. Never with an `error`.
        """
        self._matcher.consume_token(token)
        if self._matcher.is_stopped():
            if not self._matcher.is_error() and self._matcher.is_accepting():
                return True
            self.error = self._failure()
        else:
            self._fill()
        return False

    def _fill(self) -> None:
        self._matcher.unsafe_compute_mask_ptr(self.allowed.ctypes.data, self.allowed.nbytes)
        if self._matcher.is_error():
            self.error = self._failure()

    def _failure(self) -> str:
        error = _first_part(self._matcher.get_error()) or self._matcher.stop_reason()
        return "no token of the model can go on from here" if error == "NoExtensionBias" else error


class Grammars:
    """Compiles grammars for the tokens of one model. Any thread may use it.

    Args:
      tokenizer: of the model.
      vocab_size: V, of the model; what lies beyond the tokenizer's is never allowed.
      eos_token_ids: the tokens that end a text; at least one.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]):
        self._vocabulary = _Vocabulary(tokenizer, vocab_size, eos_token_ids)
        self._num_words = -(-vocab_size // 32)
        self._compiled = functools.lru_cache(_NUM_CACHED)(self._compile)

    def compile(self, params: StructuredOutputsParams) -> None:
        """Compiles ahead, which may take tenths of a second, so that `matcher` answers at once.

        Raises:
          RequestError: llguidance cannot read or serve the grammar; the message is its own.
        """
        self._compiled(params)

    def matcher(self, params: StructuredOutputsParams) -> Matcher:
        """A new matcher at the beginning of a text.

        Raises:
          RequestError: as `compile`.
        """
        return self._compiled(params).copy()

    def _compile(self, params: StructuredOutputsParams) -> Matcher:
        try:
            source = _source(params)
        except ValueError as error:  # half a surrogate pair, which Python can hold and UTF-8 cannot
            raise _refusal(params, str(error)) from None
        matcher = LLMatcher(self._tokens, source, log_level=0, limits=_LIMITS)
        warnings = matcher.get_grammar_warnings()
        if matcher.is_error() or warnings:
            raise _refusal(params, matcher.get_error() or "; ".join(warnings))
        started = Matcher.start(matcher, self._num_words)
        if started.error is not None:
            raise _refusal(params, f"at the first token: {started.error}")
        return started

    @functools.cached_property
    def _tokens(self) -> LLTokenizer:
        return LLTokenizer(TokenizerWrapper(self._vocabulary), eos_token=self._vocabulary.eos_token_ids)


class _Vocabulary:
    """The tokens in the form that llguidance asks for."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self.eos_token_ids = list(eos_token_ids)
        self.eos_token_id = eos_token_ids[0]
        self.bos_token_id = None
        # A token that ends the text is none of its characters, whatever the tokenizer says.
        special = tokenizer.special_ids | set(eos_token_ids)
        self.special_token_ids = sorted(token for token in special if token < vocab_size)

    @property
    def tokens(self) -> list[bytes]:
        size = min(self._tokenizer.vocab_size, self._vocab_size)
        return [self._tokenizer.token_bytes(i) for i in range(size)] + [b""] * (self._vocab_size - size)

    def __call__(self, text: bytes) -> list[int]:
        return []  # asked for the tokens of a forced text only, and nothing is forced


def _source(params: StructuredOutputsParams) -> str:
    """What is asked, as a grammar in Lark's form."""
    if params.grammar is not None:
        lark = params.grammar
    elif params.regex is not None:
        lark = json.loads(LLMatcher.grammar_from_regex(params.regex))["grammars"][0]["lark_grammar"]
    elif params.choice is not None:
        lark = "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in params.choice)
    else:
        schema = {"type": "object"} if params.json is None else json.loads(str(params.json))
        # Without white space every text of a bounded schema is bounded.
        lark = "start: %json " + json.dumps(schema | {"x-guidance": {"whitespace_flexible": False}})
    return LLMatcher.grammar_from_lark(f"{lark}\n{_OPTIONS}")


def _refusal(params: StructuredOutputsParams, error: str) -> RequestError:
    error = _first_part(error)
    if params.grammar is None:
        error = _QUOTE.sub("", _PLACE.sub("", error))
    return RequestError(f"structured_outputs.{params.kind} cannot be served: {error.strip()}")


def _first_part(error: str) -> str:
    """An error of llguidance without the state of its parser."""
    return error.partition("\n<")[0].strip()
