"""One thread, and hypothesis without deadlines or chance: a test fails for its code, never for its machine."""

import hypothesis
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("lrt", deadline=None, derandomize=True, database=None, print_blob=False)
hypothesis.settings.load_profile("lrt")
