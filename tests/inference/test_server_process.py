"""`cab-attention serve` as a process; many requests at once; requests generated from the server's own OpenAPI."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cab_attention import load_text_generator
from cab_attention.method_options import make_method
from cab_attention.server.run import take_address
from cab_attention_cli import app
from tests.inference.serving import JSON, serving

ROOT = Path(__file__).parents[2]
PROMPTS = [f"Ada Kern's badge is silver fox. Hugo Berg's {thing} is" for thing in ("hat", "ring", "badge", "drum")]


def run(*arguments: str, **environment: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["serve", *arguments], env=environment)
    return result.exit_code, result.output


def test_mistakes_are_told_before_a_model_is_loaded():
    missing = ("--model", "no-such-model")
    assert run(*missing, "--max-queue", "-1") == (2, "Error: max_queue=-1, allowed is an integer >= 0\n")
    assert run(*missing, "--port", "70000") == (2, "Error: port=70000, allowed is 0 to 65535 (0: a free one)\n")
    assert run(*missing, "--api-key", "a", "--api-key-env", "B")[0] == 2
    unset = "Error: the environment variable UNSET_KEY is not set: it should hold the API key\n"
    assert run(*missing, "--api-key-env", "UNSET_KEY") == (2, unset)
    assert run(*missing, "--host", "203.0.113.1")[1].startswith("Error: cannot listen on 203.0.113.1, port 8000: ")


def test_an_address_is_taken_once():
    with take_address("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        code, printed = run("--model", "no-such-model", "--port", str(port))
        assert code == 2 and printed.startswith(f"Error: cannot listen on 127.0.0.1, port {port}: ")
        assert len(printed.splitlines()) == 1
    take_address("127.0.0.1", port).close()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in sys.modules if name.startswith("cab_attention.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, printed = run()
    assert (code, printed) == (2, "Error: serve needs the package uvicorn: pip install 'cab-attention[serve]'\n")


@contextmanager
def process(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen, int]]:
    command = [sys.executable, "-c", "from cab_attention_cli import app; app()", "serve", "--port", "0", *arguments]
    started = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert started.stdout is not None
        line = started.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/,", line)
        assert found, line
        yield started, int(found[1])
    finally:
        started.kill()
        started.wait(60)


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_signal_ends_it_in_the_middle_of_an_answer(sent: signal.Signals, code: int):
    with process("--api-key-env", "SOME_KEY", SOME_KEY="k") as (served, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/v1/models")
        answer = connection.getresponse()
        assert (answer.status, bool(answer.read())) == (401, True)
        body = dict(prompt="Ada Kern's badge is", temperature=2, seed=17, max_tokens=4000, stream=True)  # no early end
        connection.request("POST", "/v1/completions", json.dumps(body), {**JSON, "Authorization": "Bearer k"})
        answer = connection.getresponse()
        assert answer.read(20).startswith(b"data: ")
        served.send_signal(sent)
        assert b'"code":"shutting_down"' in answer.read()
        printed, problems = served.communicate(timeout=30)
        assert served.returncode == code and "Traceback" not in problems + printed


@pytest.mark.slow
def test_two_hundred_requests_at_once():
    methods = [("full", "full"), ("h2o", 8), ("cab", 0.5), ("tova", 6), ("random", 7)]
    engine = load_text_generator("demo", device="cpu")
    cases = [(prompt, method, budget) for prompt in PROMPTS for method, budget in methods]
    expected = {case: engine.generate(case[0], method=make_method(*case[1:]), max_tokens=6).text for case in cases}
    assert len(set(expected.values())) > 5
    with serving(engine, max_queue=150) as served:

        def ask(number: int) -> int:
            prompt, method, budget = case = cases[number % len(cases)]
            asked = dict(prompt=prompt, method=method, budget=budget, max_tokens=6, temperature=0)
            if number % 3:
                reply = served.complete(**asked)
                text = reply.json["choices"][0]["text"] if reply.status == 200 else None
            else:
                reply = served.complete(**asked, stream=True)
                chunks = [json.loads(event) for event in reply.events[:-1]] if reply.status == 200 else []
                text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
            assert reply.status == 429 or text == expected[case], (case, reply)
            return reply.status

        with ThreadPoolExecutor(200) as pool:
            statuses = Counter(pool.map(ask, range(200)))
        assert set(statuses) <= {200, 429} and statuses[200] >= 100, statuses
        assert {ask(number) for number in range(20)} == {200}


@pytest.mark.slow
def test_requests_made_from_the_openapi_document():
    """No 5xx, every answer as documented, what does not fit the schema refused."""
    with process("--max-tokens-limit", "20") as (_, port):
        # Values that fit the schema may still not fit the model or each other.
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{port}/openapi.json"]
        command += ["--checks", "all", "--exclude-checks", "positive_data_acceptance", "--seed", "1", "-n", "10"]
        command += ["--exclude-path", "/completions", "--phases", "coverage,fuzzing", "--generation-database", "none"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-5000:]
        found = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
        assert found and int(found[1]) > 100, done.stdout[-2000:]
