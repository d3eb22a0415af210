"""Text <-> token ids, chat templates, and decoding a growing text without ever showing half a character.

Both published formats are read: ``tokenizer.json`` through `tokenizers`, ``tokenizer.model`` through `sentencepiece`.
Encoding is theirs; decoding is done here and alike for both, because every decoder of these families is the same thing:
each token stands for some bytes, the text is the concatenation, read as UTF-8. So a text can be decoded as it grows,
each token looked at once.
"""

import codecs
import datetime
import functools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import sentencepiece
import tokenizers

_SPACE_MARK = "\u2581"  # stands for a space in the pieces of sentencepiece
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Sets normalizer_spec.add_dummy_prefix (field 3 of field 3) to false: a message that occurs again at the end of a
# serialised one is merged into it, the later value winning.
_NO_DUMMY_PREFIX = bytes([3 << 3 | 2, 2, 3 << 3 | 0, 0])


class TokenizerError(ValueError):
    """Tokenizer files that cannot be used, or text that cannot be encoded; the message says why."""


class _Backend(Protocol):
    """What differs between the two formats."""

    vocab_size: int
    leading_spaces: int  # that decoding drops from the start of a text, because encoding put them there
    special_ids: frozenset[int]

    def encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def token_id(self, token: str) -> int | None: ...


class Tokenizer:
    """Text <-> token ids of one model.

    Attributes:
      vocab_size: number of token ids; the model's vocabulary may be padded beyond it.
      bos_token_id, eos_token_id: None where the model has none.
      special_ids: tokens that are no text.
      leading_spaces: spaces that decoding drops from the start of a text.
    """

    def __init__(self, backend: _Backend, special_tokens: Mapping[str, str], chat_templates: Mapping[str, str]):
        self._backend = backend
        self._special_tokens = dict(special_tokens)
        self._chat_templates = dict(chat_templates)
        self.vocab_size = backend.vocab_size
        self.special_ids = backend.special_ids
        self.leading_spaces = backend.leading_spaces
        self.bos_token_id = backend.token_id(special_tokens.get("bos_token", ""))
        self.eos_token_id = backend.token_id(special_tokens.get("eos_token", ""))
        self.token_bytes = functools.cache(backend.token_bytes)

    def __repr__(self) -> str:
        return f"Tokenizer({type(self._backend).__name__.strip('_')}, vocab_size={self.vocab_size})"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
          text: names of special tokens in it become these tokens.
          add_special_tokens: add what the model expects around a text (usually a begin token); False for the result of
            `apply_chat_template`, which holds them already.

        Raises:
          TokenizerError: not a text, or one that is no valid Unicode.
        """
        if not isinstance(text, str):
            raise TokenizerError(f"expected a text to encode, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text is no valid Unicode: {error}") from error
        return self._backend.encode(text, add_special_tokens)

    def decode(self, token_ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD, ids without a token become nothing."""
        decoder = IncrementalDecoder(self, skip_special_tokens)
        return decoder.push(token_ids) + decoder.finish()

    @property
    def has_chat_template(self) -> bool:
        return bool(self._chat_templates)

    @property
    def chat_knows_tools(self) -> bool:
        """Whether a chat template tells the model of tools."""
        return any("tools" in template for template in self._chat_templates.values())

    def with_chat_template(self, template: str) -> "Tokenizer":
        """The same tokenizer with this chat template in place of its own."""
        return Tokenizer(self._backend, self._special_tokens, {"default": template})

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        template_name: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation, to be encoded with ``add_special_tokens=False``.

        Args:
          messages: ``{"role": ..., "content": ...}`` each.
          add_generation_prompt: end with the opening of the assistant's turn.
          template_name: which template, where the model has several; None: ``tool_use`` if there are tools and the
            model has that one, else ``default``.
          tools: descriptions of functions, for templates that know them.
          **variables: further variables of the template, for example ``enable_thinking``.

        Raises:
          TokenizerError: the model has no (such) template, or the template refuses the conversation.
        """
        if not self._chat_templates:
            raise TokenizerError(
                "the model has no chat template (chat_template in tokenizer_config.json, or chat_template.jinja): "
                "write the prompt as plain text, or add a template"
            )
        if template_name is None:
            template_name = "tool_use" if tools and "tool_use" in self._chat_templates else "default"
        if template_name not in self._chat_templates:
            names = ", ".join(sorted(self._chat_templates))
            raise TokenizerError(f"the model has no chat template {template_name!r}; it has: {names}")
        try:
            return _compile(self._chat_templates[template_name]).render(
                **self._special_tokens
                | {"messages": messages, "add_generation_prompt": add_generation_prompt}
                | {"tools": tools, "documents": None}
                | variables
            )
        except (jinja2.TemplateError, TypeError, KeyError, AttributeError, ValueError) as error:
            raise TokenizerError(f"the chat template failed: {error}") from error


class IncrementalDecoder:
    """Decodes a growing sequence; the concatenation of what it returns is `Tokenizer.decode` of all ids.

    Bytes of an unfinished character are kept back until it is complete (or proves to be none).
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, at_start: bool = True):
        """Begins a text.

        Args:
          tokenizer: of the model.
          skip_special_tokens: leave out tokens that are no text.
          at_start: False when the ids continue another text: their leading space is part of it then.
        """
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._spaces_to_drop = tokenizer.leading_spaces if at_start else 0

    def push(self, token_ids: Iterable[int]) -> str:
        """Takes further tokens; returns the text that is certain now."""
        pieces = (self._tokenizer.token_bytes(token_id) for token_id in token_ids if token_id not in self._skipped)
        return self._trim(self._utf8.decode(b"".join(pieces)))

    def finish(self) -> str:
        """Ends the text; returns the rest, with U+FFFD for an unfinished character."""
        return self._trim(self._utf8.decode(b"", final=True))

    def _trim(self, text: str) -> str:
        while text and self._spaces_to_drop:
            if text[0] != " ":
                self._spaces_to_drop = 0
            else:
                text = text[1:]
                self._spaces_to_drop -= 1
        return text


