"""One of several processes that serve a tiny model together: the same script in all of them, as a user would write it.

  python -m tests.parallel.one_process MODEL_DIR HOST_ID COORDINATOR TP PP OUTPUT

The first process writes its outputs to OUTPUT (a pickle); without OUTPUT it generates until it is stopped.
"""

import pickle
import sys
from pathlib import Path

from sarathi_jax.llm import LLM
from tests.engine.serving import BLOCK_SIZE, MAX_LEN, MAX_SEQS
from tests.parallel.asks import ASKS


def main(directory: str, host_id: str, coordinator: str, tp: str, pp: str, output: str | None = None) -> None:
    settings = {"max_model_len": MAX_LEN, "max_num_seqs": MAX_SEQS, "block_size": BLOCK_SIZE, "num_blocks": 24}
    settings |= {"token_buckets": (16, 64), "tp": int(tp), "pp": int(pp), "hosts": 2}
    with LLM(directory, host_id=int(host_id), coordinator=coordinator, progress=False, seed=0, **settings) as llm:
        prompts, params = [prompt for prompt, _ in ASKS], [params for _, params in ASKS]
        print("ready", flush=True)
        while output is None:
            llm.generate(prompts, params, use_tqdm=False)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert llm.num_late_compiles == 0
        Path(output).write_bytes(pickle.dumps(outputs))


if __name__ == "__main__":
    main(*sys.argv[1:])
