"""The server: clients of the field against it, limits, errors, and what requests must not notice of each other."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial

import httpx
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from serving import Server, opened, post

from lrt.config.decoding import SamplingParams
from lrt.inference.generate import generate, score

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the clients' and the server's libraries


def alone(server: Server, prompt: list[int], **law) -> tuple[list[int], str]:
    """What `generate` makes of a prompt, by exact steps: tokens and text."""
    tokenizer = server.loaded.tokenizer
    law = {"max_new_tokens": law.pop("max_tokens", 16)} | law
    made = [
        e for step in generate(server.loaded.model, [prompt], SamplingParams(**law), mode="exact",
                               decode_bytes=tokenizer.decode_bytes) for e in step.emissions
    ]  # fmt: skip
    return [e.token for e in made], "".join(e.text for e in made)


def test_completion_is_what_generate_makes(server, client):
    for law in ({"temperature": 0.0}, {"temperature": 0.9, "seed": 7, "top_p": 0.8}):
        found = client.completions.create(model="tiny", prompt="def area(", max_tokens=20, **law)
        tokens, text = alone(server, opened(server, "def area("), max_tokens=20, **law)
        assert found.choices[0].text == text
        assert found.usage.completion_tokens == len(tokens)
        assert found.usage.prompt_tokens == len(opened(server, "def area("))


def test_streams_spell_the_same_text_and_count(client):
    law = {"model": "tiny", "prompt": "the quick", "max_tokens": 30, "seed": 3, "n": 2}
    whole = client.completions.create(**law)
    texts, finish, usage = ["", ""], [None, None], None
    for chunk in client.completions.create(**law, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            finish[choice.index] = choice.finish_reason or finish[choice.index]
        usage = chunk.usage or usage
    assert texts == [c.text for c in whole.choices]
    assert finish == [c.finish_reason for c in whole.choices]
    assert usage == whole.usage
    assert texts[0] != texts[1]


def test_token_prompts_lists_and_stops(server, client):
    ids = opened(server, "return width")
    both = client.completions.create(model="tiny", prompt=[ids, ids[:3]], max_tokens=9, temperature=0)
    one = client.completions.create(model="tiny", prompt=ids, max_tokens=9, temperature=0)
    assert both.choices[0].text == one.choices[0].text == alone(server, ids, max_tokens=9, temperature=0.0)[1]
    assert both.choices[1].text == alone(server, ids[:3], max_tokens=9, temperature=0.0)[1]
    text = alone(server, ids, max_tokens=40, temperature=0.0)[1]
    stopped = client.completions.create(model="tiny", prompt=ids, max_tokens=40, temperature=0, stop=text[5:8])
    assert stopped.choices[0].text == text[: text.index(text[5:8])]
    assert stopped.choices[0].finish_reason == "stop"


def test_log_probabilities_are_the_models_own(server, client):
    ids = opened(server, "def area(self)")
    found = client.completions.create(model="tiny", prompt=ids, max_tokens=5, temperature=0, logprobs=3, echo=True)
    listed, tokens = found.choices[0].logprobs, alone(server, ids, max_tokens=5, temperature=0.0)[0]
    row = torch.tensor([ids + tokens])
    exact = -score(server.loaded.model, row[:, :-1], row[:, 1:], mode="exact").nats[0]
    assert listed.token_logprobs[0] is None
    torch.testing.assert_close(torch.tensor(listed.token_logprobs[1:]), exact, atol=1e-4, rtol=0)
    assert listed.tokens[0] == "<|bos|>"
    for value, top in zip(listed.token_logprobs[1:], listed.top_logprobs[1:], strict=True):
        assert value in top.values()
        assert len(top) in (3, 4)
    text = found.choices[0].text
    for token, at in list(zip(listed.tokens, listed.text_offset, strict=True))[1:]:
        assert token.startswith("bytes:") or text[at:].startswith(token)
    only = client.completions.create(model="tiny", prompt="fox jumps", max_tokens=0, logprobs=1, echo=True)
    assert only.choices[0].text == "fox jumps" and None not in only.choices[0].logprobs.token_logprobs
    assert only.choices[0].finish_reason == "length"
    pieces = list(client.completions.create(model="tiny", prompt=ids, max_tokens=5, temperature=0, logprobs=3,
                                            echo=True, stream=True))  # fmt: skip
    assert "".join(p.choices[0].text for p in pieces) == text
    joined = [x for p in pieces for x in p.choices[0].logprobs.token_logprobs]
    assert joined == listed.token_logprobs


def test_chat_streams_and_lists_log_probabilities(server, client):
    talk = [{"role": "system", "content": "# tests"}, {"role": "user", "content": "the lazy dog"}]
    law = {"model": "tiny", "messages": talk, "max_tokens": 25, "seed": 5}
    whole = client.chat.completions.create(**law, logprobs=True, top_logprobs=2)
    prompt, stop = server.served.words.conversation(talk)
    assert server.loaded.tokenizer.decode(prompt) == "# tests\nUSER: the lazy dog\nBOT:"
    assert whole.choices[0].message.content == alone(server, prompt, max_tokens=25, seed=5, stop=stop)[1]
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
    assert all(len(t.top_logprobs) == 2 for t in whole.choices[0].logprobs.content)
    chunks = list(client.chat.completions.create(**law, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content


def test_models_and_health(server, client):
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "lrt"
    assert httpx.get(server.url + "/health", timeout=60).json() == {"status": "ok"}
    text = httpx.get(server.url + "/metrics", timeout=60).text
    assert 'lrt_requests_total{path="/v1/models",status="200"}' in text
    assert "lrt_generated_tokens_total" in text


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server):
    body = json.dumps({"prompt": "def", "max_tokens": 4, "temperature": 0, "stream": True})
    command = ["curl", "-sSN", server.url + "/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    lines = [x for x in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n\n") if x]
    assert lines[-1] == "data: [DONE]"
    text = "".join(json.loads(x.removeprefix("data: "))["choices"][0]["text"] for x in lines[:-1])
    assert text == alone(server, opened(server, "def"), max_tokens=4, temperature=0.0)[1]


def test_requests_do_not_notice_each_other(server):
    """Answers of a crowd equal those given alone, to the last bit of every log-probability."""
    bodies = [
        {"prompt": f"def area{i}(self, " + "width, " * (i % 5), "max_tokens": 3 + i % 11, "seed": i, "logprobs": 1,
         "temperature": (0.0, 0.8, 1.3)[i % 3], "repetition_penalty": (1.0, 1.2)[i % 2]}
        for i in range(40)
    ]  # fmt: skip
    single = [post(server, "/v1/completions", body).json()["choices"] for body in bodies]
    with ThreadPoolExecutor(40) as pool:
        crowd = [r.json()["choices"] for r in pool.map(lambda body: post(server, "/v1/completions", body), bodies)]
    assert [c[0]["text"] for c in crowd] == [c[0]["text"] for c in single]
    for a, b in zip(crowd, single, strict=True):
        assert a[0]["logprobs"]["token_logprobs"] == pytest.approx(b[0]["logprobs"]["token_logprobs"], abs=1e-5)


def test_extreme_laws_and_faulty_rows_leave_their_neighbours_alone(server, caplog):
    """A row without finite logits ends with 500; whoever decodes beside it, or after it in its row, notices nothing."""
    body = {"prompt": "def area(", "max_tokens": 24, "seed": 1, "temperature": 0.9}
    alone_ = post(server, "/v1/completions", body).json()["choices"][0]["text"]
    laws = [{"temperature": 1e-310}, {"temperature": 100, "top_p": 5e-324}, {"min_p": 5e-324, "top_k": 2**31},
            {"repetition_penalty": 0.01, "temperature": 5e-324}]  # fmt: skip
    poison, model = threading.Event(), server.loaded.model

    def spoil(_model, _inputs, _output) -> None:
        rows = [row for row, a in server.served.engine._seated.items() if a.sampling.seed == 666]
        for x in server.served.engine._batch.cache.keys if poison.is_set() else ():
            x[rows] = float("nan")

    hook = model.blocks[-1].register_forward_hook(spoil)
    try:
        with ThreadPoolExecutor(12) as pool:
            asked = [pool.submit(post, server, "/v1/completions", body | law) for law in laws for _ in range(2)]
            honest = [pool.submit(post, server, "/v1/completions", body) for _ in range(3)]
            assert [r.result().status_code for r in asked] == [200] * len(asked)
            assert {r.result().json()["choices"][0]["text"] for r in honest} == {alone_}
            poison.set()
            bad = pool.submit(post, server, "/v1/completions", body | {"seed": 666})
            honest = [pool.submit(post, server, "/v1/completions", body) for _ in range(3)]
            assert bad.result().status_code == 500
            assert {r.result().json()["choices"][0]["text"] for r in honest} == {alone_}
            poison.clear()
    finally:
        hook.remove()
    assert "not finite" in caplog.text
    with ThreadPoolExecutor(12) as pool:
        after = list(pool.map(lambda _: post(server, "/v1/completions", body).json(), range(12)))
    assert {a["choices"][0]["text"] for a in after} == {alone_}


def test_long_prompts_are_swept_and_agree_with_stepping(server, run):
    text = "the quick brown fox jumps over the lazy dog, width * height " * 6
    swept = post(server, "/v1/completions", {"prompt": text, "max_tokens": 6, "temperature": 0, "logprobs": 1}).json()
    assert server.metric("lrt_swept_tokens_total") > 100
    ids = opened(server, text)
    row = torch.tensor([ids + alone(server, ids, max_tokens=6, temperature=0.0)[0]])
    exact = -score(server.loaded.model, row[:, :-1], row[:, 1:], mode="exact").nats[0, len(ids) - 1 :]
    listed = swept["choices"][0]["logprobs"]["token_logprobs"]
    assert listed == pytest.approx(exact.tolist(), abs=1e-3)


def test_a_conversation_goes_on_from_its_kept_state(server):
    """The second turn takes in only what is new, and says what it says without a kept state."""
    law = {"max_tokens": 12, "temperature": 0}
    first = opened(server, "jumps over the lazy")
    said = alone(server, first, max_tokens=12, temperature=0.0)[0]
    post(server, "/v1/completions", {"prompt": first} | law)
    second = [*first, *said, *server.loaded.tokenizer.encode(" dog")]
    before = server.metric("lrt_reused_tokens_total")
    found = post(server, "/v1/completions", {"prompt": second} | law).json()
    assert server.metric("lrt_reused_tokens_total") - before == len(first) + len(said) - 1
    assert found["choices"][0]["text"] == alone(server, second, max_tokens=12, temperature=0.0)[1]
    other = [*first, *said[:2], 3, 4]  # leaves the answer: what is left is the mark at the prompt's end
    before = server.metric("lrt_reused_tokens_total")
    found = post(server, "/v1/completions", {"prompt": other} | law).json()
    assert server.metric("lrt_reused_tokens_total") - before == len(first)
    assert found["choices"][0]["text"] == alone(server, other, max_tokens=12, temperature=0.0)[1]


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("completions", {"prompt": "x" * 5000}, 400, "at most 255 fit here"),
        ("completions", {"prompt": [1, 9999]}, 400, "token 9999 is outside the vocabulary of"),
        ("completions", {"prompt": []}, 400, "prompt must be a text, a list of texts"),
        ("completions", {"prompt": [["a"]]}, 400, "prompt must be a text"),
        ("completions", {}, 400, "prompt is missing"),
        ("completions", {"prompt": "a", "max_tokens": 99999}, 400, "max_tokens is 99999; at most 256"),
        ("completions", {"prompt": "a", "max_tokens": 0}, 400, "nothing would be generated"),
        ("completions", {"prompt": "a", "temperature": -1}, 400, "temperature: Input should be greater"),
        ("completions", {"prompt": "a", "repetition_penalty": 5e-324}, 400, "repetition_penalty: Input should be"),
        ("completions", {"prompt": "a", "temperature": "hot"}, 400, "temperature: Input should be a valid number"),
        ("completions", {"prompt": "a", "suffix": "b"}, 400, "suffix is not supported: leave it out, or give ''"),
        ("completions", {"prompt": "a", "nonsense": 1}, 400, "nonsense is not known here"),
        ("completions", {"prompt": "a", "best_of": 3}, 400, "choosing the best is not supported"),
        ("completions", {"prompt": "a", "presence_penalty": 3}, 400, "presence_penalty: Input should be less"),
        ("completions", {"prompt": "a", "logit_bias": {"9999": 1}}, 400, "token 9999 is outside the vocabulary"),
        ("completions", {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias must map token ids to numbers"),
        ("completions", {"prompt": "a", "stop_token_ids": [9999]}, 400, "token 9999 is outside the vocabulary"),
        ("completions", {"prompt": "a", "stop": ["", "b"]}, 400, "stop must be"),
        ("completions", {"prompt": "a", "model": "gpt"}, 404, "is not served here; use 'tiny'"),
        ("completions", {"prompt": "a\ud800"}, 400, "not valid JSON"),
        ("completions", {"prompt": ["a"] * 40, "n": 40}, 400, "more than 64 answers"),
        ("completions", {"prompt": ["a"] * 65}, 400, "prompt has 65 prompts; send at most 64 at a time"),
        ("completions", {"prompt": [1] * 300}, 400, "the prompt has 300 tokens; at most 255 fit here"),
        ("completions", [], 400, "the body must be an object"),
        ("chat/completions", {"messages": []}, 400, "messages: List should have at least 1 item"),
        ("chat/completions", {"messages": [{"role": "assistant", "content": "x"}]}, 400, "must be the user's"),
        ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages.0: content is missing"),
        ("chat/completions", {"messages": [{"role": "user", "content": [1]}]}, 400, "messages.0.content"),
        ("nowhere", {}, 404, "not offered here"),
        ("embeddings", {"input": "a"}, 404, "not offered here"),
    ],
)  # fmt: skip
def test_errors_are_4xx_with_one_clear_sentence(server, path, body, status, says):
    found = httpx.post(f"{server.url}/v1/{path}", content=json.dumps(body),
                       headers={"content-type": "application/json"}, timeout=60)  # fmt: skip
    assert found.status_code == status, found.text
    error = found.json()["error"]
    assert says in error["message"]
    assert "\n" not in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_bodies_that_are_no_json_or_too_large(server):
    headers = {"content-type": "application/json"}
    broken = httpx.post(server.url + "/v1/completions", content=b'{"prompt": ', headers=headers, timeout=60)
    assert (broken.status_code, broken.json()["error"]["message"][:30]) == (400, "the body is not valid JSON: EO")
    large = httpx.post(server.url + "/v1/completions", content=b" " * 1_000_001, headers=headers, timeout=60)
    assert large.status_code == 413
    assert "larger than 1,000,000 bytes" in large.json()["error"]["message"]


HOLD = {"prompt": "def", "max_tokens": 256, "temperature": 0, "stop": "\x00"}


def test_deadline_queue_and_key(run):
    """One row, one place to wait: the next is refused; who waits too long is told so."""
    with Server(run, "secret", rows=1, queue=1) as small:
        assert post(small, "/v1/completions", HOLD).status_code == 401
        assert httpx.get(small.url + "/health", timeout=60).status_code == 200
        go = threading.Event()
        small.hold(go)
        key = {"authorization": "Bearer secret"}
        with httpx.Client(headers=key, timeout=60) as one, ThreadPoolExecutor(3) as pool:
            ask = partial(one.post, small.url + "/v1/completions", json=HOLD)
            running = pool.submit(ask)
            while small.metric("lrt_rows_running") < 1:
                time.sleep(0.001)
            others = [pool.submit(ask) for _ in range(2)]
            refused = next(as_completed(others)).result()
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            for job in small.served.engine._jobs():
                job.deadline = 0.0  # it has passed
            go.set()
            late = [running.result(), *(f.result() for f in others if f.result() is not refused)]
            assert [r.status_code for r in late] == [408, 408]
            assert "longer than 120 s" in late[0].json()["error"]["message"]
        small.wait_idle()
        assert small.metric("lrt_expired_total") == 2


def test_a_client_that_leaves_frees_its_row(run, monkeypatch):
    with Server(run, rows=1) as small:
        left, cancel = threading.Event(), small.served.engine.cancel
        monkeypatch.setattr(small.served.engine, "cancel", lambda jobs: (cancel(jobs), left.set()))
        small.hold(left, after=64)  # long before its 256 tokens are made
        assert _leave_after(small, HOLD | {"stream": True}, 3) == 3
        small.wait_idle()
        assert small.metric("lrt_cancelled_total") == 1
        assert small.metric("lrt_generated_tokens_total") < 70


def _leave_after(server: Server, body, count: int) -> int:
    seen = 0
    with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=60) as answer:
        for line in answer.iter_lines():
            seen += line.startswith("data:")
            if seen == count:
                break
    return seen


@pytest.mark.slow
def test_the_command_prints_its_address_and_drains_on_sigterm(run):
    """What runs when the signal comes is finished; then the process ends, cleanly."""
    command = [sys.executable, "-m", "lrt", "serve", str(run), "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        name, _, url = process.stdout.readline().strip().partition(" at ")
        assert name == "tiny"
        body = {"prompt": "def", "max_tokens": 200, "seed": 1, "stream": True, "stop": "\x00"}
        with httpx.stream("POST", url + "/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"' in rest[-2]
        assert process.wait(30) in (0, -signal.SIGTERM)
        with pytest.raises(httpx.ConnectError):
            httpx.get(url + "/health", timeout=60)


def test_a_long_prompt_does_not_stall_the_others(run, monkeypatch):
    """While a long prompt is swept, a chunk at a time, the batch goes on between the chunks."""
    with Server(run, chunk=8, prefill="jacobi", tolerance=0.0) as slow:
        engine, both, asked, ended = slow.served.engine, threading.Event(), threading.Event(), []
        submit, told = engine.submit, engine._post
        slow.hold(both)

        def count(jobs) -> None:
            submit(jobs)
            (both if asked.is_set() else asked).set()

        def tell(job, what) -> None:
            told(job, what)
            if what.finish:
                ended.append(len(job.prompt))

        monkeypatch.setattr(engine, "submit", count)
        monkeypatch.setattr(engine, "_post", tell)
        long = threading.Thread(target=post, args=(slow, "/v1/completions", {"prompt": [1] * 250, "max_tokens": 1}))
        long.start()
        assert asked.wait(240)
        short = post(slow, "/v1/completions", {"prompt": "def", "max_tokens": 3})
        long.join()
        assert ended == [short.json()["usage"]["prompt_tokens"], 250]


@pytest.mark.parametrize(
    ("path", "valid"),
    [
        (path, valid)
        for path in ("/v1/completions", "/v1/chat/completions", "/api/inspect", "/tokenize", "/detokenize")
        for valid in (True, False)
    ]
    + [("/v1/models/{name}", True)],  # any name is valid
)
def test_schemathesis_finds_no_server_error(server, path, valid):
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    operation = schema[path]["get" if "name" in path else "post"]
    mode = schemathesis.GenerationMode.POSITIVE if valid else schemathesis.GenerationMode.NEGATIVE

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=8, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    def check(case):
        response = case.call(base_url=server.url, timeout=60)
        assert response.status_code < 500, response.text

    check()
