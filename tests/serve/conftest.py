"""A tiny run, a server for it, and a client of that; one a file of tests."""

import openai
import pytest
from serving import Server, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory, request):
    """Of the context that the file of tests asks for by its `CONTEXT`."""
    return make_run(tmp_path_factory.mktemp("serve") / "tiny", context=getattr(request.module, "CONTEXT", 256))


@pytest.fixture(scope="module")
def server(run):
    with Server(run) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as made:
        yield made
