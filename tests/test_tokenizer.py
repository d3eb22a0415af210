"""Tokenizers of both formats, chat templates, and text that grows token by token."""

import datetime
import io
import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from sarathi_jax.tokenizer import IncrementalDecoder, TokenizerError, load_tokenizer

TEXTS = ["the quick brown fox jumps over the lazy dog", "a cat sat on the mat, the dog slept", "in the beginning"]
HARD = "naïve e\u0301 👩‍👩‍👧 🇩🇪 日本語  two spaces\n\ttab"
SPECIAL = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"}


def write_settings(directory, **more):
    (directory / "tokenizer_config.json").write_text(json.dumps(SPECIAL | more))


def write_sentencepiece(directory):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, model_type="bpe", vocab_size=310, hard_vocab_limit=False,
        byte_fallback=True, character_coverage=1.0, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    (directory / "tokenizer.model").write_bytes(model.getvalue())


def write_byte_level(directory):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<unk>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.enable_truncation(4)
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer.no_truncation()
    return tokenizer


def write_metaspace_fallback(directory):
    """The layout that Llama 2 and Mistral have in tokenizer.json."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ["▁", "▁t", "h", "e", "t", "he", "▁the", "a"]:
        vocab.setdefault(piece, len(vocab))
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokenizer


WRITERS = {
    "sentencepiece": write_sentencepiece,
    "byte_level": write_byte_level,
    "metaspace_fallback": write_metaspace_fallback,
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    found = {}
    for name, write in WRITERS.items():
        directory = tmp_path_factory.mktemp(name)
        write(directory)
        write_settings(directory)
        found[name] = load_tokenizer(directory)
    return found


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return write_byte_level(tmp_path_factory.mktemp("library"))


@pytest.fixture(params=WRITERS)
def tokenizer(request, loaded):
    return loaded[request.param]


@pytest.mark.parametrize("text", [*TEXTS, HARD, "", " leading", "trailing ", "👍", "\x00"])
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=False) == text


def test_special_tokens(loaded):
    for name in ("sentencepiece", "byte_level"):
        tokenizer = loaded[name]
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
        assert tokenizer.encode("the", add_special_tokens=True)[0] == 1
        assert 1 not in tokenizer.encode("the", add_special_tokens=False)
        ids = [1, *tokenizer.encode("the", add_special_tokens=False), 2]
        assert tokenizer.decode(ids) == "the"
        assert tokenizer.decode(ids, skip_special_tokens=False).replace(" ", "") == "<s>the</s>"
        assert tokenizer.encode("the</s>", add_special_tokens=False)[-1] == 2
    thinking = loaded["byte_level"]
    token = thinking.encode("<think>", add_special_tokens=False)
    assert len(token) == 1
    assert thinking.decode(token) == "<think>"


def test_truncation_in_the_file_is_not_obeyed(loaded):
    assert len(loaded["byte_level"].encode("the quick brown fox jumps over the lazy dog " * 5)) > 20


def test_sentencepiece_settings(tmp_path):
    write_sentencepiece(tmp_path)
    write_settings(tmp_path, add_bos_token=False, add_eos_token=True)
    assert load_tokenizer(tmp_path).encode("the")[-1] == 2
    assert load_tokenizer(tmp_path).encode("the")[0] != 1
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    size = pieces.get_piece_size()
    added = {str(size): {"content": "<|im_start|>", "special": True}, str(size + 1): {"content": "<note>"}}
    write_settings(tmp_path, added_tokens_decoder=added, legacy=True)
    old = load_tokenizer(tmp_path)
    assert old.vocab_size == size + 2
    ids = old.encode("<|im_start|>the<note>dog", add_special_tokens=False)
    assert ids == [size, *pieces.encode("the"), size + 1, *pieces.encode("dog")]
    assert old.decode(ids) == "the<note> dog"
    write_settings(tmp_path, added_tokens_decoder=added, legacy=False)
    new = load_tokenizer(tmp_path)
    ids = new.encode("<|im_start|>the<note>dog", add_special_tokens=False)
    assert new.decode(ids, skip_special_tokens=False) == "<|im_start|>the<note>dog"
    write_settings(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": size}))
    assert load_tokenizer(tmp_path).encode("<pad>", add_special_tokens=False) == [size]


def test_tokenizer_json_goes_first(tmp_path):
    assert load_tokenizer(tmp_path) is None
    write_sentencepiece(tmp_path)
    assert "SentencePiece" in repr(load_tokenizer(tmp_path))
    write_byte_level(tmp_path)
    assert "Tokenizers" in repr(load_tokenizer(tmp_path))


def pushed(tokenizer, ids, sizes, **options):
    decoder = IncrementalDecoder(tokenizer, **options)
    parts, position = [], 0
    for size in [*sizes, len(ids)]:
        parts.append(decoder.push(ids[position : position + size]))
        position += size
    return [*parts, decoder.finish()]


def test_no_half_characters(tokenizer):
    ids = tokenizer.encode(HARD)
    parts = pushed(tokenizer, ids, [1] * len(ids))
    assert "".join(parts) == HARD
    assert not any("\ufffd" in part for part in parts)
    assert parts[-1] == ""


def test_an_unfinished_character_comes_out_at_the_end(tokenizer):
    ids = tokenizer.encode("the 👍")
    assert pushed(tokenizer, ids[:-1], [1] * len(ids))[-1] == "\ufffd"


def test_continuing_keeps_the_leading_space(loaded):
    for name in ("sentencepiece", "metaspace_fallback"):
        tokenizer = loaded[name]
        ids = tokenizer.encode("the", add_special_tokens=False)
        assert "".join(pushed(tokenizer, ids, [1])) == "the"
        assert "".join(pushed(tokenizer, ids, [1], at_start=False)) == " the"


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(sorted(WRITERS)),
    ids=st.lists(st.integers(0, 320), max_size=20),
    sizes=st.lists(st.integers(0, 4), max_size=10),
    skip=st.booleans(),
)
def test_pushes_concatenate_to_the_whole(loaded, name, ids, sizes, skip):
    tokenizer = loaded[name]
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(pushed(tokenizer, ids, sizes, skip_special_tokens=skip)) == whole


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40), name=st.sampled_from(sorted(WRITERS)))
def test_any_text_survives(loaded, text, name):
    tokenizer = loaded[name]
    for mark in ("\u2581", "<"):  # the space mark, and what may spell a special token
        text = text.replace(mark, "")
    ids = tokenizer.encode(text, add_special_tokens=False)
    parts = pushed(tokenizer, ids, [1] * len(ids))
    assert "".join(parts) == text


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 299), max_size=20), skip=st.booleans())
def test_decoding_agrees_with_the_library(loaded, library, ids, skip):
    """Byte-level: on any ids, invalid UTF-8 too."""
    ours = loaded["byte_level"].decode(ids, skip_special_tokens=skip)
    assert ours == library.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("text", [*TEXTS, HARD, " leading"])
def test_decoding_agrees_with_the_library_on_text(tmp_path, text):
    theirs = write_metaspace_fallback(tmp_path)
    ours = load_tokenizer(tmp_path)
    ids = ours.encode(text)
    assert ids == theirs.encode(text).ids
    assert ours.decode(ids) == theirs.decode(ids)


def test_bad_input(tokenizer):
    with pytest.raises(TokenizerError, match="no valid Unicode"):
        tokenizer.encode("\ud800")
    with pytest.raises(TokenizerError, match="expected a text"):
        tokenizer.encode(7)
    assert tokenizer.decode([10**6]) == ""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json cannot be read"),
        ("tokenizer.model", "not a model", r"tokenizer\.model is no sentencepiece model"),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json must hold a JSON object"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json cannot be read"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerError, match=message):
        load_tokenizer(tmp_path)


def test_a_decoder_that_is_not_supported(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="WordPiece"):
        load_tokenizer(tmp_path)


CHAT = (
    "{{ bos_token }}{% for m in messages %}\n"
    "    {% if m['role'] not in ['user', 'assistant'] %}\n"
    "        {{ raise_exception('no role ' + m['role']) }}\n"
    "    {% endif %}\n"
    "[{{ m['role'] }}] {{ m['content'] | trim }}{{ eos_token }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MESSAGES = [{"role": "user", "content": " hello "}, {"role": "assistant", "content": "hi"}]


def with_template(directory, template):
    write_byte_level(directory)
    write_settings(directory, chat_template=template)
    return load_tokenizer(directory)


def test_chat_template(tmp_path):
    tokenizer = with_template(tmp_path, CHAT)
    assert tokenizer.has_chat_template
    expected = "<s>[user] hello</s>\n[assistant] hi</s>\n"
    assert tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=False) == expected
    assert tokenizer.apply_chat_template(MESSAGES) == expected + "[assistant]"
    ids = tokenizer.encode(expected, add_special_tokens=False)
    assert (ids.count(1), ids.count(2)) == (1, 2)
    with pytest.raises(TokenizerError, match="no role system"):
        tokenizer.apply_chat_template([{"role": "system", "content": ""}])
    with pytest.raises(TokenizerError, match="the chat template failed"):
        tokenizer.apply_chat_template([{"content": "of nobody"}])


def test_named_templates(tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | tojson }}"}]
    tokenizer = with_template(tmp_path, named)
    assert tokenizer.apply_chat_template(MESSAGES) == "plain"
    assert tokenizer.apply_chat_template(MESSAGES, tools=[{"name": "é<"}]) == '[{"name": "é<"}]'
    assert tokenizer.apply_chat_template(MESSAGES, template_name="tool_use", tools=None) == "null"
    with pytest.raises(TokenizerError, match="'rag'; it has: default, tool_use"):
        tokenizer.apply_chat_template(MESSAGES, template_name="rag")


def test_template_file_goes_first(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert with_template(tmp_path, CHAT).apply_chat_template(MESSAGES) == "from the file"


def test_template_helpers(tmp_path):
    template = (
        "{{ strftime_now('%Y') }} {% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
        "{% generation %} said{% endgeneration %} {{ thinking }} {{ {'a': 'ü'} | tojson }}"
    )
    text = with_template(tmp_path, template).apply_chat_template([], thinking="on")
    assert text == f'{datetime.date.today().year} 01 said on {{"a": "ü"}}'


def test_templates_run_in_a_sandbox(tmp_path):
    tokenizer = with_template(tmp_path, "{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(TokenizerError, match="unsafe"):
        tokenizer.apply_chat_template(MESSAGES)


def test_no_template_and_a_broken_one(tmp_path):
    with pytest.raises(TokenizerError, match="no chat template"):
        with_template(tmp_path, None).apply_chat_template(MESSAGES)
    with pytest.raises(TokenizerError, match="the chat template failed"):
        with_template(tmp_path, "{% if %}").apply_chat_template(MESSAGES)
