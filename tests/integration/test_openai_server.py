"""examples/serve.sh: Megatron's OpenAI-compatible endpoint over its dynamic engine, in low bits.

Asked by curl, by the official client, and by lm-evaluation-harness. One server for all tests: it
must outlive every bad request and every client that goes away.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from releases import NEWEST, ROOT, run
from served import Server, served

# Collected here, too, with the server of this file.
from test_serve import test_nothing_listens_beyond_the_loopback  # noqa: F401

ENDPOINT = "OpenAI-compatible endpoint over the dynamic engine"
PROMPT = "the world"
POSITIONS = 16384
PACKAGES = Path(sys.prefix) / "lm-eval"
pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@pytest.fixture(scope="module")
def server(calibrated) -> Iterator[Server]:
    for package in ("quart", "hypercorn", "zmq", "msgpack"):
        pytest.importorskip(package)
    with served(calibrated, PROMPT, path="/v1/completions", method="POST") as server:
        yield server
    with socket.socket() as probe:  # its children have ended, too
        assert probe.connect_ex(("127.0.0.1", server.port)) != 0


def _begin(server: Server, body: bytes, *, length: int) -> socket.socket:
    """A connection on which a request has begun."""
    client = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    head = "POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
    client.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode() + body)
    return client


def _text(server: Server, **changed) -> str:
    """What follows a prompt."""
    status, answer = server.ask(_complete(**changed))
    assert status == 200, answer
    return json.loads(answer)["choices"][0]["text"]


def _complete(**changed) -> dict:
    return {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, **changed}


def _chat(**changed) -> dict:
    messages = [{"role": "user", "content": PROMPT}]
    return {"messages": messages, "max_tokens": 2, "temperature": 0, **changed}


ABSENT = "Megatron's endpoint does not have it, leave it out"
BAD = [
    ({"max_tokens": 2}, "prompt: Field required"),
    (b"", "the body is no JSON"),
    (b"{", "the body is no JSON"),
    ([], "valid dictionary"),
    (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ""),
    (b'{"prompt": "a", "temperature": NaN}', "temperature"),
    (b'{"prompt": "\\ud800"}', "prompt"),
    (_complete(prompt=""), "prompt 0 has no token: at least 1"),
    (_complete(prompt=[]), "prompt"),
    (_complete(prompt=[[]]), "prompt"),
    (_complete(prompt=[10**6]), "prompt: token 1000000 is not below the vocabulary's"),
    (_complete(prompt=["word " * 40_000]), f"together at most {POSITIONS}, the positions of the"),
    (_complete(max_tokens=POSITIONS), f"together at most {POSITIONS}"),
    (_complete(max_tokens=0), "max_tokens: Input should be greater than or equal to 1"),
    (_complete(temperature=-1), "temperature"),
    (_complete(temperature=1.0, top_k=5), "top_k needs top_p: 0"),
    (_complete(top_k=1000), "top_k: 1000 is not below the vocabulary's"),
    (_complete(top_p=1.5), "top_p: Input should be less than or equal to 1"),
    (_complete(logprobs=11), "logprobs: Input should be less than or equal to 10"),
    (_complete(stop=""), "stop"),
    (_complete(stop=[3]), "stop"),
    (_complete(n=2), "n: Input should be less than or equal to 1"),
    (_complete(temperature=1.0, seed=7), "seed: Megatron's engine draws for all requests from one"),
    (_complete(stream=True), f"stream: {ABSENT}"),
    (_complete(logit_bias={"5": 1}), f"logit_bias: {ABSENT}"),
    (_complete(presence_penalty=0.5), f"presence_penalty: {ABSENT}"),
    (_complete(unknown=1), "unknown: Extra inputs are not permitted"),
]
BAD_CHATS = [
    ({"max_tokens": 2}, "messages: Field required"),
    (_chat(messages=[]), "messages"),
    (_chat(messages=[{"role": "user", "content": ""}]), "prompt 0 has no token"),
    (_chat(messages=[{"role": "user"}]), "messages.0.content: Field required"),
    (_chat(messages=[{"role": "tool", "content": "a"}]), "messages.0.role"),
    (_chat(stop=["a"]), f"stop: {ABSENT}"),
    (_chat(logprobs=True), f"logprobs: {ABSENT}"),
    (_chat(n=9), "n: Input should be less than or equal to 8"),
    (_chat(max_tokens=-1), "max_tokens"),
]


def test_a_missing_package_means_the_static_engine_and_is_said(calibrated, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['quart'] = None\n")
    env = {**os.environ, "LOWBIT_PYTHON": sys.executable, "CKPT": str(calibrated), "PORT": "5999"}
    started = subprocess.Popen(
        ["bash", ROOT / "examples" / "serve.sh"],
        env={**env, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    said = [started.stdout.readline(), started.stdout.readline()]
    started.terminate()
    started.communicate(timeout=60)
    assert said[0] == (
        "serve: the static engine, since the dynamic one's endpoint lacks quart: "
        'pip install "megatron_lowbit[serve]"\n'
    )
    assert said[1].startswith("serve: starting the static engine on port 5999;")


@pytest.mark.support(ENDPOINT, NEWEST)
def test_curl_gets_what_others_get(server):
    assert "serve: starting the dynamic engine on port" in server.said
    assert "> low-bit communication: 4 sync points use shaped-hybrid" in server.said
    assert f"serve: {PROMPT}{_text(server, max_tokens=16)}\n" in server.said


def test_a_bad_request_is_answered_and_the_server_goes_on(server):
    first = _text(server)
    for path, rows in (("/v1/completions", BAD), ("/v1/chat/completions", BAD_CHATS)):
        for body, wanted in rows:
            status, answer = server.ask(body, path)
            assert status == 400, (str(body)[:80], answer)
            assert wanted in json.loads(answer)["error"]["message"], (str(body)[:80], answer)
    assert server.ask({}, "/v1/start_profile")[0] == 404
    assert server.ask({}, method="PUT")[0] == 405
    with _begin(server, b"", length=1 << 25) as client:  # refused before it is read
        assert client.recv(100).startswith(b"HTTP/1.1 413")
    assert _text(server) == first


def test_a_client_that_goes_away_is_harmless(server):
    first = _text(server)
    body = json.dumps(_complete(max_tokens=200)).encode()
    for sent in (len(body), 10):  # after the request, and in the middle of it
        with _begin(server, body[:sent], length=len(body)):
            time.sleep(0.3)
    assert _text(server) == first


@pytest.mark.support(ENDPOINT, NEWEST)
def test_the_official_client(server):
    openai = pytest.importorskip("openai")
    url = f"http://127.0.0.1:{server.port}/v1"
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)

    def ask(**changed):
        return client.completions.create(model="any", **_complete(**changed)).choices[0]

    whole = ask(max_tokens=16, logprobs=1)
    assert whole.finish_reason == "length"
    assert len(whole.logprobs.tokens) == 16
    assert all(value < 0 for value in whole.logprobs.token_logprobs[1:])
    assert ask(max_tokens=16, seed=7).text == whole.text
    echoed = ask(max_tokens=1, logprobs=1, echo=True)
    assert echoed.text.startswith(PROMPT)
    assert len(echoed.logprobs.tokens) == len(echoed.logprobs.token_logprobs)
    # A token with a text of its own, that is not among those before.
    at = next(n for n, text in enumerate(whole.logprobs.tokens) if n and text.strip().isalnum())
    stopped = ask(max_tokens=16, stop=whole.logprobs.tokens[at])
    assert stopped.finish_reason == "stop"
    assert whole.text.startswith(stopped.text)
    assert len(stopped.text) < len(whole.text)
    with ThreadPoolExecutor(20) as pool:
        texts = list(pool.map(lambda _: ask().text, range(20)))
    assert texts == [_text(server)] * 20
    chat = client.chat.completions.create(model="any", **_chat(n=2))
    assert [choice.finish_reason for choice in chat.choices] == ["length"] * 2
    with pytest.raises(openai.BadRequestError, match="stream: Megatron's endpoint"):
        client.completions.create(model="any", stream=True, **_complete())


def test_lm_eval_as_a_client(server, calibrated, tmp_path):
    if not PACKAGES.is_dir():
        pytest.skip("lm-eval is not installed: LOWBIT_LM_EVAL=yes tools/setup_env.sh")
    item = {"context": "the world", "choices": ["of a model", "a"], "gold": 0}
    (tmp_path / "arc-easy.jsonl").write_text(json.dumps(item) + "\n")
    model = f"model=any,base_url=http://127.0.0.1:{server.port}/v1/completions,max_length=512"
    model += f",tokenizer_backend=huggingface,tokenizer={calibrated}/tokenizer"
    command = ["-m", "lm_eval", "run", "--model", "local-completions"]
    command += ["--model_args", model, "--tasks", "local-arc-easy,local-answer", "--limit", "1"]
    command += ["--include_path", ROOT / "examples" / "lm_eval"]
    env = {"PYTHONPATH": str(PACKAGES), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    env |= {"no_proxy": "127.0.0.1", "OPENAI_API_KEY": "none"}
    done = run(sys.executable, *command, cwd=tmp_path, env={**os.environ, **env}, timeout=600)
    assert "|local-arc-easy|" in done.stdout
    assert "|exact_match|" in done.stdout
