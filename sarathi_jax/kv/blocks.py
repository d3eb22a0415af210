"""`BlockPool` owns every block id of the KV cache; `BlockTable` holds those of one sequence. Integers only, no device.

Blocks may be freed and handed out again while a launched step still uses them: the device runs steps in order, so
whatever a later step writes there comes after the earlier step's last read.

A full block can be found again by its key, which stands for its tokens and all tokens before them. See
docs/decisions/prefix-caching.md.
"""

import array
import collections
import dataclasses
import hashlib
from collections.abc import Iterable, Sequence

HOLE = 0  # what a released entry of a table reads as; attention never looks below the window
KEY_BYTES = 16


class BlockError(RuntimeError):
    """The pool was asked for blocks it does not have, or given blocks that are not out: a bug of the caller."""


def extend_keys(keys: list[bytes], tokens: Sequence[int], block_size: int, num_blocks: int) -> None:
    """Appends to the keys of a sequence's leading blocks until there are `num_blocks`.

    Args:
      keys: of the first blocks; each is made of the key before it and the block's tokens.
      tokens: of the sequence; the blocks asked for are full.
      block_size: tokens of a block.
      num_blocks: how many keys there shall be; fewer than there are: nothing to do.
    """
    for start in range(len(keys) * block_size, num_blocks * block_size, block_size):
        parent = keys[-1] if keys else b""
        content = array.array("i", tokens[start : start + block_size]).tobytes()
        keys.append(hashlib.blake2b(parent + content, digest_size=KEY_BYTES).digest())


@dataclasses.dataclass(frozen=True)
class Prefix:
    """Blocks that hold the beginning of a sequence.

    Attributes:
      num_holes: leading blocks that nobody will read, because they lie below the window.
      ids: the blocks after them.
    """

    num_holes: int = 0
    ids: tuple[int, ...] = ()

    @property
    def num_blocks(self) -> int:
        return self.num_holes + len(self.ids)


