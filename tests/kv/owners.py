"""Who owns which block, counted from the tables."""

import collections
from collections.abc import Iterable

from sarathi_jax.kv.blocks import BlockPool, BlockTable


def check_owners(pool: BlockPool, tables: Iterable[BlockTable]) -> None:
    """Asserts that a block has as many owners as there are tables that hold it, and that no other block is missing."""
    pool.check()
    held = collections.Counter(block_id for table in tables for block_id in table.owned_ids)
    assert all(pool.num_owners(block_id) == num_tables for block_id, num_tables in held.items())
    assert pool.num_free + len(held) == pool.num_total
