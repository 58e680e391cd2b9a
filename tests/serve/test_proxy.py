"""The proxy's configuration that the documentation ships: its numbers fit the server's, and nginx serves by it."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from helpers import free_port
from serving import Server

from lrt.serve.connections import HEADER_BYTES
from lrt.serve.settings import Settings

CONF = Path(__file__).parents[2] / "docs" / "nginx.conf"
HOST = {"host": "lrt.example"}


def values(name: str) -> list[str]:
    """What the lines of one directive say."""
    return re.findall(rf"^\s*{name}\s+([^;]*);", CONF.read_text(encoding="utf-8"), re.M)


def number(name: str) -> int:
    (value,) = values(name)
    return int(re.sub(r"\D.*", "", value))


def test_no_limit_of_the_proxy_is_beyond_the_servers():
    """By default settings; a request that passes nginx is never refused for its size behind it."""
    limits, (buffers,) = Settings(), values("large_client_header_buffers")
    count, size = re.fullmatch(r"(\d+) (\d+)k", buffers).groups()  # pyright: ignore[reportOptionalMemberAccess]
    assert int(count) * int(size) * 1024 <= HEADER_BYTES - 2048  # what nginx adds stays below
    assert number("client_max_body_size") == limits.max_body
    assert number("client_header_timeout") <= limits.header_seconds
    assert number("client_body_timeout") <= limits.body_seconds
    assert number("proxy_read_timeout") > limits.deadline
    per_client, in_all = (int(v.split()[1]) for v in values("limit_conn"))
    started = re.search(r"--connections-per-peer (\d+)", CONF.read_text(encoding="utf-8"))
    most = int(re.search(r"max_conns=(\d+)", CONF.read_text(encoding="utf-8")).group(1))  # pyright: ignore[reportOptionalMemberAccess]
    assert started and per_client < in_all < most < int(started[1]) <= limits.connections
    assert values("proxy_buffering") == ["off"] and values("proxy_request_buffering") == ["on"]
    assert values("proxy_set_header") == ["Host $host", 'Connection ""', "X-Forwarded-For $remote_addr"]


def test_the_page_names_the_file_and_the_command():
    page = (CONF.parent / "serving.md").read_text(encoding="utf-8")
    assert "(nginx.conf)" in page and "test_a_proxy_by_this_file_serves_streams_and_refuses_what_is_too_much" in page


def _moved(home: Path, port: int, server: str) -> str:
    """The configuration with other addresses and with its files in a folder."""
    text = CONF.read_text(encoding="utf-8").replace("listen 443", f"listen 127.0.0.1:{port}")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f" {kind}_temp_path {home}/{kind};" for kind in kinds)
    text = text.replace("127.0.0.1:8000", server).replace("processes auto", "processes 1")
    return f"daemon off; pid {home}/pid; error_log stderr error;\n" + text.replace("http {", "http {" + paths)


@contextlib.contextmanager
def nginx_before(server: Server, home: Path, rate: str = "20r/s") -> Iterator[str]:
    """The address of an nginx that listens on a free port."""
    nginx, openssl = shutil.which("nginx", path="/usr/sbin:/usr/bin"), shutil.which("openssl")
    if nginx is None or openssl is None:
        pytest.skip("nginx is not installed")
    make = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=lrt.example"]
    subprocess.run([*make, "-keyout", home / "key.pem", "-out", home / "cert.pem"], check=True, capture_output=True)
    port = free_port()
    conf = _moved(home, port, "{}:{}".format(*server.address)).replace("rate=20r/s", f"rate={rate}")
    (home / "nginx.conf").write_text(conf)
    with (home / "log").open("w") as log:
        process = subprocess.Popen([nginx, "-p", home, "-c", home / "nginx.conf"], stderr=log)
    try:
        end = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=60).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < end, (home / "log").read_text()
                time.sleep(0.02)
        yield f"https://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(120)


@pytest.fixture(scope="module")
def proxied(run, tmp_path_factory) -> Iterator[tuple[Server, str]]:
    """A server, and the address of an nginx before it."""
    home = tmp_path_factory.mktemp("nginx")
    with (
        Server(run, "key", hosts=("lrt.example",), connections_per_peer=900) as server,
        nginx_before(server, home) as url,
    ):
        yield server, url


@contextlib.contextmanager
def client_of(url: str) -> Iterator[httpx.Client]:
    headers = HOST | {"authorization": "Bearer key"}
    with httpx.Client(base_url=url, verify=False, headers=headers, timeout=60) as client:
        build = client.build_request  # the name is said before the request, as by a client that looked it up
        client.build_request = lambda *a, **o: build(*a, **o | {"extensions": {"sni_hostname": HOST["host"]}})
        yield client


@pytest.fixture
def client(proxied) -> Iterator[httpx.Client]:
    with client_of(proxied[1]) as client:
        yield client


ASK = {"prompt": "def", "max_tokens": 20, "seed": 1, "ignore_eos": True}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_proxy_by_this_file_serves_streams_and_refuses_what_is_too_much(client):
    assert client.get("/health").json() == {"status": "ok"}
    whole = client.post("/v1/completions", json=ASK)
    assert whole.status_code == 200 and whole.headers["strict-transport-security"]
    with client.stream("POST", "/v1/completions", json=ASK | {"stream": True}) as stream:
        parts = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
    assert "".join(part["choices"][0]["text"] for part in parts) == whole.json()["choices"][0]["text"]
    assert client.post("/v1/completions", json=ASK, headers={"authorization": "Bearer x"}).status_code == 401
    for found, status in (
        (client.post("/v1/completions", content=b" " * 1_000_001), 413),
        (client.post("/v1/completions", json=ASK | {"top_p": 7}), 400),
    ):
        assert found.status_code == status and set(found.json()["error"]) == {"message", "type", "param", "code"}
    assert client.get("/health", headers={"x": "a" * 13_000}).status_code == 400
    assert client.get("/" + "a" * 13_000).status_code == 414


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_other_names_and_smuggled_requests_get_nothing_through_it(proxied):
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    host, port = proxied[1].removeprefix("https://").split(":")

    def raw(data: bytes) -> bytes:
        with (
            socket.create_connection((host, int(port)), timeout=60) as s,
            context.wrap_socket(s, server_hostname=HOST["host"]) as tls,
        ):
            tls.sendall(data)
            answer = b""
            with contextlib.suppress(ConnectionResetError):  # how nginx hangs up, if it is faster than we read
                while part := tls.recv(65536):
                    answer += part
            return answer

    head = b"POST /v1/completions HTTP/1.1\r\nHost: lrt.example\r\nContent-Type: application/json\r\n"
    head += b"Authorization: Bearer key\r\n"
    assert raw(b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n") == b""
    smuggled = b"0\r\n\r\nGET /metrics HTTP/1.1\r\nHost: lrt.example\r\n\r\n"
    for name in (b"Transfer-Encoding : chunked", b"Transfer-Encoding: xchunked", b"Transfer-Encoding: chunked"):
        line = name + b"\r\n"
        answer = raw(head + b"Content-Length: %d\r\n" % len(smuggled) + line + b"\r\n" + smuggled)
        assert answer.count(b"HTTP/1.1") <= 1 and b"lrt_" not in answer


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_events_pass_the_proxy_as_they_come(client, proxied):
    """The model stands still until the client has read the first event."""
    read = threading.Event()
    proxied[0].hold(read, after=12)
    with client.stream("POST", "/v1/completions", json=ASK | {"stream": True}) as stream:
        lines = stream.iter_lines()
        first = next(lines)
        read.set()
        assert first.startswith("data: {") and list(lines)[-2:] == ["data: [DONE]", ""]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_too_many_requests_of_one_client_are_refused(proxied, tmp_path: Path):
    """At a rate that no machine is too slow for."""
    with nginx_before(proxied[0], tmp_path, rate="1r/m") as url, client_of(url) as client:
        found = [client.get("/health") for _ in range(60)]
    assert [r.status_code for r in found[:41]] == [200] * 41 and found[-1].status_code == 429
    assert found[-1].json()["error"]["type"] == "rate_limit_error"
