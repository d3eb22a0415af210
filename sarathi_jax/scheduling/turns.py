"""`Turns`: sequences dealt out to as many groups as the pipeline has stages, which enter by turns."""

from collections.abc import Collection, Iterable

from sarathi_jax.sequence import Sequence


class Turns:
    """Keeps what is in flight together apart: of pp micro-batches in a row each is another group's, so that a token is
    always back before its sequence enters again (vLLM keeps such a group a stage, its "virtual engines").

    Micro-batches of different groups have different buckets, so they keep the stages waiting for each other.

    Args:
      num_stages: pp, hence groups.
    """

    def __init__(self, num_stages: int):
        self._num_stages = num_stages
        self._turn = 0
        self._groups: dict[int, int] = {}  # of sequences, by id

    def begin(self, seqs: Iterable[Sequence]) -> None:
        """A step begins in which only these still belong to their groups."""
        self._groups = {seq.seq_id: self._groups[seq.seq_id] for seq in seqs}

    def end(self) -> None:
        """The next group's turn comes."""
        self._turn = (self._turn + 1) % self._num_stages

    @property
    def others(self) -> Collection[int]:
        """Ids of the sequences whose turn it is not."""
        return {seq_id for seq_id, group in self._groups.items() if group != self._turn}

    def num_places(self, num_sequences: int) -> int:
        """How many more sequences the group may take, if so many in all are dealt out evenly."""
        share = -(-num_sequences // self._num_stages)
        return max(0, share - sum(group == self._turn for group in self._groups.values()))

    def join(self, seqs: Iterable[Sequence]) -> None:
        """Sequences come into the group whose turn it is."""
        self._groups |= {seq.seq_id: self._turn for seq in seqs}
