"""Serves cases with transformers' continuous batching; run by `peers` as a script, imports nothing of this project.

Reads {"config": fields of a config.json, "cases": [{"key", "requests", "prompt_tokens", "output_tokens"}]} and prints
one JSON line a case. Weights are random, drawn on the device, in bfloat16; decoding is greedy and never ends early.
"""

# pyright: reportMissingImports=false
# torch is no dependency: another interpreter may run this file.

import json
import random
import sys
import time

import torch
import transformers


def build(fields: dict) -> transformers.PreTrainedModel:
    """A model of that shape on the device."""
    fields = dict(fields)
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.eval()


def serve(model: transformers.PreTrainedModel, case: dict, vocab_size: int) -> dict:
    """Seconds of a case: the second of two runs, the first warms up."""
    settings = transformers.GenerationConfig(
        max_new_tokens=case["output_tokens"], do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    generator = random.Random(0)
    for _ in range(2):
        prompts = [
            [generator.randrange(10, vocab_size) for _ in range(case["prompt_tokens"])] for _ in range(case["requests"])
        ]
        start_s = time.perf_counter()
        outputs = model.generate_batch(inputs=prompts, generation_config=settings, persistent_manager=True)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start_s
    generated = sum(len(output.generated_tokens) for output in outputs.values())
    wanted = case["requests"] * case["output_tokens"]
    if generated != wanted:
        return {"reason": f"generated {generated} tokens where {wanted} were asked for"}
    total = case["requests"] * (case["prompt_tokens"] + case["output_tokens"])
    return {"seconds": seconds, "output_tok_s": wanted / seconds, "total_tok_s": total / seconds}


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device")
    request = json.load(sys.stdin)
    start_s = time.perf_counter()
    model = build(request["config"])
    torch.cuda.synchronize()
    start_up_s = time.perf_counter() - start_s
    for case in request["cases"]:
        with torch.inference_mode():
            try:
                row = serve(model, case, request["config"]["vocab_size"])
            except Exception as error:  # the other cases are wanted all the same
                row = {"reason": f"{type(error).__name__}: {error}"[:400]}
        print(json.dumps({"key": case["key"], "start_up_s": start_up_s, **row}), flush=True)


if __name__ == "__main__":
    main()
