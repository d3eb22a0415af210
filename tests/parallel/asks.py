"""What the models under test are asked, and which models those are."""

from tests.engine.serving import drawn, greedy, prompt_of

# Eight query heads everywhere; KV heads are split, repeated, or both.
HEADS = {"num_attention_heads": 8, "hidden_size": 128}
MODELS = {
    "mistral": HEADS,
    "llama3.1": HEADS | {"num_key_value_heads": 8},
    "llama-bias": HEADS,
    "qwen3": HEADS,
    "qwen2": HEADS | {"num_key_value_heads": 4},
    "qwen2-yarn-mixed": HEADS,
    "falcon-7b": HEADS,
    "falcon-bias": HEADS,
    "falcon-40b": {},
}

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}

ASKS = [
    (prompt_of(5), greedy(max_tokens=40)),
    (prompt_of(60), greedy(max_tokens=20, prompt_logprobs=20)),
    (prompt_of(20), drawn(max_tokens=30, temperature=0.9, top_k=30, n=2)),
    (prompt_of(33), drawn(max_tokens=24, top_p=0.9, repetition_penalty=1.2)),
    (prompt_of(14), greedy(max_tokens=40, logprobs=None)),
    (prompt_of(8), drawn(max_tokens=60, ignore_eos=False, structured_outputs={"json": SCHEMA})),
]
