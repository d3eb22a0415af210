"""What all policies share: who waits and who runs, the blocks and rows that they own, and how blocks are won back.

A policy is a class below `Scheduler` that decides in `schedule` what enters the next step. Where the paper is silent
(admission, preemption) see docs/decisions/scheduler.md.
"""

import abc
import bisect
import collections
import heapq
import itertools
import math
import operator
from collections.abc import Collection, Iterator
from collections.abc import Sequence as Seq
from typing import NotRequired, TypedDict

from sarathi_jax.kv.blocks import BlockError, BlockPool, BlockTable, Prefix, extend_keys
from sarathi_jax.latency import Backlog
from sarathi_jax.scheduling.plan import Chunk, SchedulerState, StepPlan, TokenBudget
from sarathi_jax.sequence import Sequence, Status

RANK = operator.attrgetter("rank")
WATERMARK_FRACTION = 0.01  # of the pool, kept free at admission for the growth of running decodes


class Sizes(TypedDict):
    """What every policy is made with, beside the pool: see `Scheduler`."""

    block_size: int
    buckets: tuple[int, ...]
    max_num_seqs: int
    window: int | None
    max_model_len: int
    num_stages: NotRequired[int]
    prefix_caching: NotRequired[bool]


class Scheduler(abc.ABC):
    """Decides what each step computes and which sequence owns which blocks and device row.

    `schedule` may be called while earlier steps still run: it counts what they compute as done and the tokens they
    draw as known, because the device runs steps in order.

    In a pipeline of pp stages each call plans the micro-batch that enters next. A sequence that drew a token enters
    again pp calls later at the earliest, when the token is back at the first stage; the chunks of a prompt may follow
    each other at once.

    Args:
      pool: the blocks of the KV cache; every block of it that is out belongs to a running sequence.
      block_size: tokens of a block.
      buckets: compiled step sizes, ascending; the last is the largest step.
      max_num_seqs: device rows, hence sequences that may run at once (at most as many as the largest bucket holds in
        each of the micro-batches in flight do, so that every decode always fits).
      window: tokens that a query can see, itself included, or None for all of them; blocks that left it are freed.
      max_model_len: longest prompt + output in tokens.
      num_stages: pp.
      prefix_caching: a sequence starts behind those of its first blocks that the pool still holds.
    """

    _cuts_prompts = True  # into chunks; else a prompt must fit into the largest bucket

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        buckets: tuple[int, ...],
        max_num_seqs: int,
        window: int | None,
        max_model_len: int,
        num_stages: int = 1,
        prefix_caching: bool = False,
    ):
        self._pool = pool
        self._block_size = block_size
        self._buckets = buckets
        self._max_running = min(max_num_seqs, num_stages * buckets[-1])
        self._window = window
        self._max_model_len = max_model_len
        self._num_stages = num_stages
        self._prefix_caching = prefix_caching
        # So many blocks before a block show a query in it all that it may see; None: all of them do.
        self._reach = None if window is None else -(-(window - 1) // block_size)
        # Sequences whose newest token is still on its way through the stages, for each of the last pp - 1 calls.
        self._away: collections.deque[frozenset[int]] = collections.deque(maxlen=num_stages - 1)
        self._behind: collections.deque[StepPlan | None] = collections.deque(maxlen=num_stages)  # the last pp steps
        self._filling: list[Sequence] = []  # in the last step they computed the last token of a block, or of several
        self._num_queries, self._num_hits = 0, 0
        self._watermark = math.ceil(WATERMARK_FRACTION * pool.num_total)
        # Both by rank (priority, then arrival), which is also the order in which preempted sequences come back.
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._tables: dict[int, BlockTable] = {}
        self._free_rows = list(range(max_num_seqs))  # a heap: the lowest free row goes first

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_running} running, {self.num_waiting} waiting, {self._pool})"

    @abc.abstractmethod
    def schedule(self) -> StepPlan | None:
        """Plans the next step and records its launch in the sequences, so the plan must be launched.

        Returns:
          The plan, or None if no sequence can run now: an empty step enters the pipeline, if there is one.
        """

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """Sequences not admitted yet or preempted, by rank. A copy: for its size use `num_waiting`."""
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Sequences that own a row, by rank. A copy: for its size use `num_running`."""
        return tuple(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def table(self, seq_id: int) -> BlockTable:
        """The blocks of a running sequence.

        Raises:
          KeyError: the sequence does not run.
        """
        return self._tables[seq_id]

    def max_blocks(self, num_tokens: int) -> int:
        """Most blocks that a sequence of `num_tokens` tokens holds at once, whatever its chunks.

        With a window that is what the largest chunk and the keys its first query sees can touch.
        """
        num_blocks = -(-num_tokens // self._block_size)
        if self._window is None:
            return num_blocks
        span = self._window - 1 + self._buckets[-1]
        return min(num_blocks, -(-(span - 1) // self._block_size) + 1)

    @property
    def longest_sequence(self) -> int:
        """Longest prompt + output in tokens that can be served: the model's limit, or what the whole pool can hold."""
        if self.max_blocks(self._max_model_len - 1) <= self._pool.num_total:
            return self._max_model_len
        return self._pool.num_total * self._block_size + 1  # the last token drawn is never computed

    @property
    def longest_prompt(self) -> int:
        """Longest prompt in tokens that can be served, with a single token of output."""
        longest = self.longest_sequence - 1
        return longest if self._cuts_prompts else min(longest, self._buckets[-1])

    @property
    def keeps_pace(self) -> bool:
        """Whether steps are kept as short as the running requests were promised (`Request.pace_s`)."""
        return False

    @property
    def state(self) -> SchedulerState:
        """What it has in hand. O(sequences)."""
        return SchedulerState(
            num_running=self.num_running,
            num_waiting=self.num_waiting,
            num_blocks=self._pool.num_total,
            num_free_blocks=self._pool.num_free,
            backlog=self._backlog(),
            num_prefix_queries=self._num_queries,
            num_prefix_hits=self._num_hits,
        )

    def add(self, seq: Sequence) -> None:
        """Queues a new sequence.

        Raises:
          ValueError: it could never finish: too long for the model, for the whole pool, or for the policy.
        """
        if not self._cuts_prompts and seq.num_prompt > self._buckets[-1]:
            raise ValueError(
                f"a prompt of {seq.num_prompt} tokens exceeds the largest step of {self._buckets[-1]}, and this policy "
                f"never cuts prompts: raise token_budget to {seq.num_prompt}, or serve with the policy sarathi"
            )
        length = seq.num_prompt + seq.request.max_tokens
        if length > self._max_model_len:
            raise ValueError(f"prompt and output of {length} tokens exceed max_model_len={self._max_model_len}")
        num_blocks = self.max_blocks(length - 1)  # the last token drawn is never computed
        if num_blocks > self._pool.num_total:
            raise ValueError(
                f"a sequence of {length} tokens needs {num_blocks} blocks of the KV cache, which has "
                f"{self._pool.num_total}: ask for fewer tokens or make the cache larger"
            )
        bisect.insort(self._waiting, seq, key=RANK)

    def receive(self, token_ids: Seq[int]) -> None:
        """Takes the keys and values of a prompt that another replica computed, so that requests with it find them.

        They stay as long as nobody needs the room, as those of finished requests do; if there is none, or without
        `prefix_caching`, nothing happens, and the prompt is computed again.
        """
        table, num_blocks = BlockTable(self._pool, self._block_size), len(token_ids) // self._block_size
        if self._prefix_caching and table.ensure(num_blocks * self._block_size):
            keys: list[bytes] = []
            extend_keys(keys, token_ids, self._block_size, num_blocks)
            table.register(keys, num_blocks)
        table.release()

    def remove(self, seq: Sequence) -> None:
        """Forgets a sequence that finished or was aborted, at any moment, and frees its blocks and row.

        Removing one that is not here does nothing.
        """
        if seq.seq_id in self._tables:
            _discard(self._running, seq)
            self._give_back(seq)
            seq.row = None
        else:
            _discard(self._waiting, seq)

    def _backlog(self) -> Backlog:
        decodes = [seq for seq in self._running if seq.is_decode]
        paces = [seq.request.pace_s for seq in self._running if seq.request.pace_s is not None]
        left = [seq.num_prompt + seq.request.max_tokens - seq.num_tokens for seq in self._running]
        return Backlog(
            num_prefill_tokens=sum(seq.num_uncomputed for seq in (*self._running, *self._waiting) if not seq.is_decode),
            num_decodes=len(decodes),
            num_decode_keys=sum(seq.num_computed for seq in decodes),
            num_free_rows=self._max_running - self.num_running,
            num_waiting=self.num_waiting,
            steps_to_free_row=min(left, default=0),
            pace_s=min(paces, default=None),
        )

    # For the policies.

    def _reserve(self) -> None:
        """Lets no more sequences run than the pool holds of the longest length, so that none ever lacks a block."""
        longest = min(self.max_blocks(self._max_model_len - 1), self._pool.num_total)
        self._max_running = min(self._max_running, self._pool.num_total // longest)
        self._watermark = 0

    def _live(self) -> list[Sequence]:
        """The running sequences that go on, by rank, after freeing all blocks that nobody will read."""
        for seq in self._filling:
            self._register(seq)
        self._filling.clear()
        live = []
        for seq in self._running:
            if seq.is_runnable:
                live.append(seq)
            else:
                self._tables[seq.seq_id].release()  # its last token is drawn and only waits for its commit
        if self._window is not None:
            for seq in live:
                self._tables[seq.seq_id].release_before(seq.num_computed - self._window + 1)
        return live

    def _plan_decodes(
        self, live: list[Sequence], away: Collection[int], most: int, preempted: list[int]
    ) -> tuple[list[Chunk], list[Sequence]]:
        """Plans the decodes of `live` that are not away, up to so many, and preempts from its end where blocks lack.

        Victims come from the end and decodes are planned from the front, so nothing planned is ever preempted. A victim
        leaves at least a block, so a step with a preemption is never empty.

        Returns:
          The chunks and the unfinished prefills that are left.
        """
        chunks, prefills = [], []
        for seq in live:  # which gets shorter where somebody is preempted
            if not seq.is_decode:
                prefills.append(seq)
                continue
            if seq.seq_id in away or seq.is_held or len(chunks) == most:
                continue
            start = seq.num_computed
            table = self._tables[seq.seq_id]
            while not table.ensure(start + 1):
                if len(live) == 1:
                    raise BlockError(f"{seq} runs alone and {self._pool} cannot hold it: are blocks leaking?")
                if live[-1] is seq and not chunks and not prefills:
                    break  # everyone before it is on the way and may leave blocks: it waits
                victim = live.pop()
                self._preempt(victim)
                preempted.append(victim.seq_id)
                if victim is seq:
                    break
            else:
                chunks.append(Chunk(seq.seq_id, start, 1, True))
                seq.advance(1, True)
                if self._prefix_caching and not seq.num_computed % self._block_size:
                    self._filling.append(seq)
        return chunks, prefills

    def _affordable(self, prefills: Seq[Sequence]) -> Iterator[tuple[Sequence, int]]:
        """The waiting sequences that rows and blocks let start now, by rank, and how many tokens each starts behind.

        A sequence starts only if all its known tokens fit beside what the prefills that run still need. So once no
        decode is left, every prefill finds its blocks: prefills never wait for each other, and need not preempt.

        Cached blocks that a sequence finds here count as free ones that it takes, and `BlockPool.find` puts them last
        in the order of eviction, so they are still there when it starts in the same step.
        """
        num_spare = self._num_spare(prefills)
        num_rows = self._max_running - len(self._running)
        for index, seq in enumerate(self._waiting):
            # A preempted sequence's token in flight lives in a row that it lost: wait until the host knows it.
            if index == num_rows or seq.num_in_flight:
                return
            num_blocks, start = self._blocks_to_start(seq)
            is_alone = not self._running and index == 0
            if num_spare < num_blocks + (0 if is_alone else self._watermark):
                return
            num_spare -= num_blocks
            yield seq, start

    def _num_spare(self, prefills: Seq[Sequence]) -> int:
        """Blocks that are free beside what the prefills that run still need."""
        num_spare = self._pool.num_free - sum(self._blocks_missing(seq) for seq in prefills)
        # Once it left one's window, a shared block is no gain.
        return num_spare if self._window is None else num_spare - self._pool.num_shared

    def _blocks_to_start(self, seq: Sequence) -> tuple[int, int]:
        """Blocks that a waiting sequence takes from the pool for its known tokens, and how many it starts behind."""
        prefix = self._prefix(seq)
        num_blocks = self.max_blocks(seq.num_tokens)
        if self._window is None:
            num_blocks -= sum(self._pool.num_owners(block_id) > 0 for block_id in prefix.ids)
        return num_blocks, prefix.num_blocks * self._block_size

    def _whole_newcomers(
        self, prefills: Seq[Sequence], num_tokens: int, most: int | None = None
    ) -> list[tuple[Sequence, int]]:
        """The waiting sequences that can start now and compute all they have in one step, at most so many, and behind
        how many tokens.

        A preempted one may have outgrown the largest bucket since. It starts first and alone, and runs in pieces.

        Args:
          prefills: that run, and go before them.
          num_tokens: room in the step for all these.
          most: sequences that may start; None: as many as find rows.
        """
        num_tokens -= sum(seq.num_uncomputed for seq in prefills)
        newcomers = []
        for seq, start in self._affordable(prefills):
            length = seq.num_tokens - start
            is_too_long = length > self._buckets[-1] and not prefills and not newcomers
            if num_tokens <= 0 or len(newcomers) == most or not (length <= num_tokens or is_too_long):
                break
            num_tokens -= min(length, num_tokens)
            newcomers.append((seq, start))
        return newcomers

    def _prefix(self, seq: Sequence) -> Prefix:
        """The blocks that hold the beginning of a waiting sequence. Its last token is always computed, since the next
        one is drawn from it; and every token of a prompt whose log-probabilities are wanted."""
        if not self._prefix_caching or seq.request.params.prompt_logprobs is not None:
            return Prefix()
        num_blocks = (seq.num_tokens - 1) // self._block_size
        extend_keys(seq.block_keys, seq.tokens, self._block_size, num_blocks)
        return self._pool.find(itertools.islice(seq.block_keys, num_blocks), self._reach)

    def _register(self, seq: Sequence) -> None:
        """Lets others find the blocks of a running sequence that launched steps fill with tokens known here."""
        if self._prefix_caching and seq.seq_id in self._tables:
            num_blocks = min(len(seq.tokens), seq.num_computed) // self._block_size
            extend_keys(seq.block_keys, seq.tokens, self._block_size, num_blocks)
            self._tables[seq.seq_id].register(seq.block_keys, num_blocks)

    def _plan_prefill(self, seq: Sequence, budget: TokenBudget, chunks: list[Chunk], most: int | None = None) -> None:
        """Plans the next chunk of a prefill, as long as budget and blocks allow; none if they allow nothing.

        Args:
          seq: that runs.
          budget: of the step.
          chunks: where it goes.
          most: tokens of the step up to which the chunk may fill it; None: the whole budget.
        """
        length = budget.take(self._room(seq), most)
        if not length:
            return
        start, end = seq.num_computed, seq.num_computed + length
        self._tables[seq.seq_id].ensure(end)
        samples = end == seq.num_tokens
        chunks.append(Chunk(seq.seq_id, start, length, samples))
        seq.advance(length, samples)
        self._filling.append(seq)

    def _room(self, seq: Sequence) -> int:
        """Tokens of a running prefill that the blocks free now can take."""
        return min(seq.num_uncomputed, self._tables[seq.seq_id].max_tokens - seq.num_computed)

    def _blocks_missing(self, seq: Sequence) -> int:
        """Blocks that a running prefill still takes from the pool before its known tokens are computed."""
        table = self._tables[seq.seq_id]
        missing = table.blocks_needed(seq.num_tokens)
        return missing if self._window is None else min(missing, self.max_blocks(seq.num_tokens) - table.num_owned)

    def _step(
        self, decodes: list[Chunk], chunks: Seq[Chunk], preempted: Seq[int] = (), bucket: int | None = None
    ) -> StepPlan | None:
        """The step of what was planned; None if that is nothing.

        Args:
          decodes, chunks: of it; the last token of a prompt alone in its chunk has the form of a decode.
          preempted: for it.
          bucket: of it; None: the smallest that holds it.
        """
        rest = []
        for chunk in chunks:
            (decodes if chunk.length == 1 and chunk.samples else rest).append(chunk)
        if self._num_stages > 1:
            self._away.append(frozenset(chunk.seq_id for chunk in (*decodes, *rest) if chunk.samples))
        plan = None
        if decodes or rest:
            if bucket is None:
                bucket = self._bucket(len(decodes) + sum(chunk.length for chunk in rest))
            plan = StepPlan((*decodes, *rest), bucket, len(decodes), tuple(preempted))
        self._behind.append(plan)
        return plan

    def _bucket(self, num_tokens: int) -> int:
        """The smallest bucket that holds so many tokens."""
        return self._buckets[bisect.bisect_left(self._buckets, num_tokens)]

    def _admit(self, seq: Sequence) -> None:
        _discard(self._waiting, seq)
        bisect.insort(self._running, seq, key=RANK)
        prefix, table = self._prefix(seq), BlockTable(self._pool, self._block_size)
        table.start_with(prefix)
        self._tables[seq.seq_id] = table
        seq.num_computed = prefix.num_blocks * self._block_size
        if self._prefix_caching and not seq.num_preemptions:
            self._num_queries += seq.num_prompt
            self._num_hits += seq.num_computed
        seq.row = heapq.heappop(self._free_rows)
        seq.status = Status.RUNNING

    def _preempt(self, seq: Sequence) -> None:
        """Takes a sequence's blocks and row; it is computed again later, as far as its blocks are gone by then."""
        _discard(self._running, seq)
        self._give_back(seq)
        seq.preempt()
        bisect.insort(self._waiting, seq, key=RANK)

    def _give_back(self, seq: Sequence) -> None:
        self._register(seq)
        self._tables.pop(seq.seq_id).release()
        assert seq.row is not None
        heapq.heappush(self._free_rows, seq.row)


def _discard(queue: list[Sequence], seq: Sequence) -> None:
    """Removes `seq` from a queue in order of rank, if it is there."""
    index = bisect.bisect_left(queue, seq.rank, key=RANK)
    if index < len(queue) and queue[index] is seq:
        del queue[index]
