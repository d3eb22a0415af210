"""`BlockPool` owns every block id of the KV cache; `BlockTable` holds those of one sequence. Integers only, no device.

Blocks may be freed and handed out again while a launched step still uses them: the device runs steps in order, so
whatever a later step writes there comes after the earlier step's last read.
"""

from collections.abc import Iterable

HOLE = 0  # what a released entry of a table reads as; attention never looks below the window


class BlockError(RuntimeError):
    """The pool was asked for blocks it does not have, or given blocks that are not out: a bug of the caller."""


class BlockPool:
    """The ids ``range(num_blocks)``, each either free or owned by exactly one table.

    Ids are handed out in a deterministic order: the block freed last goes first, a fresh pool counts up from 0.

    Args:
      num_blocks: blocks of the cache.
    """

    def __init__(self, num_blocks: int):
        if num_blocks < 1:
            raise ValueError(f"num_blocks={num_blocks} must be positive")
        self._free = list(range(num_blocks - 1, -1, -1))
        self._is_owned = bytearray(num_blocks)

    def __repr__(self) -> str:
        return f"BlockPool({self.num_free} of {self.num_total} free)"

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_total(self) -> int:
        return len(self._is_owned)

    def allocate(self, num_blocks: int) -> list[int]:
        """Hands out `num_blocks` blocks.

        Raises:
          BlockError: fewer are free; callers compare with `num_free` first. Nothing is handed out then.
        """
        if not 0 <= num_blocks <= len(self._free):
            raise BlockError(f"{num_blocks} blocks asked for, {len(self._free)} of {self.num_total} are free")
        ids = [self._free.pop() for _ in range(num_blocks)]
        for block_id in ids:
            self._is_owned[block_id] = 1
        return ids

    def free(self, ids: Iterable[int]) -> None:
        """Takes blocks back.

        Raises:
          BlockError: a block is not out (freed twice, or never handed out).
        """
        for block_id in ids:
            if not (0 <= block_id < len(self._is_owned) and self._is_owned[block_id]):
                raise BlockError(f"block {block_id} is freed but nobody owns it")
            self._is_owned[block_id] = 0
            self._free.append(block_id)

    def check(self) -> None:
        """Checks that every block is in exactly one place. O(blocks): for tests and debugging.

        Raises:
          BlockError: free and owned blocks do not add up, or a block is both.
        """
        num_owned = sum(self._is_owned)
        if self.num_free + num_owned != self.num_total:
            raise BlockError(f"{self.num_free} free + {num_owned} owned blocks are not {self.num_total}")
        if len(set(self._free)) != self.num_free or any(self._is_owned[block_id] for block_id in self._free):
            raise BlockError("a free block is listed twice or has an owner")


class BlockTable:
    """The blocks of one sequence: entry ``i`` holds its tokens ``[i * block_size, (i + 1) * block_size)``.

    Args:
      pool: where blocks come from and return to.
      block_size: tokens of a block.
    """

    def __init__(self, pool: BlockPool, block_size: int):
        self._pool = pool
        self._block_size = block_size
        self._ids: list[int] = []
        self._num_released = 0  # leading entries that are holes
        self._capacity = 0  # tokens that the entries cover, holes included

    def __repr__(self) -> str:
        return f"BlockTable({self._num_released} holes, {self._ids[self._num_released :]})"

    def __len__(self) -> int:
        """Entries, holes included."""
        return len(self._ids)

    @property
    def ids(self) -> list[int]:
        """The table's entries, holes as 0. Not a copy: read it, do not keep or change it."""
        return self._ids

    @property
    def num_owned(self) -> int:
        """Blocks held now."""
        return len(self._ids) - self._num_released

    @property
    def max_tokens(self) -> int:
        """Length that the table could grow to with all blocks that are free now."""
        return self._capacity + self._pool.num_free * self._block_size

    def blocks_needed(self, num_tokens: int) -> int:
        """Blocks still missing for a length of `num_tokens` tokens."""
        if num_tokens <= self._capacity:
            return 0
        return -(-num_tokens // self._block_size) - len(self._ids)

    def ensure(self, num_tokens: int) -> bool:
        """Grows the table to a length of `num_tokens` tokens; False, and nothing changed, if blocks are lacking."""
        if num_tokens <= self._capacity:
            return True
        num_blocks = self.blocks_needed(num_tokens)
        if num_blocks > self._pool.num_free:
            return False
        self._ids += self._pool.allocate(num_blocks)
        self._capacity += num_blocks * self._block_size
        return True

    def release_before(self, num_tokens: int) -> None:
        """Frees the blocks whose tokens all lie below index `num_tokens` (may be negative); their entries stay."""
        end = num_tokens // self._block_size
        if end <= self._num_released:
            return
        end = min(end, len(self._ids))
        self._pool.free(self._ids[self._num_released : end])
        self._ids[self._num_released : end] = [HOLE] * (end - self._num_released)
        self._num_released = end

    def release(self) -> None:
        """Frees every block and forgets the entries; the table can grow again from nothing."""
        self._pool.free(self._ids[self._num_released :])
        self._ids = []
        self._num_released = 0
        self._capacity = 0
