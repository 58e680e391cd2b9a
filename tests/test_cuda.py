"""What runs otherwise on a GPU than on a CPU, each part against its twin on the CPU.

Every test is a function of `device`, so that the CPU rehearses it. With a GPU: `pytest -m cuda tests/test_cuda.py`.
docs/gpu.md lists every place of the package that asks for the device, and the test here that runs it.
The tests stand in tests/on_device, by part.
"""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("on_device.common", "on_device.passes", "on_device.decoding", "on_device.training")

from on_device.common import compiling, device  # noqa: E402, F401 - fixtures
from on_device.decoding import *  # noqa: E402, F403
from on_device.passes import *  # noqa: E402, F403
from on_device.training import *  # noqa: E402, F403

pytestmark = pytest.mark.filterwarnings("default")  # a warning of a driver fails no part