class BlockPool:
    """The ids ``range(num_blocks)``, each in one of three states.

    Owned: in one table or in several. Cached: in no table, but it has a key and can be found by it. Free: neither.
    Cached blocks can be handed out as free ones can, so they count as such; the least recently used goes first, once
    no other is left. Until somebody registers a block, nothing is ever cached.

    Ids are handed out in a deterministic order: the block freed last goes first, a fresh pool counts up from 0.

    Args:
      num_blocks: blocks of the cache.
    """

    def __init__(self, num_blocks: int):
        if num_blocks < 1:
            raise ValueError(f"num_blocks={num_blocks} must be positive")
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: collections.OrderedDict[int, None] = collections.OrderedDict()  # least recently used first
        self._num_owners = [0] * num_blocks
        self._keys: dict[int, bytes] = {}
        self._ids: dict[bytes, int] = {}
        self._num_shared = 0

    def __repr__(self) -> str:
        return f"BlockPool({self.num_free} of {self.num_total} free)"

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out, the cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_total(self) -> int:
        return len(self._num_owners)

    @property
    def num_shared(self) -> int:
        """Owners beyond the first, summed over all blocks: how many more blocks there would be if nobody shared."""
        return self._num_shared

    def num_owners(self, block_id: int) -> int:
        return self._num_owners[block_id]

    def allocate(self, num_blocks: int) -> list[int]:
        """Hands out `num_blocks` blocks.

        Raises:
          BlockError: fewer are free; callers compare with `num_free` first. Nothing is handed out then.
        """
        if not 0 <= num_blocks <= self.num_free:
            raise BlockError(f"{num_blocks} blocks asked for, {self.num_free} of {self.num_total} are free")
        ids = [self._free.pop() if self._free else self._evict() for _ in range(num_blocks)]
        for block_id in ids:
            self._num_owners[block_id] = 1
        return ids

    def share(self, ids: Iterable[int]) -> None:
        """Gives blocks that `find` returned one owner more.

        Raises:
          BlockError: a block is neither owned nor cached.
        """
        for block_id in ids:
            if self._num_owners[block_id]:
                self._num_shared += 1
            elif block_id in self._cached:
                del self._cached[block_id]
            else:
                raise BlockError(f"block {block_id} is shared but holds nothing")
            self._num_owners[block_id] += 1

    def free(self, ids: Iterable[int]) -> None:
        """Takes blocks back from one owner; among those that are then cached, the first is evicted first.

        Raises:
          BlockError: a block is not out (freed twice, or never handed out).
        """
        for block_id in ids:
            num_owners = self._num_owners[block_id] if 0 <= block_id < self.num_total else 0
            if not num_owners:
                raise BlockError(f"block {block_id} is freed but nobody owns it")
            self._num_owners[block_id] = num_owners - 1
            if num_owners > 1:
                self._num_shared -= 1
            elif block_id in self._keys:
                self._cached[block_id] = None
            else:
                self._free.append(block_id)

    def register(self, block_id: int, key: bytes) -> None:
        """Lets others find an owned block, which is not written any more; another block of that key goes before it."""
        if key not in self._ids:
            self._ids[key] = block_id
            self._keys[block_id] = key

    def find(self, keys: Iterable[bytes], reach: int | None = None) -> Prefix:
        """The longest beginning of a sequence that can be read from the cache; it counts as used now.

        Args:
          keys: of the sequence's leading blocks.
          reach: so many blocks before the token that comes next are enough, because of a window; None: all are needed.
        """
        found: list[int | None] = []
        num_in_row, num_blocks = 0, 0
        for key in keys:
            block_id = self._ids.get(key)
            if block_id is None and reach is None:
                break
            found.append(block_id)
            num_in_row = 0 if block_id is None else num_in_row + 1
            if num_in_row and num_in_row >= (len(found) if reach is None else min(reach, len(found))):
                num_blocks = len(found)
        num_holes = 0 if reach is None else max(0, num_blocks - reach)
        ids = tuple(block_id for block_id in found[num_holes:num_blocks] if block_id is not None)
        for block_id in reversed(ids):
            if block_id in self._cached:
                self._cached.move_to_end(block_id)
        return Prefix(num_holes, ids)

    def check(self) -> None:
        """Checks that every block is in exactly one place. O(blocks): for tests and debugging.

        Raises:
          BlockError: free and owned blocks do not add up, a block is both, or a key leads elsewhere.
        """
        num_owned = self.num_total - self._num_owners.count(0)
        if self.num_free + num_owned != self.num_total:
            raise BlockError(f"{self.num_free} free + {num_owned} owned blocks are not {self.num_total}")
        free = [*self._free, *self._cached]
        if len(set(free)) != self.num_free or any(map(self._num_owners.__getitem__, free)):
            raise BlockError("a free block is listed twice or has an owner")
        if self._num_shared != sum(self._num_owners) - num_owned:
            raise BlockError(f"{self._num_shared} shared blocks are counted, {sum(self._num_owners) - num_owned} exist")
        if self._ids != {key: block_id for block_id, key in self._keys.items()}:
            raise BlockError("keys and blocks do not belong to each other")
        if not (self._keys.keys().isdisjoint(self._free) and self._cached.keys() <= self._keys.keys()):
            raise BlockError("a free block has a key, or a cached one has none")

    def _evict(self) -> int:
        block_id, _ = self._cached.popitem(last=False)
        del self._ids[self._keys.pop(block_id)]
        return block_id


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
        self._num_registered = 0  # leading entries that others can find, as far as they are no holes
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
    def owned_ids(self) -> list[int]:
        """Blocks held now, alone or with others."""
        return self._ids[self._num_released :]

    @property
    def num_owned(self) -> int:
        """Blocks held now, alone or with others."""
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

    def start_with(self, prefix: Prefix) -> None:
        """Shares the blocks that hold the sequence's beginning; for an empty table."""
        assert not self._ids
        self._pool.share(prefix.ids)
        self._ids = [HOLE] * prefix.num_holes + list(prefix.ids)
        self._num_released = prefix.num_holes
        self._num_registered = prefix.num_blocks
        self._capacity = prefix.num_blocks * self._block_size

    def register(self, keys: Sequence[bytes], num_blocks: int) -> None:
        """Lets others find the first `num_blocks` blocks, which are full and not written any more."""
        end = min(num_blocks, len(self._ids))
        for i in range(max(self._num_registered, self._num_released), end):
            self._pool.register(self._ids[i], keys[i])
        self._num_registered = max(self._num_registered, end)

    def release_before(self, num_tokens: int) -> None:
        """Frees the blocks whose tokens all lie below index `num_tokens` (may be negative); their entries stay."""
        end = num_tokens // self._block_size
        if end <= self._num_released:
            return
        end = min(end, len(self._ids))
        self._pool.free(reversed(self._ids[self._num_released : end]))
        self._ids[self._num_released : end] = [HOLE] * (end - self._num_released)
        self._num_released = end

    def release(self) -> None:
        """Frees every block and forgets the entries; the table can grow again from nothing.

        The last goes first, so that of what is cached the end is evicted before the beginning, without which it could
        not be found.
        """
        self._pool.free(reversed(self._ids[self._num_released :]))
        self._ids = []
        self._num_released = 0
        self._num_registered = 0
        self._capacity = 0
