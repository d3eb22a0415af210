"""Serves a workload with an engine in this process: an open load, in which requests come whether or not others end."""

import dataclasses
import time
from collections.abc import Mapping, Sequence

import numpy as np
from tqdm import tqdm

from sarathi_jax.clock import WallClock
from sarathi_jax.engine import Engine
from sarathi_jax.llm import LLM
from sarathi_jax.replica import Replicas
from sarathi_jax.request import RequestOutput, SamplingParams
from sarathi_jax.telemetry.definitions import SampleTimes, samples_of
from sarathi_jax.telemetry.run import Run
from sarathi_jax.telemetry.steps import StepRecord
from sarathi_jax.telemetry.summary import preemption_times
from sarathi_jax.workloads import TimedRequest

_FIRST_TOKEN = 10  # below are a vocabulary's special tokens


def random_prompts(requests: Sequence[TimedRequest], vocab_size: int, seed: int) -> list[np.ndarray]:
    """Prompts of random tokens, which share no prefix but that of their group: i32[prompt] each.

    Args:
      requests: whose prompts.
      vocab_size: of the model.
      seed: the same one gives the same prompts.
    """
    generator, first = np.random.default_rng(seed), min(_FIRST_TOKEN, vocab_size - 1)
    prompts = []
    for request in requests:
        shared = 0 if request.group is None else min(request.shared, request.prompt)
        own = generator.integers(first, vocab_size, request.prompt - shared, dtype=np.int32)
        if shared and request.group is not None:
            of_group = np.random.default_rng([seed, request.group])
            own = np.concatenate([of_group.integers(first, vocab_size, shared, dtype=np.int32), own])
        prompts.append(own)
    return prompts


def replay(
    llm: LLM,
    requests: Sequence[TimedRequest],
    *,
    prompts: Sequence[Sequence[int] | np.ndarray] | None = None,
    seed: int = 0,
    limit_s: float | None = None,
    progress: bool = True,
) -> Run:
    """Serves requests at their times, one thread for all: what comes during a step is handed over after it.

    Every request gets exactly as many tokens as its output says. Run the same prompts twice on one LLM and the second
    run finds them in the prefix cache: choose another seed, or no prefix cache.

    Args:
      llm: idle; nobody else may use it meanwhile.
      requests: in the order of their arrival.
      prompts: token ids of each; None: random ones.
      seed: of random prompts.
      limit_s: the run is cut off after so many seconds; None: it ends when all requests have.
      progress: shows a bar.

    Returns:
      The run, with all steps.

    Raises:
      RequestError: a request that this model can never serve; told before the first is.
    """
    if prompts is None:
        prompts = random_prompts(requests, llm.model_config.vocab_size, seed)
    _check_longest(llm.engine, requests, prompts)
    engines = llm.engine.engines if isinstance(llm.engine, Replicas) else (llm.engine,)
    recorders = [_Recorder() for _ in engines]
    for engine, recorder in zip(engines, recorders, strict=True):
        engine.observe(recorder)
    try:
        outputs, begin_s, end_s = _serve(llm.engine, requests, prompts, limit_s, progress)
    finally:
        for engine, recorder in zip(engines, recorders, strict=True):
            engine.forget(recorder)
    steps = tuple(tuple(_shifted_step(step, begin_s) for step in recorder.steps) for recorder in recorders)
    preempted_s: dict[str, float] = {}
    for its in steps:
        preempted_s |= preemption_times(its, end_s)
    samples = [_sample(i, request, outputs, begin_s, preempted_s) for i, request in enumerate(requests)]
    return Run(tuple(sample for sample in samples if sample.arrival_s <= end_s), end_s, steps)


@dataclasses.dataclass
class _Recorder:
    """An observer that keeps everything."""

    steps: list[StepRecord] = dataclasses.field(default_factory=list)

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def on_end(self, output: RequestOutput) -> None:
        pass


