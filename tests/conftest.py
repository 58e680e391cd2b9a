"""One thread, and hypothesis without deadlines or chance: a test fails for its code, never for its machine or order.

Fixtures that tests of several rooms share; what they are made of stands in helpers.py and serving.py.
"""

from __future__ import annotations

import random
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from helpers import CODE

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)  # and so memory that nobody has written holds NaN, not zeros by luck
hypothesis.settings.register_profile(
    "lrt", deadline=None, derandomize=True, database=None, print_blob=False,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # a busy machine's
)  # fmt: skip
hypothesis.settings.load_profile("lrt")


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    """What a test draws without a seed is the same whichever tests ran before it."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A text file to train on; its tokens are prepared once, in the folder `data` beside it."""
    path = tmp_path_factory.mktemp("source") / "text.py"
    path.write_text(CODE, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def random_run(tmp_path_factory) -> Path:
    """The folder of a run whose model is random and whose memory matters (`serving.make_run`)."""
    from serving import make_run

    return make_run(tmp_path_factory.mktemp("random") / "run")
