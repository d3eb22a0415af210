"""Attention batches that are timed: their sizes, the work in them, and their arrays on the device. No JAX at import."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a compiled program fixes.

    Attributes:
      num_tokens, num_sequences: T and S.
      max_kv: longest sequence; the cache holds S of them.
    """

    num_tokens: int
    num_sequences: int
    max_kv: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 64

    @property
    def name(self) -> str:
        heads = f"H{self.heads} G{self.kv_heads} D{self.head_dim} K{self.block_size}"
        return f"T{self.num_tokens} S{self.num_sequences} {heads}"


@dataclasses.dataclass(frozen=True)
class Workload:
    """A batch: ``(chunk length, KV length)`` of each sequence, decodes first."""

    kind: str
    shape: Shape
    chunks: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        longest = max(kv for _, kv in self.chunks)
        return f"{self.kind} {self.shape.name} KV{longest}"

    @property
    def num_bytes(self) -> int:
        """Fewest bytes: K and V of every sequence once in bfloat16, queries, results and new rows once in float32."""
        shape = self.shape
        tokens = sum(length for length, _ in self.chunks)
        cache = 2 * 2 * shape.kv_heads * shape.head_dim * (sum(kv for _, kv in self.chunks) + tokens)
        return cache + 4 * shape.head_dim * tokens * (2 * shape.heads + 2 * shape.kv_heads)

    @property
    def flops(self) -> int:
        """Products of scores and values over visible keys alone: a causal mask halves a prompt's."""
        return 4 * self.shape.heads * self.shape.head_dim * sum(visible_pairs(*chunk) for chunk in self.chunks)

    def fields(self) -> dict[str, Any]:
        """What a result row says of it."""
        return {
            "kind": self.kind,
            "workload": self.name,
            **dataclasses.asdict(self.shape),
            "chunks": len(self.chunks),
            "kv_len": max(kv for _, kv in self.chunks),
            "bytes": self.num_bytes,
            "flops": self.flops,
        }


def visible_pairs(length: int, kv_len: int) -> int:
    """Pairs of a row of the chunk and a key that it sees."""
    return length * kv_len - length * (length - 1) // 2


def decodes(shape: Shape, kv_len: int) -> Workload:
    """Every sequence decodes."""
    return Workload("decode", shape, ((1, kv_len),) * shape.num_sequences)


def workloads(dry_run: bool) -> list[Workload]:
    """Most telling first: the shapes of Mistral-7B (four query heads to a KV head), then others."""
    if dry_run:
        # One shape, hence one program a backend: interpreted kernels spend their time in the compiler.
        chunk = Shape(24, 4, 64, heads=4, kv_heads=2, head_dim=64, block_size=16)
        return [
            decodes(chunk, 40),
            Workload("prefill", chunk, ((24, 64),)),
            Workload("mixed", chunk, ((1, 30), (1, 50), (22, 40))),
        ]
    found = []
    base, long = Shape(32, 32, 8192), 8192
    many = dataclasses.replace(base, num_tokens=128, num_sequences=128)
    chunk, chunks = (Shape(tokens, 8, 16384) for tokens in (512, 2048))
    found += [decodes(base, kv_len) for kv_len in (2048, long, 512)]
    for shape, kv_lens in ((chunk, (512, 4096, 16384)), (chunks, (2048, 8192, 16384))):
        found += [Workload("prefill", shape, ((shape.num_tokens, kv_len),)) for kv_len in kv_lens]
    found += [decodes(many, kv_len) for kv_len in (512, 2048, long)]
    for tokens, num_decodes, kv_len in ((512, 32, 2048), (2048, 128, 2048), (512, 128, 4096)):
        shape = Shape(tokens, num_decodes + 1, 8192)
        found.append(Workload("mixed", shape, (*((1, kv_len),) * num_decodes, (tokens - num_decodes, kv_len))))
    for changes in ({"block_size": 32}, {"block_size": 128}, {"kv_heads": 4}, {"head_dim": 64}, {"heads": 64}):
        found += [decodes(dataclasses.replace(base, **changes), kv_len) for kv_len in (2048, long)]
        for shape, kv_len in ((chunk, 512), (chunks, 8192)):
            found.append(Workload("prefill", dataclasses.replace(shape, **changes), ((shape.num_tokens, kv_len),)))
    return found
