"""Whatever the OpenAPI description allows, and much that it does not, is never an error of the server."""

from typing import Any

import hypothesis
import pytest
import schemathesis

from tests.server.processes import Process

pytestmark = pytest.mark.slow

MODES = {"allowed": schemathesis.GenerationMode.POSITIVE, "not allowed": schemathesis.GenerationMode.NEGATIVE}
NUM_EXAMPLES = 15
KEPT = ("model", "prompt", "messages", "n", "stream", "temperature", "top_p", "seed", "echo", "logprobs", "user")


def tamed(body: Any) -> Any:
    """The right model, and little to do, or nothing would get past the first checks in the time of a test."""
    if not isinstance(body, dict):
        return body
    if "model" in body:
        body["model"] = "tiny"
    if len(repr(body)) % 2:  # half of them without what seldom goes together
        body = {name: value for name, value in body.items() if name in KEPT}
        body |= {"prompt": "the cat"} if "prompt" in body else {}
    for name, most in (("max_tokens", 4), ("max_completion_tokens", 4), ("n", 3)):
        if isinstance(body.get(name), int):
            body[name] = min(body[name], most)
    if "messages" in body and not (body.get("max_tokens") or body.get("max_completion_tokens")):
        body["max_tokens"] = 4
    return body


def test_no_answer_is_an_error_of_the_server(server: Process):
    statuses: dict[tuple[str, int], int] = {}
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    for operation in [result.ok() for result in schema.get_all_operations()]:
        for mode in MODES.values():

            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            @hypothesis.settings(
                max_examples=NUM_EXAMPLES,
                deadline=None,
                database=None,
                derandomize=True,
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            def check(case: schemathesis.Case) -> None:
                case.body = tamed(case.body)
                answer = case.call(headers={"authorization": "Bearer key"})
                assert answer.status_code < 500, (answer.status_code, answer.text, case.body)
                if answer.status_code >= 400:
                    assert answer.json()["error"]["message"]
                key = case.path, answer.status_code
                statuses[key] = statuses.get(key, 0) + 1

            try:
                check()
            except hypothesis.errors.Unsatisfiable:  # nothing can be wrong in a request without any field
                continue
    assert statuses["/v1/completions", 200]
    assert statuses["/v1/chat/completions", 200]
