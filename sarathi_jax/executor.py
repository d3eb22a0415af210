"""`DeviceExecutor`: packs plans and runs them on the device; `follow`: what the other hosts of a replica do."""

import collections
import dataclasses
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from sarathi_jax.kv.blocks import BlockTable
from sarathi_jax.parallel.hosts import Hosts
from sarathi_jax.parallel.wire import Message
from sarathi_jax.runner import MicroBatch, Runner, Wanted
from sarathi_jax.sampling import SamplingTable
from sarathi_jax.scheduling.plan import StepPlan, StepResult
from sarathi_jax.sequence import Sequence
from sarathi_jax.step_program import StepOutput


@dataclasses.dataclass
class Launched:
    """A step under way.

    Attributes:
      wanted: which parts of its output anybody wants.
      output: the arrays that will hold it; None until it has reached the last stage, and where that is on the devices
        of another process.
    """

    wanted: Wanted
    output: StepOutput | None = None


class DeviceExecutor:
    """Packs plans and runs them on the device.

    Args:
      runner: the compiled programs.
      sampling: parameters of the running sequences.
      sequences: live sequences by id; the engine's own mapping, read here.
      table_of: blocks of a running sequence.
      hosts: the other processes of this replica, which this one leads.
    """

    def __init__(
        self,
        runner: Runner,
        sampling: SamplingTable,
        sequences: Mapping[int, Sequence],
        table_of: Callable[[int], BlockTable],
        hosts: Hosts | None = None,
    ):
        self._runner = runner
        self._sampling = sampling
        self._sequences = sequences
        self._table_of = table_of
        self._hosts = hosts
        # Of each row, the sequence and how often it had been preempted when it came into the row.
        self._row_owners: dict[int, tuple[int, int]] = {}
        self._in_stages: collections.deque[Launched] = collections.deque()

    def launch(self, plan: StepPlan | None) -> Launched | None:
        batch = None if plan is None else self._pack(plan)
        if self._hosts is not None:
            self._hosts.broadcast(to_message(batch))
        launched = None if batch is None else Launched(batch.wanted)
        if launched is not None:
            self._in_stages.append(launched)
        leaving = self._runner.tick(batch)
        if leaving is not None:
            self._in_stages.popleft().output = leaving[1]
        return launched

    def warm_up(self) -> None:
        """Runs every program once on nothing but padding: devices connect with each other at their first exchange,
        which takes seconds."""
        empty = [StepPlan((), bucket, num_decodes=0) for bucket in self._runner.layouts]
        handles = [self.launch(plan) for plan in empty]
        while self._in_stages:
            self.launch(None)
        for handle in handles:
            assert handle is not None
            self.collect(handle)

    def _pack(self, plan: StepPlan) -> MicroBatch:
        params, recalled = [], []
        for chunk in plan.chunks:
            seq = self._sequences[chunk.seq_id]
            params.append(seq.request.params)
            assert seq.row is not None
            owner = seq.seq_id, seq.num_preemptions
            if self._row_owners.get(seq.row) != owner:
                self._row_owners[seq.row] = owner
                self._sampling.set_row(seq.row, seq)
                if chunk.start and seq.request.params.is_penalised:
                    recalled.append(self._runner.history_entry(seq.row, seq.tokens))
            if chunk.samples and seq.allowed is not None:
                self._sampling.set_mask(seq.row, seq.allowed)
        wanted = Wanted(
            num_chunks=len(plan.chunks),
            logprobs=any(p.logprobs is not None for p in params),
            num_tokens=plan.num_tokens if any(p.prompt_logprobs is not None for p in params) else 0,
        )
        buffer = self._runner.layouts[plan.bucket].pack(plan, self._sequences, self._table_of)
        return MicroBatch(plan.bucket, buffer, self._sampling.changes(), wanted, tuple(recalled))

    def collect(self, handle: Launched) -> StepResult:
        if handle.output is not None:
            return StepResult(**fetch(handle.output, handle.wanted))
        assert self._hosts is not None
        return StepResult(**self._hosts.next_result())


def follow(runner: Runner, hosts: Hosts) -> None:
    """Runs what the leader of the replica runs, until it ends.

    Args:
      runner: of this process.
      hosts: the processes of the replica.

    Raises:
      HostsError: a process was lost.
    """
    with ThreadPoolExecutor(1) as answers:  # in order, and beside the steps that follow
        while (message := hosts.receive()) is not None:
            leaving = runner.tick(from_message(message))
            if leaving is not None and runner.answers:
                batch, output = leaving
                assert output is not None
                answers.submit(_answer, hosts, output, batch.wanted)


def _answer(hosts: Hosts, output: StepOutput, wanted: Wanted) -> None:
    try:
        hosts.send(fetch(output, wanted))
    except Exception as error:
        hosts.abandon(str(error))  # or the leader would wait for ever
        raise


def fetch(output: StepOutput, wanted: Wanted) -> dict[str, np.ndarray]:
    """Waits for a step and copies what is wanted to the host: fields of `StepResult`."""
    drawn = output.drawn
    arrays = {"tokens": drawn.tokens}
    if wanted.logprobs:
        arrays |= {"logprobs": drawn.logprobs, "top_ids": drawn.top_ids, "top_logprobs": drawn.top_logprobs}
    fetched = {name: np.asarray(array)[: wanted.num_chunks] for name, array in arrays.items()}
    if wanted.num_tokens:
        names = ("prompt_logprobs", "prompt_top_ids", "prompt_top_logprobs")
        prompt = {name: np.asarray(array) for name, array in zip(names, output.prompt, strict=True)}
        fetched |= {name: array[: wanted.num_tokens] for name, array in prompt.items()}
    return fetched


_NUMBERS, _SAMPLING, _RECALLED = "numbers", "sampling.", "recalled."


def to_message(batch: MicroBatch | None) -> Message:
    """A micro-batch, or that none enters, for the other processes of a replica."""
    if batch is None:
        return {}
    wanted = batch.wanted
    numbers = [batch.bucket, wanted.num_chunks, wanted.logprobs, wanted.num_tokens]
    sampling = {_SAMPLING + name: values for name, values in batch.sampling.items()}
    recalled = {f"{_RECALLED}{i}": entry for i, entry in enumerate(batch.recalled)}
    return {_NUMBERS: np.array(numbers, np.int32), "buffer": batch.buffer} | sampling | recalled


def from_message(message: Message) -> MicroBatch | None:
    """What `to_message` was given."""
    if not message:
        return None
    bucket, num_chunks, logprobs, num_tokens = message[_NUMBERS].tolist()
    sampling = {name.removeprefix(_SAMPLING): v for name, v in message.items() if name.startswith(_SAMPLING)}
    recalled = tuple(entry for name, entry in message.items() if name.startswith(_RECALLED))
    wanted = Wanted(num_chunks, bool(logprobs), num_tokens)
    return MicroBatch(bucket, message["buffer"], sampling, wanted, recalled)
