import collections

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sarathi_jax.kv.blocks import HOLE, BlockError, BlockPool, BlockTable, Prefix, extend_keys


def test_pool_hands_out_every_block_once():
    pool = BlockPool(5)
    first, second = pool.allocate(2), pool.allocate(3)
    assert (first, second) == ([0, 1], [2, 3, 4])
    assert (pool.num_free, pool.num_total) == (0, 5)
    pool.free(first)
    assert pool.allocate(2) == [1, 0]
    pool.check()


def test_pool_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="num_blocks=0"):
        BlockPool(0)
    pool = BlockPool(3)
    pool.allocate(2)
    with pytest.raises(BlockError, match="2 blocks asked for, 1 of 3 are free"):
        pool.allocate(2)
    assert pool.num_free == 1
    for wrong in ([2], [3], [-1], [0, 0]):
        with pytest.raises(BlockError, match="nobody owns it"):
            pool.free(wrong)


def test_pool_check_finds_corruption():
    pool = BlockPool(3)
    pool._free.append(0)
    with pytest.raises(BlockError, match="4 free"):
        pool.check()
    pool = BlockPool(3)
    pool.allocate(1)
    pool._free[0] = 0
    with pytest.raises(BlockError, match="has an owner"):
        pool.check()


def test_table_grows_or_stays():
    pool = BlockPool(4)
    table, other = BlockTable(pool, 4), BlockTable(pool, 4)
    assert table.ensure(0)
    assert table.ids == []
    assert table.blocks_needed(9) == 3
    assert table.ensure(9)
    assert table.ensure(12)
    assert table.ids == [0, 1, 2]
    assert other.max_tokens == 4
    assert not other.ensure(5)
    assert (other.ids, other.num_owned, pool.num_free) == ([], 0, 1)
    table.release()
    assert (table.ids, pool.num_free, other.max_tokens) == ([], 4, 16)


def test_table_leaves_holes_below_the_window():
    pool = BlockPool(4)
    pool.allocate(1)
    table = BlockTable(pool, 4)
    assert table.ensure(10)
    table.release_before(-3)
    table.release_before(3)
    assert table.ids == [1, 2, 3]
    table.release_before(8)
    table.release_before(4)
    assert table.ids == [0, 0, 3]
    assert (table.num_owned, len(table), pool.num_free) == (1, 3, 2)
    assert table.ensure(13)
    assert len(table) == 4
    assert table.ids[:3] == [0, 0, 3]
    table.release_before(100)
    assert (table.num_owned, len(table), pool.num_free) == (0, 4, 3)
    table.release()
    assert len(table) == 0


def test_keys_stand_for_all_tokens_so_far():
    keys, others, tokens = [], [], list(range(12))
    extend_keys(keys, tokens, 4, 2)
    first = list(keys)
    extend_keys(keys, [9, 9, 9, 9, *tokens[4:]], 4, 3)
    assert keys[:2] == first, "what is known is not worked out again"
    extend_keys(others, [9, *tokens[1:]], 4, 3)
    assert len({*keys, *others}) == 6
    extend_keys(others, tokens, 4, 1)
    assert len(others) == 3


def test_a_table_shares_and_registers_whole_blocks():
    pool, keys = BlockPool(6), []
    table, other = BlockTable(pool, 2), BlockTable(pool, 2)
    extend_keys(keys, range(10), 2, 5)
    table.ensure(8)
    table.register(keys, 3)
    assert pool.find(keys).ids == (0, 1, 2)
    other.start_with(pool.find(keys[:2]))
    assert other.ensure(5)
    assert other.ids == [0, 1, 4]
    assert (other.owned_ids, pool.num_shared, pool.num_free) == ([0, 1, 4], 2, 1)
    table.release()
    assert (pool.num_free, pool.num_cached) == (3, 1)
    other.release_before(2)
    other.register(keys, 3)  # somebody else's third block goes before it
    assert pool.find(keys, reach=1) == Prefix(2, (2,))
    third = BlockTable(pool, 2)
    third.start_with(pool.find(keys, reach=1))
    assert third.ids == [HOLE, HOLE, 2]
    assert third.blocks_needed(8) == 1
    pool.check()


def test_the_end_is_evicted_before_the_beginning():
    pool, keys = BlockPool(4), []
    extend_keys(keys, range(4), 1, 4)
    table = BlockTable(pool, 1)
    table.ensure(4)
    table.register(keys, 4)
    table.release()
    for num_left in (3, 2, 1, 0):
        pool.allocate(1)
        assert pool.find(keys).num_blocks == num_left


def test_the_least_recently_used_is_evicted_first():
    pool, keys = BlockPool(3), [b"a", b"b", b"c"]
    ids = pool.allocate(3)
    for block_id, key in zip(ids, keys, strict=True):
        pool.register(block_id, key)
    pool.free(ids)
    assert pool.find(keys[:1]).ids == (0,)
    assert [pool.allocate(1) for _ in range(3)] == [[1], [2], [0]]


def test_pool_shares_only_what_holds_something():
    pool = BlockPool(2)
    with pytest.raises(BlockError, match="block 1 is shared but holds nothing"):
        pool.share([1])


