import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sarathi_jax.kv.blocks import BlockError, BlockPool, BlockTable


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


Tables.TestCase.settings = settings(
    max_examples=50, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
test_tables = Tables.TestCase
