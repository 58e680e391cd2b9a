"""A tiny run and a server for it, one a file of tests."""

import pytest
from serving import Server, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("serve") / "tiny")


@pytest.fixture(scope="module")
def server(run):
    with Server(run) as running:
        yield running
