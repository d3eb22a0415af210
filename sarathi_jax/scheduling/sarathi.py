"""Stall-free batching (Sarathi-Serve, Algorithm 3): every running decode, then prefill chunks, then new requests.

Where the paper is silent (admission, preemption, the bucket of a step) see docs/decisions/scheduler.md; for pipelines,
docs/decisions/pipeline-parallel.md.
"""

import bisect
import collections
import heapq
import math
import operator

from sarathi_jax.kv.blocks import BlockError, BlockPool, BlockTable
from sarathi_jax.scheduling.plan import Chooser, Chunk, FillToEdge, StepPlan, TokenBudget
from sarathi_jax.sequence import Sequence, Status

ARRIVAL = operator.attrgetter("seq_id")
WATERMARK_FRACTION = 0.01  # of the pool, kept free at admission for the growth of running decodes
SMALLEST_SHARE = 64  # tokens of prompts that a micro-batch takes before it leaves some to the next ones


class SarathiScheduler:
    """Decides what each step computes and which sequence owns which blocks and device row.

    `schedule` may be called while earlier steps still run: it counts what they compute as done and the tokens they
    draw as known, because the device runs steps in order.

    In a pipeline of pp stages each call plans the micro-batch that enters next. A sequence that drew a token enters
    again pp calls later, when the token is back at the first stage; the chunks of a prompt follow each other at once.
    Decodes and prompts are shared out evenly among the micro-batches in flight, which use one bucket.

    Args:
      pool: the blocks of the KV cache; every block of it that is out belongs to a running sequence.
      block_size: tokens of a block.
      buckets: compiled step sizes, ascending; the last is the largest step.
      max_num_seqs: device rows, hence sequences that may run at once (at most as many as the largest bucket holds in
        each of the micro-batches in flight do, so that every decode always fits).
      window: tokens that a query can see, itself included, or None for all of them; blocks that left it are freed.
      max_model_len: longest prompt + output in tokens.
      num_stages: pp.
      chooser: token limit of a step by its decodes and prefill demand; None: `FillToEdge(buckets)`.
    """

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
        chooser: Chooser | None = None,
    ):
        self._pool = pool
        self._block_size = block_size
        self._buckets = buckets
        self._max_running = min(max_num_seqs, num_stages * buckets[-1])
        self._window = window
        self._max_model_len = max_model_len
        self._chooser = chooser or FillToEdge(buckets)
        self._watermark = math.ceil(WATERMARK_FRACTION * pool.num_total)
        # Both in arrival order (seq_id), which is also the order in which preempted sequences come back.
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._tables: dict[int, BlockTable] = {}
        self._free_rows = list(range(max_num_seqs))  # a heap: the lowest free row goes first
        self._num_stages = num_stages
        # Sequences whose newest token is still on its way through the stages, for each of the last pp - 1 calls.
        self._away: collections.deque[frozenset[int]] = collections.deque(maxlen=num_stages - 1)
        # Token limit of the micro-batches in flight, and how many may still follow before it is chosen again.
        self._limit, self._num_following = 0, 0

    def __repr__(self) -> str:
        return f"SarathiScheduler({self.num_running} running, {self.num_waiting} waiting, {self._pool})"

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """Sequences not admitted yet or preempted, in arrival order. A copy: for its size use `num_waiting`."""
        return tuple(self._waiting)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Sequences that own a row, in arrival order. A copy: for its size use `num_running`."""
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

    def add(self, seq: Sequence) -> None:
        """Queues a new sequence.

        Raises:
          ValueError: it could never finish: too long for the model, or for the whole pool.
        """
        length = seq.num_prompt + seq.request.max_tokens
        if length > self._max_model_len:
            raise ValueError(f"prompt and output of {length} tokens exceed max_model_len={self._max_model_len}")
        num_blocks = self.max_blocks(length - 1)  # the last token drawn is never computed
        if num_blocks > self._pool.num_total:
            raise ValueError(
                f"a sequence of {length} tokens needs {num_blocks} blocks of the KV cache, which has "
                f"{self._pool.num_total}: ask for fewer tokens or make the cache larger"
            )
        bisect.insort(self._waiting, seq, key=ARRIVAL)

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

    def schedule(self) -> StepPlan | None:
        """Plans the next step and records its launch in the sequences, so the plan must be launched.

        Returns:
          The plan, or None if no sequence can run before a step in flight is committed or a request arrives.
        """
        live = self._live()
        preempted: list[int] = []
        most_decodes, largest_share = self._shares(live)
        decodes, prefills = self._plan_decodes(live, most_decodes, preempted)
        # Without blocks for everyone who runs there are none for newcomers, the preempted ones first of all.
        newcomers = [] if preempted else self._admissible(prefills, len(decodes))

        if self._num_following == 0:
            demand = sum(self._room(seq) for seq in prefills) + sum(seq.num_uncomputed for seq in newcomers)
            self._choose(len(decodes) if self._num_stages == 1 else largest_share, demand)
        budget = TokenBudget(self._limit)
        budget.take(len(decodes))
        chunks: list[Chunk] = []
        for seq in prefills:
            self._plan_prefill(seq, budget, chunks)
        for seq in newcomers:
            if not budget.left:
                break
            self._admit(seq)
            self._plan_prefill(seq, budget, chunks)

        # The last token of a prompt alone in its chunk has the form of a decode: it goes with them.
        decodes += [chunk for chunk in chunks if chunk.length == 1 and chunk.samples]
        chunks = [chunk for chunk in chunks if chunk.length > 1 or not chunk.samples]
        self._away.append(frozenset(chunk.seq_id for chunk in (*decodes, *chunks) if chunk.samples))
        if not decodes and not chunks:
            self._num_following = 0
            return None
        self._num_following -= 1
        num_tokens = len(decodes) + sum(chunk.length for chunk in chunks)
        filled = num_tokens if self._num_stages == 1 else self._limit
        bucket = self._buckets[bisect.bisect_left(self._buckets, filled)]
        return StepPlan((*decodes, *chunks), bucket, len(decodes), tuple(preempted))

    def _shares(self, live: list[Sequence]) -> tuple[int, int]:
        """An even share of the decodes for the next micro-batch, at most what its bucket has room for where that is
        chosen already, and the largest share that any micro-batch takes."""
        if self._num_stages == 1:
            return len(live), len(live)
        ids = {seq.seq_id for seq in live if seq.is_decode}
        share, num_larger = divmod(len(ids), self._num_stages)
        # Of any pp micro-batches in a row so many take one more.
        num_larger -= sum(len(ids & group) > share for group in self._away)
        most, largest = share + (num_larger > 0), -(-len(ids) // self._num_stages)
        return min(most, self._limit) if self._num_following else most, largest

    def _choose(self, num_decodes: int, num_prefill_tokens: int) -> None:
        """Sets the token limit of the next pp micro-batches, among which the prompts are shared out."""
        share = max(SMALLEST_SHARE, -(-num_prefill_tokens // self._num_stages))
        limit = self._chooser(num_decodes, min(num_prefill_tokens, share))
        self._limit = max(self._buckets[0], min(limit, self._buckets[-1]))
        if self._num_stages > 1:
            self._limit = max(self._limit, num_decodes)  # the bucket of all must hold them
        self._num_following = self._num_stages

    def _live(self) -> list[Sequence]:
        """The running sequences that go on, in arrival order, after freeing all blocks that nobody will read."""
        live = []
        for seq in self._running:
            if not seq.is_runnable:
                self._tables[seq.seq_id].release()  # its last token is drawn and only waits for its commit
                continue
            if self._window is not None:
                self._tables[seq.seq_id].release_before(seq.num_computed - self._window + 1)
            live.append(seq)
        return live

    def _plan_decodes(
        self, live: list[Sequence], most: int, preempted: list[int]
    ) -> tuple[list[Chunk], list[Sequence]]:
        """Plans the decodes of `live`, up to so many, and preempts from its end where blocks lack.

        Victims come from the end and decodes are planned from the front, so nothing planned is ever preempted. A victim
        leaves at least a block, so a step with a preemption is never empty.

        Returns:
          The chunks and the unfinished prefills that are left.
        """
        chunks, prefills = [], []
        away = frozenset().union(*self._away)
        index = 0
        while index < len(live):
            seq = live[index]
            index += 1
            if not seq.is_decode:
                prefills.append(seq)
                continue
            if seq.seq_id in away or len(chunks) == most:
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
        return chunks, prefills

    def _admissible(self, prefills: list[Sequence], num_decodes: int) -> list[Sequence]:
        """The waiting sequences that could start now, first come first served, as far as pp steps can use them.

        A sequence starts only if all its known tokens fit beside what the prefills that run still need. So once no
        decode is left, every prefill finds its blocks: prefills never wait for each other, and need not preempt.
        """
        num_spare = self._pool.num_free - sum(self._blocks_missing(seq) for seq in prefills)
        num_rows = self._max_running - len(self._running)
        num_tokens = self._num_stages * self._buckets[-1] - num_decodes - sum(seq.num_uncomputed for seq in prefills)
        newcomers: list[Sequence] = []
        for seq in self._waiting:
            # A preempted sequence's token in flight lives in a row that it lost: wait until the host knows it.
            if num_tokens <= 0 or len(newcomers) == num_rows or seq.num_in_flight:
                break
            num_blocks = self.max_blocks(seq.num_tokens)
            is_alone = not self._running and not newcomers
            if num_spare < num_blocks + (0 if is_alone else self._watermark):
                break
            num_spare -= num_blocks
            num_tokens -= seq.num_uncomputed
            newcomers.append(seq)
        return newcomers

    def _plan_prefill(self, seq: Sequence, budget: TokenBudget, chunks: list[Chunk]) -> None:
        """Plans the next chunk of a prefill, as long as budget and blocks allow; none if they allow nothing."""
        length = budget.take(self._room(seq))
        if not length:
            return
        start, end = seq.num_computed, seq.num_computed + length
        self._tables[seq.seq_id].ensure(end)
        samples = end == seq.num_tokens
        chunks.append(Chunk(seq.seq_id, start, length, samples))
        seq.advance(length, samples)

    def _room(self, seq: Sequence) -> int:
        """Tokens of a running prefill that the blocks free now can take."""
        return min(seq.num_uncomputed, self._tables[seq.seq_id].max_tokens - seq.num_computed)

    def _blocks_missing(self, seq: Sequence) -> int:
        """Blocks that a running prefill still takes from the pool before its known tokens are computed."""
        table = self._tables[seq.seq_id]
        missing = table.blocks_needed(seq.num_tokens)
        return missing if self._window is None else min(missing, self.max_blocks(seq.num_tokens) - table.num_owned)

    def _admit(self, seq: Sequence) -> None:
        _discard(self._waiting, seq)
        bisect.insort(self._running, seq, key=ARRIVAL)
        self._tables[seq.seq_id] = BlockTable(self._pool, self._block_size)
        seq.row = heapq.heappop(self._free_rows)
        seq.status = Status.RUNNING

    def _preempt(self, seq: Sequence) -> None:
        """Takes a sequence's blocks and row; it is computed again later, from its first token."""
        _discard(self._running, seq)
        self._give_back(seq)
        seq.preempt()
        bisect.insort(self._waiting, seq, key=ARRIVAL)

    def _give_back(self, seq: Sequence) -> None:
        self._tables.pop(seq.seq_id).release()
        assert seq.row is not None
        heapq.heappush(self._free_rows, seq.row)


def _discard(queue: list[Sequence], seq: Sequence) -> None:
    """Removes `seq` from a queue in arrival order, if it is there."""
    index = bisect.bisect_left(queue, seq.seq_id, key=ARRIVAL)
    if index < len(queue) and queue[index] is seq:
        del queue[index]
