"""What `bench` and `profile` say of a command line that makes no sense, before any model is loaded."""

import socket

import pytest

from sarathi_jax.cli import main

RATED = ("--rate=1", "--num_requests=2")


@pytest.mark.parametrize(
    ("arguments", "number", "words"),
    [
        ((), 2, "--rate is missing"),
        (("--rate=0",), 2, "rate must be a number above 0"),
        (("--trace=chat", "--lengths=fixed:1:1", "--rate=1"), 2, "leave one out"),
        (("--lengths=fixed:1", "--rate=1"), 2, "fixed:512:64"),
        (("--arrivals=often", "--rate=1"), 2, "poisson"),
        (("--trace=nowhere", "--rate=1"), 1, "chat"),
        (("--trace=BAD", "--rate=1"), 1, "not a number of tokens"),
        (("--trace=BINARY", "--rate=1"), 1, "cannot read"),
        (("--trace=NONE", "--rate=1"), 1, "no request"),
        (("--trace=FOLDER", "--rate=1"), 1, "no file"),
        (("--trace_folder=/nowhere/at/all", "--rate=1"), 1, "no folder of traces"),
        (("--lengths=fixed:5:5", "--arrivals=recorded"), 1, "no arrivals to replay"),
        ((*RATED, "--texts=/nowhere/at/all"), 1, "no folder of documents"),
        ((*RATED, "--time_limit_s=0"), 2, "--time_limit_s"),
        ((*RATED, "--slo_ms=-5"), 2, "--slo_ms"),
        ((*RATED, "--policy=fifo"), 2, "policy"),
        ((*RATED, "--token_budget=0"), 2, "token_budget"),
        ((*RATED, "--api_key=x"), 2, "goes with --url"),
        ((*RATED, "--url=http://127.0.0.1:1", "--policy=vllm"), 2, "give it there"),
        ((*RATED, "--rat=1"), 2, "Did you mean: rate"),
        (("more",), 2, "unexpected"),
    ],
)
def test_a_command_that_makes_no_sense_is_told_in_a_line(arguments, number, words, tmp_path, capsys):
    (tmp_path / "bad.csv").write_text("num_prefill_tokens,num_decode_tokens\n5,many\n")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00num")
    (tmp_path / "none.csv").write_text("num_prefill_tokens,num_decode_tokens\n")
    for name in ("bad", "binary", "none"):
        arguments = [argument.replace(name.upper(), str(tmp_path / f"{name}.csv")) for argument in arguments]
    arguments = [argument.replace("FOLDER", str(tmp_path)) for argument in arguments]
    check(["bench", *arguments], number, words, capsys)


def test_a_url_that_nobody_answers_is_told(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, but it does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        check(["bench", *RATED, f"--url={url}"], 1, "nobody answers", capsys)
    check(["bench", *RATED, "--url=http://"], 1, "nobody answers", capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--out is missing"),
        (("--out=t.json", "--picture=t.gif"), ".svg"),
        (("--out=t.json", "--policy=fifo"), "policy"),
        (("--out=t.json", "--serve_s=5", "--hosts=2", "--coordinator=127.0.0.1:9"), "--serve_s is of one process"),
        (("more",), "unexpected"),
    ],
)
def test_profile_likewise(arguments, words, capsys):
    check(["profile", *arguments], 2, words, capsys)


def check(arguments, number, words, capsys):
    assert main(["main.py", *arguments]) == number
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1
