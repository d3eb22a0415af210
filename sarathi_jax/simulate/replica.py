"""`SimulatedReplica`: the engine that would serve, on a clock of its own and without a device."""

from sarathi_jax.engine import Engine
from sarathi_jax.latency import StepTimes
from sarathi_jax.request import RequestOutput, SamplingParams
from sarathi_jax.scheduling.make import make_scheduler
from sarathi_jax.sequence import Sequence
from sarathi_jax.simulate.deployment import Deployment
from sarathi_jax.simulate.executor import SimulatedClock, SimulatedExecutor, stage_times
from sarathi_jax.simulate.memory import cache_of
from sarathi_jax.simulate.tabulate import tabulate
from sarathi_jax.telemetry.steps import StepRecord

_MOST_STEPS_IN_VAIN = 1000


class SimulatedReplica:
    """Serves requests as fast as its deployment says.

    Scheduler, block pool and engine are those of the server; only the executor is another.

    Args:
      deployment: one replica of it.
      seed: of the engine.
      keep_steps: record every step, which takes longer.

    Attributes:
      engine: that serves.
      executor: counts steps and how long each stage was busy.
      outputs: of the requests that have ended.
      steps: that have ended, if they are kept.
      num_prompt_tokens: of the requests that have not ended.

    Raises:
      ConfigError: the model does not fit; the message says what does.
    """

    def __init__(self, deployment: Deployment, seed: int = 0, keep_steps: bool = True):
        model, config = deployment.model, deployment.engine
        cache, self._clock = cache_of(deployment), SimulatedClock()
        idle_s = 0.0 if deployment.table is None else deployment.table.idle_s
        times = None
        if config.tbt_slo_ms is not None:
            times = StepTimes(deployment.table or tabulate(deployment.roofline(), config, cache))
        self.scheduler = make_scheduler(model, config, cache, times)
        self.executor = SimulatedExecutor(stage_times(deployment, seed), self._clock, config.pp, times, idle_s)
        sequences: dict[int, Sequence] = {}
        self.engine = Engine(model, config, cache, self.scheduler, self.executor, sequences, clock=self._clock)
        self.outputs: list[RequestOutput] = []
        self.steps: list[StepRecord] = []
        self.num_prompt_tokens = 0
        self._seed, self._in_vain = seed, 0
        if keep_steps:
            self.engine.observe(self)

    def on_step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def on_end(self, output: RequestOutput) -> None:
        pass

    @property
    def now_s(self) -> float:
        return self._clock.now_s()

    def add(self, request_id: str, prompt_token_ids: tuple[int, ...], num_output: int, arrival_s: float) -> None:
        """Gives it a request that draws exactly so many tokens.

        Args:
          request_id: unique.
          prompt_token_ids: at least one.
          num_output: at least 1.
          arrival_s: when it came; it may have waited for the end of a step since.

        Raises:
          RequestError: it can never be served.
        """
        params = SamplingParams(
            max_tokens=num_output, min_tokens=num_output, ignore_eos=True, temperature=0, seed=0, detokenize=False
        )
        self.engine.add_request(request_id, prompt_token_ids, params, arrival_s=arrival_s)
        self.num_prompt_tokens += len(prompt_token_ids)

    def run_until(self, until_s: float) -> None:
        """Serves until no step would begin before `until_s`.

        Raises:
          RuntimeError: requests wait and nothing runs: a fault of the policy.
        """
        while self.engine.has_work and self._clock.now_s() < until_s:
            began_s = self._clock.now_s()
            self._keep(self.engine.step())
            self._in_vain = self._in_vain + 1 if self._clock.now_s() == began_s else 0
            if self._in_vain > _MOST_STEPS_IN_VAIN:
                raise RuntimeError(f"nothing runs although requests wait: {self.engine!r}")
        if not self.engine.has_work:
            self._clock.wait_until(until_s)

    def give_up(self, request_ids: list[str]) -> None:
        """Ends what has not ended."""
        self._keep([output for request_id in request_ids if (output := self.engine.abort(request_id)) is not None])

    def _keep(self, outputs: list[RequestOutput]) -> None:
        self.outputs += outputs
        for output in outputs:
            self.num_prompt_tokens -= len(output.prompt_token_ids)