def _params(request: TimedRequest) -> SamplingParams:
    return SamplingParams(
        temperature=0,
        max_tokens=request.output,
        min_tokens=request.output,
        ignore_eos=True,
        detokenize=False,
    )


def _check_longest(
    engine: Engine | Replicas, requests: Sequence[TimedRequest], prompts: Sequence[Sequence[int] | np.ndarray]
) -> None:
    """Refuses a workload whose longest requests the engine would refuse midway."""
    longest = {max(range(len(requests)), key=key) for key in _longest_keys(requests)}
    for i in longest:
        engine.add_request("longest", list(map(int, prompts[i])), _params(requests[i]))
        engine.abort("longest")


def _longest_keys(requests: Sequence[TimedRequest]) -> tuple:
    return (lambda i: requests[i].prompt), (lambda i: requests[i].prompt + requests[i].output)


def _serve(
    engine: Engine | Replicas,
    requests: Sequence[TimedRequest],
    prompts: Sequence[Sequence[int] | np.ndarray],
    limit_s: float | None,
    progress: bool,
) -> tuple[dict[str, RequestOutput], float, float]:
    """Outputs by id, when the run began on the engine's clock, and after how many seconds it ended."""
    clock, outputs, num_added = WallClock(), {}, 0
    begin_s = clock.now_s()
    with tqdm(total=len(requests), desc="bench", unit="request", disable=not progress) as bar:
        while num_added < len(requests) or engine.has_work:
            now_s = clock.now_s() - begin_s
            if limit_s is not None and now_s >= limit_s:
                break
            while num_added < len(requests) and requests[num_added].arrival_s <= now_s:
                request, prompt = requests[num_added], prompts[num_added]
                engine.add_request(
                    str(num_added),
                    list(map(int, prompt)),
                    _params(request),
                    arrival_s=begin_s + request.arrival_s,
                )
                num_added += 1
            if engine.has_work:
                finished = [output for output in engine.step() if output.finished]
                outputs |= {output.request_id: output for output in finished}
                bar.update(len(finished))
            else:
                until_s = requests[num_added].arrival_s
                time.sleep(max(0.0, min(until_s, limit_s or until_s) - (clock.now_s() - begin_s)))
    is_cut = num_added < len(requests) or engine.has_work
    if not is_cut or limit_s is None:
        ends_s = [output.metrics.finished_s - begin_s for output in outputs.values() if output.metrics.finished_s]
        return outputs, begin_s, max(ends_s, default=0.0)
    for i in range(num_added):
        output = engine.abort(str(i))
        outputs |= {} if output is None else {str(i): output}
    while engine.has_work:  # what is left in flight
        engine.step()
    return outputs, begin_s, limit_s


def _sample(
    i: int,
    request: TimedRequest,
    outputs: Mapping[str, RequestOutput],
    begin_s: float,
    preempted_s: Mapping[str, float],
) -> SampleTimes:
    """Times since the start; a request that the end of the run cut off was not given up."""
    output = outputs.get(str(i))
    if output is None:
        return SampleTimes(str(i), request.arrival_s, num_prompt_tokens=request.prompt)
    (sample,) = samples_of(output, preempted_s.get(str(i), 0.0))
    first_s, finished_s = sample.first_scheduled_s, sample.finished_s
    return dataclasses.replace(
        sample,
        arrival_s=request.arrival_s,
        token_s=tuple(at_s - begin_s for at_s in sample.token_s),
        first_scheduled_s=None if first_s is None else first_s - begin_s,
        finished_s=None if finished_s is None else finished_s - begin_s,
        given_up_s=None,
    )


def _shifted_step(step: StepRecord, begin_s: float) -> StepRecord:
    return dataclasses.replace(
        step,
        scheduled_s=step.scheduled_s - begin_s,
        launched_s=step.launched_s - begin_s,
        started_s=step.started_s - begin_s,
        ended_s=step.ended_s - begin_s,
    )