def load_tokenizer(directory: str | os.PathLike[str]) -> Tokenizer | None:
    """The tokenizer of a model directory: ``tokenizer.json`` if there, else ``tokenizer.model``, else None.

    Raises:
      TokenizerError: a file that cannot be read; the message names it.
    """
    directory = Path(directory)
    settings = _read_json(directory / "tokenizer_config.json")
    named = _read_json(directory / "special_tokens_map.json") | settings
    special_tokens = {name: _content(named[name]) for name in _SPECIAL_NAMES if named.get(name) is not None}
    if (directory / "tokenizer.json").exists():
        backend = _TokenizersBackend(directory / "tokenizer.json")
    elif (directory / "tokenizer.model").exists():
        added = {int(token_id): entry for token_id, entry in settings.get("added_tokens_decoder", {}).items()}
        for token, token_id in _read_json(directory / "added_tokens.json").items():
            added.setdefault(token_id, {"content": token, "special": True})
        backend = _SentencePieceBackend(directory / "tokenizer.model", settings, special_tokens, added)
    else:
        return None
    return Tokenizer(backend, special_tokens, _chat_templates(directory, settings))


class _TokenizersBackend:
    def __init__(self, path: Path):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise TokenizerError(f"{path} cannot be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._read_decoder(path)

    def _read_decoder(self, path: Path) -> None:
        """What each token stands for, from the ``decoder`` of the file."""
        decoder: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")).get("decoder") or {"type": "none"}
        steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        kinds = [step["type"] for step in steps]
        self._replacements: list[tuple[str, str]] = []
        self._byte_level = "ByteLevel" in kinds
        self._byte_pieces = "ByteFallback" in kinds
        self.leading_spaces = 0
        for number, step in enumerate(steps):
            match step:
                case {"type": "Replace", "pattern": {"String": pattern}, "content": content}:
                    self._replacements.append((pattern, content))
                case {"type": "Metaspace", "replacement": mark}:
                    self._replacements.append((mark, " "))
                    prepended = step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True)
                    self.leading_spaces = int(prepended)
                case {"type": "Strip", "content": " ", "start": start, "stop": 0} if "Fuse" in kinds[:number]:
                    self.leading_spaces = start
                case {"type": "ByteLevel" | "ByteFallback" | "Fuse"}:
                    pass
                case _:
                    raise TokenizerError(f"{path}: decoder {step!r} is not supported")

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def token_bytes(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level and all(character in _BYTE_OF_CHARACTER for character in token):
            return bytes(_BYTE_OF_CHARACTER[character] for character in token)
        if self._byte_pieces and (match := _BYTE_PIECE.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for pattern, content in self._replacements:
            token = token.replace(pattern, content)
        return token.encode()

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)


class _SentencePieceBackend:
    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        special_tokens: Mapping[str, str],
        added: Mapping[int, Mapping[str, Any]],
    ):
        self._pieces = _load_sentencepiece(path)
        # After a special token the text goes on: only the old behaviour ("legacy") puts a space before it.
        self._continuing = self._pieces
        if settings.get("legacy") is False:
            self._continuing = _load_sentencepiece(path, _NO_DUMMY_PREFIX)
        self._added = {token_id: entry["content"] for token_id, entry in added.items()}
        num_pieces = self._pieces.get_piece_size()
        self.vocab_size = max([num_pieces, *(token_id + 1 for token_id in self._added)])
        self._ids = {content: token_id for token_id, content in self._added.items()}
        for token in special_tokens.values():
            if (token_id := self.token_id(token)) is not None:
                self._ids.setdefault(token, token_id)
        self.special_ids = frozenset(
            [i for i in range(num_pieces) if self._pieces.is_control(i) or self._pieces.is_unknown(i)]
            + [self._ids[token] for token in special_tokens.values() if token in self._ids]
            + [token_id for token_id, entry in added.items() if entry.get("special")]
        )
        ordered = sorted(self._ids, key=len, reverse=True)
        self._splitter = re.compile("(" + "|".join(map(re.escape, ordered)) + ")") if ordered else None
        self.leading_spaces = int(self._pieces.encode("a", out_type=str)[0].startswith(_SPACE_MARK))
        self._begin = self._ending(settings.get("add_bos_token", True), self._pieces.bos_id())
        self._end = self._ending(settings.get("add_eos_token", False), self._pieces.eos_id())

    @staticmethod
    def _ending(wanted: bool, token_id: int) -> list[int]:
        return [token_id] if wanted and token_id >= 0 else []

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        token_ids: list[int] = []
        for segment in self._splitter.split(text) if self._splitter else [text]:
            if segment in self._ids:
                token_ids.append(self._ids[segment])
            elif segment:
                token_ids += (self._continuing if token_ids else self._pieces).encode(segment)
        return [*self._begin, *token_ids, *self._end] if add_special_tokens else token_ids

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        if not 0 <= token_id < self._pieces.get_piece_size():
            return b""
        piece = self._pieces.id_to_piece(token_id)
        if self._pieces.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE_MARK, " ").encode()

    def token_id(self, token: str) -> int | None:
        if token in self._ids:
            return self._ids[token]
        token_id = self._pieces.piece_to_id(token)
        return token_id if self._pieces.id_to_piece(token_id) == token else None


def _load_sentencepiece(path: Path, changes: bytes = b"") -> sentencepiece.SentencePieceProcessor:
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes() + changes)
    except Exception as error:  # the library raises nothing more specific
        raise TokenizerError(f"{path} is no sentencepiece model: {error}") from error


def _byte_characters() -> dict[str, int]:
    """How byte-level vocabularies spell bytes: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_characters()


def _chat_templates(directory: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name; a file of its own goes before the entry of tokenizer_config.json."""
    path = directory / "chat_template.jinja"
    if path.exists():
        return {"default": path.read_text(encoding="utf-8")}
    found = _read_json(directory / "chat_template.json").get("chat_template") or settings.get("chat_template")
    if isinstance(found, list):
        return {entry["name"]: entry["template"] for entry in found}
    return {"default": found} if found else {}


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 (the type that Jinja declares)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.cache
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _content(token: Any) -> str:
    """A special token is written as a string or as ``{"content": ...}``."""
    return token["content"] if isinstance(token, Mapping) else token


def _read_json(path: Path) -> dict[str, Any]:
    """An optional JSON object: empty where there is no file."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise TokenizerError(f"{path} must hold a JSON object")
    return fields
