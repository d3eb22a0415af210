"""Runs the scheduler against a device made of dictionaries and checks every step against an independent model.

The device is a pipeline of stages, each with a cache of its own: per block and offset which token of which sequence was
written there last. A step goes through them one after another while others follow it; what the last stage draws the
first knows one step later. A chunk is right only if in every stage every key that its queries see is found where the
block table pointed when it was launched.
"""

import collections
import dataclasses
from collections.abc import Sequence as Seq

from sarathi_jax.config import Policy
from sarathi_jax.kv.blocks import BlockPool
from sarathi_jax.request import Request, SamplingParams
from sarathi_jax.scheduling.base import Scheduler, Sizes
from sarathi_jax.scheduling.make import scheduler_of
from sarathi_jax.scheduling.plan import Chooser, Chunk, ChunkSchedule, Demand, FillToEdge, StepPlan
from sarathi_jax.sequence import Sequence
from tests.kv.owners import check_owners

BY_TURNS: tuple[Policy, ...] = ("vllm", "orca", "faster_transformer")
RESERVING: tuple[Policy, ...] = ("orca", "faster_transformer")


@dataclasses.dataclass(frozen=True)
class Arrival:
    """A request: when it comes, how long it is, and whether it ends before its limit.

    Attributes:
      step: from which step on it waits.
      stops_at: output length at which a stop token ends it, if not None.
      aborts_after: steps after arrival at which the client leaves, if not None.
      num_shared: so many of its first tokens, of prompt and output, are those of every other such request.
    """

    num_prompt: int
    max_tokens: int
    step: int = 0
    stops_at: int | None = None
    aborts_after: int | None = None
    num_shared: int = 0

    def token(self, seq_id: int, position: int) -> int:
        """Of the prompt, or what will be drawn."""
        return position if position < self.num_shared else 1000 * (seq_id + 1) + position


@dataclasses.dataclass(frozen=True)
class Case:
    """What is served and how.

    Attributes:
      num_ahead: steps scheduled before the tokens that are through are known: 0 without overlap, 1 as the engine does.
      num_stages: of the pipeline.
      chooser, chunk_schedule: of `ChunkingScheduler`.
    """

    arrivals: tuple[Arrival, ...]
    num_blocks: int
    block_size: int = 4
    buckets: tuple[int, ...] = (4, 8, 16)
    max_num_seqs: int = 4
    window: int | None = None
    num_ahead: int = 0
    num_stages: int = 1
    chooser: Chooser | None = None
    policy: Policy = "sarathi"
    prefix_caching: bool = False
    chunk_schedule: ChunkSchedule | None = None

    @property
    def sizes(self) -> Sizes:
        return {
            "block_size": self.block_size,
            "buckets": self.buckets,
            "max_num_seqs": self.max_num_seqs,
            "window": self.window,
            "max_model_len": max(arrival.num_prompt + arrival.max_tokens for arrival in self.arrivals),
            "num_stages": self.num_stages,
            "prefix_caching": self.prefix_caching,
        }

    def scheduler(self, pool: BlockPool) -> Scheduler:
        return scheduler_of(self.policy, pool, self.sizes, self.chooser, self.chunk_schedule)

    @property
    def max_running(self) -> int:
        return min(self.max_num_seqs, self.num_stages * self.buckets[-1])


@dataclasses.dataclass(frozen=True)
class Packed:
    """What the device is told of a chunk: nothing that the scheduler may change later.

    Attributes:
      life: how often the sequence had lost its blocks before; an earlier life's keys are not to be read, unless they
        may have been cached: then it is 0 always.
      on_device: the chunk's last token is not known on the host.
      num_shared: of `Arrival`, 0 where nothing may be shared.
    """

    chunk: Chunk
    row: int
    blocks: tuple[int, ...]
    life: int
    on_device: bool
    num_shared: int

    def key(self, position: int) -> tuple[int, int, int]:
        """What stands for the tokens up to that position, wherever they are the same."""
        return (-1, 0, position) if position < self.num_shared else (self.chunk.seq_id, self.life, position)


