"""Logits and greedy text of Hugging Face transformers; run by a Python that has torch, never imported by ours.

``python hf_reference.py job.json``, where the job is::

    {"prompts": [[ids]], "num_decodes": n, "models": [{"directory": in, "output": npz, "resave": out or null}]}

The npz of a model holds, for prompt i, ``tokens_i``: the prompt and ``n`` greedy tokens, and ``logits_i``: float32 at
every one of those positions, computed over the whole text at once in eager attention, without a cache. ``resave`` is
where ``save_pretrained`` writes the loaded model, so that files made by transformers itself can be tested too.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

SHARD_SIZE = "100KB"
"""Small enough that `save_pretrained` splits even a tiny model."""


def load(directory: str) -> PreTrainedModel:
    """Loads a model in float32 and checks that every tensor found its place."""
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    problems = {key: value for key, value in info.items() if value}
    if problems:
        raise SystemExit(f"{directory}: transformers did not load every tensor: {problems}")
    return model.eval()


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: list[int], mask: object = None) -> torch.Tensor:
    """f32[len, V] over the whole text, recomputed from the start."""
    return model(input_ids=torch.tensor([tokens]), attention_mask=mask, use_cache=False).logits[0].float()


def greedy(model: PreTrainedModel, prompt: list[int], num_decodes: int) -> tuple[list[int], np.ndarray]:
    """The prompt with its greedy tokens, and the logits at every position of it, each from a full recomputation."""
    tokens, steps = list(prompt), []
    for _ in range(num_decodes):
        steps.append(logits_of(model, tokens)[-1])
        tokens.append(int(steps[-1].argmax()))
    logits = logits_of(model, tokens)
    drift = (torch.stack(steps) - logits[len(prompt) - 1 : -1]).abs().max() if steps else torch.zeros(())
    if drift > 1e-5 * logits.abs().max():
        raise SystemExit(f"the logits of a prefix moved by {drift} when the text grew: attention looked ahead")
    return tokens, logits.numpy()


def check_windows(model: PreTrainedModel, tokens: list[int], logits: np.ndarray) -> None:
    """Compares what transformers makes of a sliding window with a mask written out by hand.

    A query sees itself and the ``window - 1`` tokens before it. Qwen2 mixes windowed and full layers and takes one
    mask for each kind; Mistral has one window for all.
    """
    window = getattr(model.config, "sliding_window", None)
    if not window:
        return
    position = torch.arange(len(tokens))
    distance = position[:, None] - position[None, :]
    causal, windowed = distance >= 0, (distance >= 0) & (distance < window)
    full, sliding = (torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None] for seen in (causal, windowed))
    kinds = getattr(model.config, "layer_types", None)
    mask = {"full_attention": full, "sliding_attention": sliding} if kinds else sliding
    error = np.abs(logits_of(model, tokens, mask).numpy() - logits).max()
    if error > 1e-5 * np.abs(logits).max():
        raise SystemExit(f"transformers' own sliding window of {window} differs by {error} from the written mask")
    unwindowed = {"full_attention": full, "sliding_attention": full} if kinds else full
    difference = np.abs(logits_of(model, tokens, unwindowed).numpy() - logits).max()
    if len(tokens) > 2 * window and difference < 1e-2 * np.abs(logits).max():
        raise SystemExit(f"a window of {window} over {len(tokens)} tokens makes no difference: {difference}")


def resave(model: PreTrainedModel, directory: str, source: str) -> None:
    """`save_pretrained`; checks that the source names the tensors as transformers does, but for known leftovers."""
    model.save_pretrained(directory, max_shard_size=SHARD_SIZE)
    ours, theirs = tensor_shapes(source), tensor_shapes(directory)
    leftovers = {name for name in ours if name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"}
    if {name: ours[name] for name in ours.keys() - (leftovers - theirs.keys())} != theirs:
        raise SystemExit(f"{source} differs in tensors from what save_pretrained writes: {ours} against {theirs}")


def tensor_shapes(directory: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the safetensors of a directory."""
    shapes = {}
    for file in Path(directory).glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    return shapes


def main(job_file: str) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    job = json.loads(Path(job_file).read_text())
    for entry in job["models"]:
        model = load(entry["directory"])
        arrays = {}
        for i, prompt in enumerate(job["prompts"]):
            tokens, logits = greedy(model, prompt, job["num_decodes"])
            check_windows(model, tokens, logits)
            arrays |= {f"tokens_{i}": np.asarray(tokens, np.int32), f"logits_{i}": logits}
        np.savez(entry["output"], **arrays)
        if entry.get("resave"):
            resave(model, entry["resave"], entry["directory"])
        print(f"{Path(entry['directory']).name}: {sum(len(arrays[key]) for key in arrays if key[0] == 't')} positions")


if __name__ == "__main__":
    main(sys.argv[1])
