"""A request may be aborted at any moment: its blocks come back at once and nobody else notices."""

import pytest

from tests.engine.serving import Ask, Parity, Served, at_most, drawn, greedy, prompt_of

VICTIM: Ask = (prompt_of(50), drawn(max_tokens=10, n=2, prompt_logprobs=2, seed=4))
OTHERS: list[Ask] = [
    (prompt_of(12), greedy(max_tokens=22, prompt_logprobs=2)),
    (prompt_of(30), drawn(max_tokens=18, seed=5, repetition_penalty=1.2)),
]


PRESSED: list[Ask] = [(prompt_of(length), greedy(max_tokens=40)) for length in (6, 20, 14)]
"""In a small pool the last one, the victim, loses its blocks."""


def run(
    served: Served, others: list[Ask], victim: Ask, moment: int, overlap: bool, num_blocks: int, parity: Parity
) -> str:
    """Aborts the victim after `moment` steps; returns what it was doing."""
    bench = served.bench(overlap=overlap, num_blocks=num_blocks, chooser=at_most(18))
    asks = [others[0], others[1], victim]
    for i, (prompt, params) in enumerate(asks):
        bench.engine.add_request(str(i), prompt, params)
    finished = {}
    for _ in range(moment):
        finished |= {output.request_id: output for output in bench.step() if output.finished}
    victims = [seq for seq in (*bench.scheduler.running, *bench.scheduler.waiting) if seq.request.request_id == "2"]
    doing = "finished" if not victims else "waiting" if victims[0].row is None else "running"
    if doing == "running":
        doing = "prefill" if not victims[0].num_output else "in flight" if victims[0].num_in_flight else "decode"
    free_before = bench.pool.num_free
    held = sum(bench.scheduler.table(seq.seq_id).num_owned for seq in victims if seq.row is not None)

    output = bench.engine.abort("2")
    assert bench.pool.num_free == free_before + held
    bench.check_blocks()
    assert (output is None) == (doing == "finished")
    if output is not None:
        assert output.finished
        assert all(sample.finish_reason in ("abort", "length") for sample in output.outputs)
        assert any(sample.finish_reason == "abort" for sample in output.outputs)
        for ours, whole in zip(output.outputs, served.alone([victim])[0].outputs, strict=True):
            assert ours.token_ids == whole.token_ids[: len(ours.token_ids)]
            assert whole.text.startswith(ours.text.rstrip("\ufffd"))
    assert bench.engine.abort("2") is None

    rest = bench.drain()
    assert "2" not in rest
    finished |= rest
    parity.check([finished["0"], finished["1"]], served.alone(others))
    return doing


@pytest.mark.parametrize("overlap", [True, False])
def test_abort_at_every_moment(decoder: Served, parity: Parity, overlap: bool):
    doing = {run(decoder, OTHERS, VICTIM, moment, overlap, 4096, parity) for moment in range(22)}
    assert doing == {"waiting", "prefill", "in flight" if overlap else "decode", "finished"}


@pytest.mark.slow
def test_abort_while_preempted(decoder: Served, parity: Parity):
    doing = [run(decoder, PRESSED[:2], PRESSED[2], moment, True, 13, parity) for moment in range(0, 50, 3)]
    assert "waiting" in doing[doing.index("in flight") :], "the victim was never preempted"


def test_abort_everything(decoder: Served):
    bench = decoder.bench(num_blocks=20)
    for i in range(12):
        bench.engine.add_request(str(i), prompt_of(30, i), greedy())
    for _ in range(5):
        bench.step()
    for i in range(12):
        bench.engine.abort(str(i))
        bench.check_blocks()
    bench.drain()
    assert bench.pool.num_free == 20


def test_abort_of_nobody(decoder: Served):
    assert decoder.bench().engine.abort("nobody") is None
