"""Runs the scheduler against a device made of dictionaries and checks every step against an independent model.

The device holds, per block and offset, which token of which sequence was written there last, and per row the newest
token drawn. A chunk is right only if every key that its queries see is found where the block table points.
"""

import collections
import dataclasses

from sarathi_jax.kv.blocks import BlockPool
from sarathi_jax.request import Request, SamplingParams
from sarathi_jax.scheduling.plan import Chooser, FillToEdge, StepPlan
from sarathi_jax.scheduling.sarathi import SarathiScheduler
from sarathi_jax.sequence import Sequence


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A request: when it comes, how long it is, and whether it ends before its limit.

    Attributes:
      step: from which step on it waits.
      stops_at: output length at which a stop token ends it, if not None.
      aborts_after: steps after arrival at which the client leaves, if not None.
    """

    num_prompt: int
    max_tokens: int
    step: int = 0
    stops_at: int | None = None
    aborts_after: int | None = None


@dataclasses.dataclass(frozen=True)
class Case:
    """What is served and how.

    Attributes:
      num_ahead: steps scheduled before the oldest one's tokens are known: 0 without overlap, 1 as the engine does.
    """

    arrivals: tuple[Arrival, ...]
    num_blocks: int
    block_size: int = 4
    buckets: tuple[int, ...] = (4, 8, 16)
    max_num_seqs: int = 4
    window: int | None = None
    num_ahead: int = 0
    chooser: Chooser | None = None

    def scheduler(self, pool: BlockPool) -> SarathiScheduler:
        longest = max(arrival.num_prompt + arrival.max_tokens for arrival in self.arrivals)
        return SarathiScheduler(
            pool,
            block_size=self.block_size,
            buckets=self.buckets,
            max_num_seqs=self.max_num_seqs,
            window=self.window,
            max_model_len=longest,
            chooser=self.chooser,
        )

    @property
    def max_running(self) -> int:
        return min(self.max_num_seqs, self.buckets[-1])


def make_sequence(seq_id: int, num_prompt: int, max_tokens: int) -> Sequence:
    prompt = tuple(range(num_prompt))
    return Sequence(seq_id, Request(str(seq_id), prompt, SamplingParams(), max_tokens, 0, frozenset(), 0.0))


class Drive:
    """Serves a case to its end, as the engine would, and checks every step.

    Attributes:
      plans: of all steps, None where nothing could run.
      num_preemptions: in all.
    """

    def __init__(self, case: Case):
        self.case = case
        self.pool = BlockPool(case.num_blocks)
        self.scheduler = case.scheduler(self.pool)
        self.seqs = {i: make_sequence(i, a.num_prompt, a.max_tokens) for i, a in enumerate(case.arrivals)}
        self.live: set[int] = set()
        # The model: what the steps launched so far have computed (in this life), drawn, and left on the device.
        self.computed = collections.Counter()
        self.drawn = collections.Counter()
        self.cache: dict[tuple[int, int], tuple[int, int]] = {}
        self.row_tokens: dict[int, tuple[int, int]] = {}
        self.in_flight: collections.deque[StepPlan] = collections.deque()
        self.plans: list[StepPlan | None] = []
        self.num_preemptions = 0
        arrivals = case.arrivals
        # Every step draws a token, or moves the earliest prefill, or fills another's last block, or waits for a commit.
        num_steps = sum(3 * a.max_tokens + a.num_prompt + case.block_size + 2 for a in arrivals)
        self.max_steps = 10 + max(a.step for a in arrivals) + (1 + case.num_ahead) * num_steps

    def run(self) -> "Drive":
        while self.step():
            assert len(self.plans) <= self.max_steps, "starvation"
        assert self.pool.num_free == self.pool.num_total
        assert self.scheduler.num_waiting == self.scheduler.num_running == 0
        assert sorted(self.scheduler._free_rows) == list(range(self.case.max_num_seqs))
        for seq in self.seqs.values():
            assert seq.num_in_flight == 0 or seq.finish_reason != "length"
            if seq.finish_reason == "length":
                assert seq.num_output == seq.request.max_tokens
        return self

    def step(self) -> bool:
        """One step of the engine; False once everything has ended."""
        now = len(self.plans)
        for seq_id, arrival in enumerate(self.case.arrivals):
            if arrival.step == now:
                self.live.add(seq_id)
                self.scheduler.add(self.seqs[seq_id])
            if arrival.aborts_after is not None and arrival.step + arrival.aborts_after == now:
                self.end(seq_id, "abort")
        before = self.snapshot()
        plan = self.scheduler.schedule()
        self.plans.append(plan)
        if plan is not None:
            self.check(plan, before)
            self.in_flight.append(plan)
        elif not self.in_flight:
            assert not self.live, "nothing can run and nothing is in flight"
        if self.in_flight and (plan is None or len(self.in_flight) > self.case.num_ahead):
            self.commit(self.in_flight.popleft())
        return bool(self.live or self.in_flight) or any(a.step > now for a in self.case.arrivals)

    def commit(self, plan: StepPlan) -> None:
        for chunk in plan.chunks:
            seq, arrival = self.seqs[chunk.seq_id], self.case.arrivals[chunk.seq_id]
            if not chunk.samples or chunk.seq_id not in self.live:
                continue
            seq.commit(0)
            if len(seq.output_token_ids) == arrival.stops_at:
                self.end(chunk.seq_id, "stop")
            elif len(seq.output_token_ids) == arrival.max_tokens:
                self.end(chunk.seq_id, "length")

    def end(self, seq_id: int, reason) -> None:
        if seq_id in self.live:
            self.live.remove(seq_id)
            self.seqs[seq_id].finish(reason)
        self.scheduler.remove(self.seqs[seq_id])
        self.scheduler.remove(self.seqs[seq_id])

    # The model of a step.

    def num_tokens(self, seq_id: int) -> int:
        return self.case.arrivals[seq_id].num_prompt + self.drawn[seq_id]

    def may_run(self, seq_id: int) -> bool:
        return seq_id in self.live and self.drawn[seq_id] < self.case.arrivals[seq_id].max_tokens

    def is_decode(self, seq_id: int) -> bool:
        return self.drawn[seq_id] > 0 and self.num_tokens(seq_id) - self.computed[seq_id] == 1

    def num_held(self, seq_id: int) -> int:
        """Blocks that a running sequence still needs for what it has computed."""
        num_computed, window = self.computed[seq_id], self.case.window
        num_left = 0 if window is None else max(0, num_computed - window + 1) // self.case.block_size
        return -(-num_computed // self.case.block_size) - num_left

    def snapshot(self):
        running = [seq.seq_id for seq in self.scheduler.running]
        waiting = [seq.seq_id for seq in self.scheduler.waiting]
        assert running == sorted(running)
        assert waiting == sorted(waiting)
        assert {*running, *waiting} == self.live
        return running, waiting

    def check(self, plan: StepPlan, before) -> None:
        case, (running_before, waiting_before) = self.case, before
        ids = [chunk.seq_id for chunk in plan.chunks]
        assert ids, "an empty step"
        assert len(set(ids)) == len(ids), "a sequence twice"
        assert plan.num_tokens <= plan.bucket
        assert plan.bucket == min(bucket for bucket in case.buckets if bucket >= plan.num_tokens)
        assert [c.length == 1 and c.samples for c in plan.chunks] == sorted(
            (i < plan.num_decodes for i in range(len(ids))), reverse=True
        )

        runnable = [i for i in running_before if self.may_run(i)]
        decodes = [i for i in runnable if self.is_decode(i)]
        assert set(decodes) <= {*ids, *plan.preempted}, "a decode waits"
        assert [i for i in ids if i in decodes] == sorted(i for i in ids if i in decodes)
        self.check_preempted(plan, runnable, decodes)

        running = [seq.seq_id for seq in self.scheduler.running]
        admitted = sorted(set(running) - set(running_before))
        assert admitted == waiting_before[: len(admitted)], "overtaking"
        assert not (admitted and plan.preempted)
        assert len(running) <= case.max_running
        assert set(ids) <= set(running)
        assert set(running_before) - set(plan.preempted) <= set(running)
        rows = [seq.row for seq in self.scheduler.running]
        assert len(set(rows)) == len(rows)
        assert all(row in range(case.max_num_seqs) for row in rows)
        assert all(seq.row is None for seq in self.scheduler.waiting)

        for chunk in plan.chunks:
            self.execute(chunk)
        self.pool.check()
        tables = [self.scheduler.table(i) for i in running]
        assert sum(table.num_owned for table in tables) + self.pool.num_free == self.pool.num_total
        assert all(self.scheduler.table(i).num_owned <= self.scheduler.max_blocks(self.num_tokens(i)) for i in running)

    def check_preempted(self, plan: StepPlan, runnable: list[int], decodes: list[int]) -> None:
        self.num_preemptions += len(plan.preempted)
        assert not {*plan.preempted} & {chunk.seq_id for chunk in plan.chunks}
        left = [i for i in runnable if i not in plan.preempted]
        assert not plan.preempted or min(plan.preempted) > max(left), "the latest arrival goes first"
        if plan.preempted:
            num_free = self.case.num_blocks - sum(self.num_held(i) for i in runnable)
            num_grown = sum(self.computed[i] % self.case.block_size == 0 for i in decodes)
            assert num_grown > num_free if decodes else num_free == 0, "preempted without need"
        for seq_id in plan.preempted:
            self.computed[seq_id] = 0

    def execute(self, chunk) -> None:
        """What the device does with a chunk: writes its keys, reads what its queries see, draws into the row."""
        seq, table = self.seqs[chunk.seq_id], self.scheduler.table(chunk.seq_id).ids
        size = self.case.block_size
        end = chunk.start + chunk.length
        assert self.may_run(chunk.seq_id), "a token too many"
        assert chunk.length > 0
        assert chunk.start == self.computed[chunk.seq_id], "positions are not contiguous"
        assert end <= self.num_tokens(chunk.seq_id)
        assert chunk.samples == (end == self.num_tokens(chunk.seq_id))
        if end > len(seq.tokens):
            assert self.row_tokens[seq.row] == (chunk.seq_id, end - 1), "the newest token is not in the row"
        for position in range(chunk.start, end):
            self.cache[table[position // size], position % size] = (chunk.seq_id, position)
        first = 0 if self.case.window is None else max(0, chunk.start - self.case.window + 1)
        for position in range(first, end):
            assert self.cache[table[position // size], position % size] == (chunk.seq_id, position), "a key is lost"
        self.computed[chunk.seq_id] = end
        if chunk.samples:
            self.drawn[chunk.seq_id] += 1
            self.row_tokens[seq.row] = (chunk.seq_id, end)


def expected_tokens(drive: Drive) -> dict[int, int]:
    """Algorithm 3 where blocks abound, written down a second time: sequence -> tokens in the next step."""
    case = drive.case
    running = [seq.seq_id for seq in drive.scheduler.running]
    runnable = [i for i in running if drive.may_run(i)]
    decodes = [i for i in runnable if drive.is_decode(i)]
    prefills = [i for i in runnable if not drive.is_decode(i)]
    prefills += [seq.seq_id for seq in drive.scheduler.waiting][: case.max_running - len(running)]
    wanted = {i: drive.num_tokens(i) - drive.computed[i] for i in prefills}
    chooser = case.chooser or FillToEdge(case.buckets)
    left = min(max(chooser(len(decodes), sum(wanted.values())), case.buckets[0]), case.buckets[-1]) - len(decodes)
    tokens = dict.fromkeys(decodes, 1)
    for seq_id, num_tokens in wanted.items():
        if left > 0:
            tokens[seq_id] = min(left, num_tokens)
            left -= num_tokens
    return tokens