class Device:
    """Stages that each work on one step at a time, in order.

    Attributes:
      history: at the first stage, by row and position: whose token stands there.
    """

    def __init__(self, case: Case):
        self.case = case
        self.caches: list[dict[tuple[int, int], tuple[int, int, int]]] = [{} for _ in range(case.num_stages)]
        self.history: dict[tuple[int, int], int] = {}
        self.in_stages: list[list[Packed]] = [[] for _ in range(case.num_stages)]

    def tick(self, step: list[Packed]) -> None:
        """A step, or nothing, enters the first stage, and every other moves on by one."""
        self.in_stages = [step, *self.in_stages[:-1]]
        for packed in step:
            if packed.on_device:
                newest = packed.chunk.start + packed.chunk.length - 1
                assert self.history[packed.row, newest] == packed.chunk.seq_id, "the newest token is not in the row"
        for cache, packed_chunks in zip(self.caches, self.in_stages, strict=True):
            for packed in packed_chunks:
                self.attend(packed, cache)
        for packed in self.in_stages[-1]:
            if packed.chunk.samples:
                self.history[packed.row, packed.chunk.start + packed.chunk.length] = packed.chunk.seq_id

    def attend(self, packed: Packed, cache: dict[tuple[int, int], tuple[int, int, int]]) -> None:
        """Writes the chunk's keys and reads what its queries see."""
        size, chunk = self.case.block_size, packed.chunk
        end = chunk.start + chunk.length
        for position in range(chunk.start, end):
            cache[packed.blocks[position // size], position % size] = packed.key(position)
        first = 0 if self.case.window is None else max(0, chunk.start - self.case.window + 1)
        for position in range(first, end):
            key = cache[packed.blocks[position // size], position % size]
            assert key == packed.key(position), "a key is lost"


def make_sequence(seq_id: int, num_prompt: int, max_tokens: int, arrival: Arrival | None = None) -> Sequence:
    """With the tokens of its arrival, else those that count up from 0."""
    prompt = tuple(range(num_prompt) if arrival is None else (arrival.token(seq_id, i) for i in range(num_prompt)))
    return Sequence(seq_id, Request(str(seq_id), prompt, SamplingParams(), max_tokens, 0, frozenset(), 0.0))


class Drive:
    """Serves a case to its end, as the engine would, and checks every step.

    Attributes:
      plans: of all steps, None where nothing could run.
      num_preemptions: in all.
      longest_wait: most steps in a row in which a sequence could have decoded but was not let in.
      max_settled: most steps in a row in which the same sequences decoded.
      num_found: tokens that sequences started behind, summed.
      max_shared: most owners of blocks beyond the first, at the end of any step.
      is_ample: there are blocks for all at once.
    """

    def __init__(self, case: Case):
        self.case = case
        self.pool = BlockPool(case.num_blocks)
        self.scheduler = case.scheduler(self.pool)
        self.device = Device(case)
        self.seqs = {i: make_sequence(i, a.num_prompt, a.max_tokens, a) for i, a in enumerate(case.arrivals)}
        self.live: set[int] = set()
        # The model: what the steps launched so far have computed (in this life) and drawn, and when they drew last.
        self.computed = collections.Counter()
        self.drawn = collections.Counter()
        self.drew_in: dict[int, int] = {}
        # The entries of every running sequence's table, where it started, and the last tokens of all blocks that
        # launched steps have filled.
        self.blocks: dict[int, tuple[int, ...]] = {}
        self.starts = collections.Counter()
        self.filled: set[tuple[int, int]] = set()
        self.filling: set[tuple[int, int]] = set()
        self.num_found, self.max_shared = 0, 0
        self.in_flight: collections.deque[StepPlan | None] = collections.deque()
        self.plans: list[StepPlan | None] = []
        self.num_preemptions, self.num_idle = 0, 0
        self.waits = collections.Counter()
        self.longest_wait = 0
        # Since when the same sequences decode, and the last steps' shares of them.
        self.decoding: set[int] = set()
        self.shares: collections.deque[int] = collections.deque(maxlen=case.num_stages)
        self.num_settled, self.max_settled = 0, 0
        needs = [self.scheduler.max_blocks(a.num_prompt + a.max_tokens) for a in case.arrivals]
        self.is_ample = sum(needs) <= case.num_blocks
        self.round_bucket, self.num_following = 0, 0
        self.were_prompts = False
        self.is_fair = case.policy == "fastserve"  # goes by what sequences have had, others by their arrival
        arrivals = case.arrivals
        # Every step draws a token, or moves the earliest prefill, or fills another's last block, or waits for a commit.
        num_steps = sum(3 * a.max_tokens + a.num_prompt + case.block_size + 2 for a in arrivals)
        self.max_steps = 10 + max(a.step for a in arrivals) + (case.num_stages + case.num_ahead) * num_steps

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
        self.filled |= self.filling
        before = self.snapshot()
        plan = self.scheduler.schedule()
        self.check(plan, before)
        self.plans.append(plan)
        self.in_flight.append(plan)
        # A group waits for its turn, whatever the others do.
        self.num_idle = 0 if any(self.in_flight) else self.num_idle + 1
        most_idle = self.case.num_stages - 1 if self.case.policy in BY_TURNS else 0
        assert self.num_idle <= most_idle or not self.live, "nothing can run and nothing is in flight"
        if len(self.in_flight) == self.case.num_stages + self.case.num_ahead:
            self.commit(self.in_flight.popleft())
        return bool(self.live or any(self.in_flight)) or any(a.step > now for a in self.case.arrivals)

    def commit(self, plan: StepPlan | None) -> None:
        for chunk in plan.chunks if plan else ():
            seq, arrival = self.seqs[chunk.seq_id], self.case.arrivals[chunk.seq_id]
            if not chunk.samples or chunk.seq_id not in self.live:
                continue
            seq.commit(arrival.token(chunk.seq_id, len(seq.tokens)))
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

    def is_away(self, seq_id: int) -> bool:
        """Whether the sequence's newest token is still on its way through the stages."""
        return len(self.plans) - self.drew_in.get(seq_id, -self.case.num_stages) < self.case.num_stages

    def held(self, seq_id: int) -> set[int]:
        """Blocks that a running sequence still needs for what it has computed."""
        num_computed, window = self.computed[seq_id], self.case.window
        num_left = 0 if window is None else max(0, num_computed - window + 1) // self.case.block_size
        held = self.blocks[seq_id][num_left : -(-num_computed // self.case.block_size)]
        assert len(set(held)) == len(held)
        return set(held)

    def content(self, seq_id: int, position: int) -> tuple[int, int]:
        """What stands for the tokens up to that position, wherever they are the same."""
        return (-1, position) if position < self.case.arrivals[seq_id].num_shared else (seq_id, position)

    def num_findable(self, seq_id: int) -> int:
        """Tokens that a sequence that starts now finds where no block was evicted and no token is late."""
        if not self.case.prefix_caching:
            return 0
        size, num_tokens = self.case.block_size, self.num_tokens(seq_id)
        ends = range(size, num_tokens, size)
        missing = (end for end in ends if self.content(seq_id, end - 1) not in self.filled)
        return next(missing, ends[-1] + size if ends else size) - size

    def snapshot(self):
        running = [seq.seq_id for seq in self.scheduler.running]
        waiting = [seq.seq_id for seq in self.scheduler.waiting]
        assert running == sorted(running)
        assert waiting == sorted(waiting)
        assert {*running, *waiting} == self.live
        return running, waiting

    def check(self, plan: StepPlan | None, before) -> None:
        """Checks a plan, None too, and runs it."""
        case, (running_before, waiting_before) = self.case, before
        chunks, preempted = (plan.chunks, plan.preempted) if plan else ((), ())
        ids = [chunk.seq_id for chunk in chunks]
        assert plan is None or ids, "an empty step"
        assert len(set(ids)) == len(ids), "a sequence twice"
        if plan:
            assert plan.bucket in case.buckets
            assert plan.num_tokens <= plan.bucket
            assert [c.length == 1 and c.samples for c in chunks] == sorted(
                (i < plan.num_decodes for i in range(len(ids))), reverse=True
            )

        runnable = [i for i in running_before if self.may_run(i)]
        decodes = [i for i in runnable if self.is_decode(i)]
        self.check_decodes(decodes, ids, preempted)
        running = [seq.seq_id for seq in self.scheduler.running]
        admitted = sorted(set(running) - set(running_before))
        self.check_starts(admitted, chunks)
        self.check_policy(plan, admitted)
        self.check_preempted(preempted, ids, runnable, decodes)

        assert set(running_before) - set(running) == set(preempted)
        assert self.is_fair or admitted == waiting_before[: len(admitted)], "overtaking"
        assert self.is_fair or not (admitted and preempted)
        assert len(running) <= case.max_running
        assert set(ids) <= set(running)
        rows = [seq.row for seq in self.scheduler.running]
        assert len(set(rows)) == len(rows)
        assert all(row in range(case.max_num_seqs) for row in rows)
        assert all(seq.row is None for seq in self.scheduler.waiting)

        self.device.tick([self.launch(chunk) for chunk in chunks])
        check_owners(self.pool, [self.scheduler.table(i) for i in running])
        self.blocks = {i: tuple(self.scheduler.table(i).ids) for i in running}
        self.max_shared = max(self.max_shared, self.pool.num_shared)
        assert all(self.scheduler.table(i).num_owned <= self.scheduler.max_blocks(self.num_tokens(i)) for i in running)

    def check_starts(self, admitted: list[int], chunks: Seq[Chunk]) -> None:
        """Sequences start behind whole blocks with a token left to compute, and behind all blocks that are there."""
        starts = {chunk.seq_id: chunk.start for chunk in chunks}
        for seq_id in admitted:
            start = starts.get(seq_id, self.seqs[seq_id].num_computed)
            assert start % self.case.block_size == 0
            assert start < self.num_tokens(seq_id)
            assert start == 0 or self.case.prefix_caching
            if self.is_ample and self.case.window is None and self.case.num_ahead <= 1:
                assert start == self.num_findable(seq_id), "a block that is there is not found"
            self.starts[seq_id] = self.computed[seq_id] = start
            self.num_found += start

    def check_decodes(self, decodes: list[int], ids: list[int], preempted) -> None:
        """Nobody who is away comes in; notes who waits and how the steps share those who decode."""
        assert not any(map(self.is_away, ids)), "a token that is not there yet"
        assert self.is_fair or [i for i in ids if i in decodes] == sorted(i for i in ids if i in decodes)
        has_prompts = self.case.policy != "sarathi" and not {*ids} <= {*decodes}
        is_same = self.decoding == set(decodes) and not preempted and not has_prompts
        self.num_settled = self.num_settled + 1 if is_same else 0
        self.max_settled = max(self.max_settled, self.num_settled)
        self.decoding = set(decodes)
        self.shares.append(len(self.decoding.intersection(ids)))
        ready = {i for i in decodes if not self.is_away(i)}
        self.waits = collections.Counter({i: self.waits[i] + 1 for i in ready - {*ids, *preempted}})
        self.longest_wait = max(self.longest_wait, *self.waits.values(), 0)
        # One round for the shares to settle, and one for a bucket that was chosen when fewer decoded.
        if self.num_settled >= 3 * self.case.num_stages and self.is_ample:
            assert max(self.waits.values(), default=0) < self.case.num_stages, "a decode waits"
            assert sum(self.shares) == len(decodes)

    def check_sarathi(self, plan: StepPlan | None) -> None:
        """A decode waits for nothing but its turn in a pipeline, where the steps of a round have one bucket."""
        num_stages = self.case.num_stages
        if num_stages == 1:
            assert not self.waits, "a decode waits"
        if self.num_settled >= 3 * num_stages and self.is_ample:
            assert max(self.shares) - min(self.shares) <= 1, "uneven shares"
        if plan is None:
            self.num_following = 0
            return
        if num_stages == 1:
            assert plan.bucket == min(bucket for bucket in self.case.buckets if bucket >= plan.num_tokens)
        if self.num_following == 0:
            self.round_bucket, self.num_following = plan.bucket, num_stages
        assert plan.bucket == self.round_bucket, "two buckets in a round"
        self.num_following -= 1

    def check_policy(self, plan: StepPlan | None, admitted: list[int]) -> None:
        """What sets a policy apart."""
        policy, is_one_stage = self.case.policy, self.case.num_stages == 1
        if policy == "sarathi":
            self.check_sarathi(plan)
            return
        if policy in ("orca", "hybrid_only") and is_one_stage:
            assert not self.waits, "a decode waits"
        if policy == "faster_transformer" and is_one_stage:
            others = {seq.seq_id for seq in self.scheduler.running} - {*admitted}
            assert not (admitted and others), "a batch begins before the last one has ended"
        if plan is None:
            return
        assert plan.bucket == min(bucket for bucket in self.case.buckets if bucket >= plan.num_tokens)
        prompts = [chunk for chunk in plan.chunks if chunk.seq_id not in self.decoding]
        if policy in ("vllm", "faster_transformer", "chunked_only"):
            assert len(prompts) in (0, len(plan.chunks)), "decodes beside prompts"
        if policy == "vllm" and is_one_stage:
            assert prompts or not self.waits, "a decode waits"
        if policy == "chunked_only":
            # Whoever is ready gets the next step; only a step of one stage can hold them all.
            assert not (prompts and self.were_prompts and is_one_stage and self.waits), "two steps of prompts in a row"
            self.were_prompts = bool(prompts)
        else:
            self.check_whole(plan, prompts)

    def check_whole(self, plan: StepPlan, prompts: list[Chunk]) -> None:
        """No prompt is cut, but by preemption one may have outgrown the largest bucket, and runs in pieces."""
        starts, largest = self.starts, self.case.buckets[-1]
        if self.is_fair:
            largest = plan.num_tokens  # who is better may take blocks from one in pieces, or leave it little room
        pieces = [chunk for chunk in prompts if chunk.start > starts[chunk.seq_id] or not chunk.samples]
        assert self.is_fair or len(pieces) <= 1, "two in pieces"
        for chunk in pieces:
            assert self.num_tokens(chunk.seq_id) - starts[chunk.seq_id] > self.case.buckets[-1], "a prompt is cut"
            assert chunk.samples or largest == plan.num_tokens, "pieces are as large as can be"

    def check_preempted(self, preempted, ids: list[int], runnable: list[int], decodes: list[int]) -> None:
        self.num_preemptions += len(preempted)
        assert not (preempted and self.case.policy in RESERVING), "memory was reserved"
        assert not {*preempted} & {*ids}
        left = [i for i in runnable if i not in preempted]
        assert self.is_fair or not preempted or min(preempted) > max(left), "the latest arrival goes first"
        if preempted and not self.is_fair:
            num_free = self.case.num_blocks - len(set().union(*map(self.held, runnable)))
            wanted = [i for i in decodes if i in ids or (i in preempted and not self.is_away(i))]
            num_grown = sum(self.computed[i] % self.case.block_size == 0 for i in wanted)
            assert num_grown > num_free, "preempted without need"
        for seq_id in preempted:
            self.computed[seq_id] = 0

    def launch(self, chunk: Chunk) -> Packed:
        """Counts a chunk's work as done and packs it."""
        seq = self.seqs[chunk.seq_id]
        end = chunk.start + chunk.length
        assert self.may_run(chunk.seq_id), "a token too many"
        assert chunk.length > 0
        assert chunk.start == self.computed[chunk.seq_id], "positions are not contiguous"
        assert end <= self.num_tokens(chunk.seq_id)
        assert chunk.samples == (end == self.num_tokens(chunk.seq_id))
        self.computed[chunk.seq_id] = end
        if chunk.samples:
            self.drawn[chunk.seq_id] += 1
            self.drew_in[chunk.seq_id] = len(self.plans)
        assert seq.row is not None
        blocks = tuple(self.scheduler.table(chunk.seq_id).ids)
        size, is_caching = self.case.block_size, self.case.prefix_caching
        for block_id in blocks[chunk.start // size : -(-end // size)]:
            assert self.pool.num_owners(block_id) == 1, "a shared block is written"
            assert block_id not in self.pool._keys, "a block that others may find is written"
        self.filling |= {self.content(chunk.seq_id, i) for i in range(chunk.start, end) if (i + 1) % size == 0}
        life = 0 if is_caching else seq.num_preemptions
        num_shared = self.case.arrivals[chunk.seq_id].num_shared if is_caching else 0
        return Packed(chunk, seq.row, blocks, life, end > len(seq.tokens), num_shared)


def timeline(case: Case) -> str:
    """One line a sequence, one column a step: tokens of a prefill chunk, d: a decode, x: preempted, .: nothing.

    In a pipeline a column is what enters it, where bucket 0 stands for a step in which nothing does.
    """
    drive = Drive(case).run()
    nothing = StepPlan((), 0, 0)
    steps = [plan or nothing for plan in drive.plans if plan or case.num_stages > 1]
    while steps[-1] is nothing:
        steps.pop()
    lines = ["bucket " + "".join(f"{plan.bucket:3}" for plan in steps)]
    for seq_id, seq in drive.seqs.items():
        line = f"seq {seq_id}  "
        for plan in steps:
            chunk = next((chunk for chunk in plan.chunks if chunk.seq_id == seq_id), None)
            is_decode = chunk is not None and chunk.length == 1 and chunk.start >= seq.num_prompt
            cell = "x" if seq_id in plan.preempted else "." if chunk is None else "d" if is_decode else chunk.length
            line += f"{cell:>3}"
        lines.append(line)
    return "\n".join(lines)


def drawn(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines())


def expected_tokens(drive: Drive) -> dict[int, int]:
    """Algorithm 3 where blocks abound, written down a second time: sequence -> tokens in the next step."""
    case = drive.case
    running = [seq.seq_id for seq in drive.scheduler.running]
    runnable = [i for i in running if drive.may_run(i)]
    decodes = [i for i in runnable if drive.is_decode(i)]
    prefills = [i for i in runnable if not drive.is_decode(i)]
    prefills += [seq.seq_id for seq in drive.scheduler.waiting][: case.max_running - len(running)]
    starts = {i: drive.computed[i] if i in running else drive.num_findable(i) for i in prefills}
    wanted = {i: drive.num_tokens(i) - starts[i] for i in prefills}
    chooser = case.chooser or FillToEdge(case.buckets)
    demand = Demand(len(decodes), tuple((starts[i], num_tokens) for i, num_tokens in wanted.items()))
    left = min(max(chooser(demand), case.buckets[0]), case.buckets[-1]) - len(decodes)
    tokens = dict.fromkeys(decodes, 1)
    for seq_id, num_tokens in wanted.items():
        if left > 0:
            tokens[seq_id] = min(left, num_tokens)
            left -= num_tokens
    return tokens


def expected_whole_prompts(drive: Drive) -> dict[int, int]:
    """vLLM where blocks abound and nobody is preempted, written down a second time, without a pipeline."""
    running = [seq.seq_id for seq in drive.scheduler.running]
    tokens, left = {}, drive.case.buckets[-1]
    for seq in drive.scheduler.waiting[: drive.case.max_running - len(running)]:
        if seq.num_prompt > left:
            break
        tokens[seq.seq_id] = seq.num_prompt
        left -= seq.num_prompt
    return tokens or {i: 1 for i in running if drive.may_run(i)}