class Tables(RuleBasedStateMachine):
    """Three tables grow and shrink on one pool; a dictionary of owners is the model."""

    @initialize(num_blocks=st.integers(1, 12), block_size=st.integers(1, 4))
    def start(self, num_blocks, block_size):
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.tables = [BlockTable(self.pool, block_size) for _ in range(3)]
        self.owned: list[dict[int, int]] = [{}, {}, {}]  # entry -> block id
        self.lengths = [0, 0, 0]

    @rule(which=st.integers(0, 2), num_tokens=st.integers(0, 40))
    def ensure(self, which, num_tokens):
        table, owned = self.tables[which], self.owned[which]
        wanted = -(-num_tokens // self.block_size)
        fits = wanted - self.lengths[which] <= self.pool.num_free
        before = list(table.ids)
        assert table.ensure(num_tokens) == (wanted <= self.lengths[which] or fits)
        assert table.ids[: len(before)] == before
        if wanted > self.lengths[which] and fits:
            owned.update({i: table.ids[i] for i in range(self.lengths[which], wanted)})
            self.lengths[which] = wanted
        assert len(table) == self.lengths[which]

    @rule(which=st.integers(0, 2), num_tokens=st.integers(-3, 40))
    def release_before(self, which, num_tokens):
        self.tables[which].release_before(num_tokens)
        for entry in [i for i in self.owned[which] if (i + 1) * self.block_size <= num_tokens]:
            del self.owned[which][entry]

    @precondition(lambda self: any(self.lengths))
    @rule(which=st.integers(0, 2))
    def release(self, which):
        self.tables[which].release()
        self.owned[which], self.lengths[which] = {}, 0

    @invariant()
    def every_block_has_one_owner(self):
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        ids = [block_id for owned in self.owned for block_id in owned.values()]
        assert len(set(ids)) == len(ids)
        assert len(ids) + self.pool.num_free == self.pool.num_total
        for table, owned, length in zip(self.tables, self.owned, self.lengths, strict=True):
            assert table.ids == [owned.get(i, 0) for i in range(length)]
            assert table.num_owned == len(owned)


QUICK = settings(
    max_examples=50, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
Tables.TestCase.settings = QUICK
test_tables = Tables.TestCase


KEYS = [bytes([i]) for i in range(8)]
"""Of the leading blocks of one endless text."""


class Cached(RuleBasedStateMachine):
    """Owners come and go; the model is a list of free blocks, one of cached ones by last use, and a count of owners."""

    @initialize(num_blocks=st.integers(1, 6))
    def start(self, num_blocks):
        self.pool = BlockPool(num_blocks)
        self.free = list(reversed(range(num_blocks)))
        self.cached: list[int] = []  # least recently used first
        self.held: list[list[int]] = []  # by owner
        self.keys: dict[int, bytes] = {}

    @rule(num_blocks=st.integers(0, 4))
    def allocate(self, num_blocks):
        if num_blocks > len(self.free) + len(self.cached):
            with pytest.raises(BlockError, match="are free"):
                self.pool.allocate(num_blocks)
            return
        expected = []
        for _ in range(num_blocks):
            if not self.free:
                self.keys.pop(self.cached[0])
            expected.append(self.free.pop() if self.free else self.cached.pop(0))
        assert self.pool.allocate(num_blocks) == expected
        self.held.append(expected)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), first=st.integers(0, 7))
    def register(self, data, first):
        """Blocks of one owner, as those of the text from anywhere on."""
        for block_id, key in zip(data.draw(st.sampled_from(self.held)), KEYS[first:], strict=False):
            if block_id not in self.keys:
                self.pool.register(block_id, key)
                if key not in self.keys.values():
                    self.keys[block_id] = key

    @rule(num_keys=st.integers(0, 8), reach=st.none() | st.integers(0, 3), shares=st.booleans())
    def find(self, num_keys, reach, shares):
        ids = {key: block_id for block_id, key in self.keys.items()}

        def is_enough(length):
            seen = KEYS[:length] if reach is None else KEYS[max(0, length - max(reach, 1)) : length]
            return all(key in ids for key in seen)

        num_blocks = max(length for length in range(num_keys + 1) if is_enough(length))
        num_holes = 0 if reach is None else max(0, num_blocks - reach)
        expected = [ids[key] for key in KEYS[num_holes:num_blocks]]
        prefix = self.pool.find(KEYS[:num_keys], reach)
        assert prefix == Prefix(num_holes, tuple(expected))
        used = [block_id for block_id in reversed(expected) if block_id in self.cached]
        self.cached = [block_id for block_id in self.cached if block_id not in used] + used
        if shares:
            self.pool.share(prefix.ids)
            self.cached = [block_id for block_id in self.cached if block_id not in used]
            self.held.append(expected)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def give_back(self, data):
        ids = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.pool.free(ids)
        for block_id in ids:
            if not any(block_id in others for others in self.held):
                (self.cached if block_id in self.keys else self.free).append(block_id)

    @invariant()
    def the_model_is_right(self):
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        owners = collections.Counter(block_id for ids in self.held for block_id in ids)
        assert [self.pool.num_owners(i) for i in range(self.pool.num_total)] == [
            owners[i] for i in range(self.pool.num_total)
        ]
        assert self.pool.num_free == len(self.free) + len(self.cached)
        assert self.pool.num_cached == len(self.cached)
        assert self.pool.num_shared == owners.total() - len(owners)


Cached.TestCase.settings = QUICK
test_cached = Cached.TestCase
