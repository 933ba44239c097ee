"""ENGINE=static examples/serve.sh: Megatron's server in low bits says what generate.py says.

One server for all tests: it must outlive every bad request.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from forks import forked
from releases import ROOT, run
from served import Server, served

PROMPT = "the world"
POSITIONS = 16384
pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")


@pytest.fixture(scope="module")
def server(calibrated) -> Iterator[Server]:
    pytest.importorskip("flask_restful")
    with served(calibrated, PROMPT, path="/api", method="PUT", ENGINE="static") as server:
        yield server


def test_the_server_says_what_generate_py_says(server, calibrated):
    assert "> low-bit communication: 4 sync points use shaped-hybrid" in server.said
    flags = ["--load", calibrated, "--lowbit-tp-comm", "--lowbit-collective", "one-shot"]
    wanted = ["--bf16", "--prompts", PROMPT, "--num-tokens-to-generate", "16"]
    generated = forked(3, ROOT / "examples" / "generate.py", *flags, *wanted)
    _, _, text = generated.stdout.partition(f"{PROMPT}[")
    assert f"serve: {PROMPT}{text.rstrip().removesuffix(']')}" in server.said


def _api(**changed) -> dict:
    return {"prompts": [PROMPT], "tokens_to_generate": 2, "top_k": 1, **changed}


def _complete(**changed) -> dict:
    return {"prompt": PROMPT, "max_tokens": 2, **changed}


# What is asked, and what the answer must hold, with the limit where there is one.
BAD = [
    ({"tokens_to_generate": 2}, "prompts: Field required"),
    ([], "valid dictionary"),
    (b"", "JSON"),
    (b"{", "JSON"),
    (b"[" * 100_000, ""),
    (b'{"prompts": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deep"),
    (b'{"prompts": ["a"], "tokens_to_generate": 1' + b"0" * 5000 + b"}", ""),
    (b'{"prompts": ["a"], "tokens_to_generate": 1, "temperature": NaN}', "temperature: "),
    (b'{"prompts": ["a"], "tokens_to_generate": 1, "temperature": 1e999}', "temperature: "),
    (b'{"prompts": ["\\ud800"], "tokens_to_generate": 1}', "prompts.0: Value error, character 0"),
    (b"\xff\xfe", ""),
    (_api(prompts=PROMPT), "prompts: Input should be a valid list"),
    (_api(prompts=None), "prompts: Input should be a valid list"),
    (_api(prompts=[]), "prompts: List should have at least 1 item"),
    (_api(prompts=[PROMPT] * 129), "prompts: List should have at most 128 items"),
    (_api(prompts=[[PROMPT]]), "prompts.0: Input should be a valid string"),
    (_api(prompts=[PROMPT, 3]), "prompts.1: Input should be a valid string"),
    (_api(prompts=[""]), "prompt 0 has no token: at least 1"),
    (_api(prompts=[PROMPT, ""], add_BOS=True), "prompt 1 has no token: at least 1"),
    (_api(prompts=["word " * 40_000]), f"together at most {POSITIONS}, the positions of the model"),
    (_api(tokens_to_generate=10**8), f"together at most {POSITIONS}, the positions of the model"),
    (_api(tokens_to_generate=POSITIONS), f"together at most {POSITIONS}"),
    (_api(tokens_to_generate=-1), "tokens_to_generate: Input should be greater than or equal to 0"),
    (_api(tokens_to_generate=0), "tokens_to_generate: 0 needs logprobs"),
    (_api(tokens_to_generate="2"), "tokens_to_generate: Input should be a valid integer"),
    (_api(tokens_to_generate=2.5), "tokens_to_generate: Input should be a valid integer"),
    (_api(tokens_to_generate=True), "tokens_to_generate: Input should be a valid integer"),
    (_api(tokens_to_generate=None), "tokens_to_generate: Input should be a valid integer"),
    (_api(temperature=0), "temperature: Input should be greater than or equal to 0.01"),
    (_api(temperature=1e-300), "temperature: Input should be greater than or equal to 0.01"),
    (_api(temperature="hot"), "temperature: Input should be a valid number"),
    (_api(top_k=1001), "top_k: Input should be less than or equal to 1000"),
    (_api(top_k=1000), "top_k: 1000 is not below the vocabulary's"),
    (_api(top_k=1.5), "top_k: Input should be a valid integer"),
    (_api(top_p=0.5), "top_k and top_p: give one of them"),
    (_api(top_k=0, top_p=1.5), "top_p: Input should be less than or equal to 1"),
    (_api(top_k=0, top_p_decay=0.5), "need top_p"),
    (_api(top_k=0, top_p=0.5, top_p_bound=0.7), "top_p_bound: above 0 and at most top_p"),
    (_api(logprobs=1), "logprobs: Input should be a valid boolean"),
    (_api(add_BOS="yes"), "add_BOS: Input should be a valid boolean"),
    (_api(stop_on_eol=0), "stop_on_eol: Input should be a valid boolean"),
    (_api(stop_on_double_eol=[]), "stop_on_double_eol: Input should be a valid boolean"),
    (_api(prevent_newline_after_colon=2), "prevent_newline_after_colon: Input should be a valid"),
    (_api(random_seed=-1), "random_seed: Input should be greater than or equal to 0"),
    (_api(random_seed=1 << 64), "random_seed: Input should be less than or equal to 2147483647"),
    (_api(stop_token="x"), "stop_token: Input should be a valid integer"),
    (_api(length_penalty="x"), "length_penalty: Input should be a valid number"),
]
BAD_COMPLETIONS = [
    ({"prompt": PROMPT}, "max_tokens: Field required"),
    ({"max_tokens": 2}, "prompt: Field required"),
    (_complete(prompt=[]), "prompt"),
    (_complete(prompt=""), "prompt 0 has no token: at least 1"),
    (_complete(prompt=[1, 2]), "prompt"),
    (_complete(prompt=[[]]), "prompt"),
    (_complete(prompt=[[10**6]]), "prompt: token 1000000 is not below the vocabulary's"),
    (_complete(prompt=[["a"]]), "prompt"),
    (_complete(prompt={"a": 1}), "prompt"),
    (_complete(max_tokens=10**8), f"together at most {POSITIONS}"),
    (_complete(max_tokens="2"), "max_tokens: Input should be a valid integer"),
    (_complete(max_tokens=0), "max_tokens: 0 needs echo"),
    (_complete(temperature=-1), "temperature"),
    (_complete(top_k=5), "top_k needs top_p: 0"),
    (_complete(logprobs=3), "logprobs need max_tokens: 0"),
    (_complete(logprobs=None), "logprobs: Input should be a valid integer"),
    (_complete(best_of=2), "best_of: Input should be less than or equal to 1"),
    (_complete(n=2), "n: Input should be less than or equal to 1"),
    (_complete(stop=3), "stop"),
    (_complete(seed=1 << 70), "seed: Input should be less than or equal to 2147483647"),
    (_complete(debug_fname="../x"), "debug_fname"),
    (b'{"prompt": "\\udfff", "max_tokens": 1}', "prompt"),
]


def test_a_bad_request_is_answered_with_its_limit_and_the_server_goes_on(server):
    first = server.ask(_api())
    assert first[0] == 200, first
    for how, rows in ((("/api", "PUT"), BAD), (("/completions", "POST"), BAD_COMPLETIONS)):
        for body, wanted in rows:
            status, answer = server.ask(body, *how)
            assert (status, wanted in answer) == (400, True), (str(body)[:80], status, answer)
    assert server.ask(_api(), kind="text/plain")[0] == 415
    assert server.ask(b'{"prompts": ["' + b"a" * (1 << 24) + b'"]}')[0] == 413
    assert server.ask(_api(), method="POST")[0] == 405
    assert server.ask(_api(), path="/nothing")[0] in (404, 405)
    assert server.ask(_api()) == first


def test_what_may_be_asked_is_served(server):
    """Every field at a right value, at its limits: none of them ends the server."""
    for changed in (
        {"tokens_to_generate": 1},
        {"tokens_to_generate": 0, "logprobs": True},
        {"logprobs": True},
        {"top_k": 0},
        {"top_k": 0, "top_p": 0.9, "top_p_decay": 0.5, "top_p_bound": 0.5},
        {"top_k": 0, "temperature": 0.01},
        {"temperature": 100, "top_k": 700},
        {"prompts": ["a", "the world of a model"], "add_BOS": True},
        {"prompts": [PROMPT] * 9},
        {"random_seed": (1 << 31) - 1, "stop_token": 5, "length_penalty": 1.0},
        {"unknown": 3},
    ):
        status, answer = server.ask(_api(**changed))
        assert status == 200, (changed, answer)
        texts = json.loads(answer)["text"]
        assert len(texts) == len(changed.get("prompts", [PROMPT])), (changed, answer)
    for changed in (
        {},
        {"temperature": 0, "top_k": 3},
        {"prompt": ["a", "the world of a model"], "model": "any", "stop": "x"},
        {"prompt": [[5, 6]], "top_p": 0, "top_k": 5, "seed": 7},
        {"max_tokens": 0, "echo": True},
    ):
        status, answer = server.ask(_complete(**changed), "/completions", "POST")
        assert status == 200, (changed, answer)
    assert server.ask(_api())[0] == 200


def test_twenty_at_once_are_served_alike(server):
    alone = server.ask(_api())
    assert alone[0] == 200
    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(server.ask, [_api()] * 20)) == [alone] * 20


def test_nothing_listens_beyond_the_loopback(server):
    """The server, the store of its ranks and Gloo: all ports of the processes that serve.sh has."""
    with open("/proc/net/tcp") as v4, open("/proc/net/tcp6") as v6:
        lines = [line.split() for line in (*v4, *v6) if " 0A " in line]
    listening = {line[9]: line[1] for line in lines}
    mine = {listening[inode] for inode in _sockets(str(server.port)) if inode in listening}
    assert f"0100007F:{server.port:04X}" in mine
    assert {address.split(":")[0] for address in mine} == {"0100007F"}, mine


def _sockets(port: str) -> set[str]:
    """Inodes of the sockets of the processes that have `--port` and this number as arguments."""
    found = set()
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{process}/cmdline") as words:
                if f"--port\0{port}\0" not in words.read():
                    continue
            links = [
                os.readlink(f"/proc/{process}/fd/{fd}") for fd in os.listdir(f"/proc/{process}/fd")
            ]
        except OSError:
            continue
        found |= {link[8:-1] for link in links if link.startswith("socket:[")}
    return found


def test_no_checkpoint_is_said(tmp_path):
    env = {**os.environ, "LOWBIT_PYTHON": sys.executable, "CKPT": str(tmp_path)}
    done = run("bash", ROOT / "examples" / "serve.sh", env=env, status=1)
    missing = f"no calibration index in {tmp_path}/lowbit"
    assert done.stderr == f"serve: {missing}: run examples/quickstart.sh first\n"
