import sys
from pathlib import Path

import pytest
import torch

# Tiny tensors: a second thread costs more than it brings, and tests share the cores.
torch.set_num_threads(1)

# Helpers of a test package are imported by their file name.
for directory in ("model", "train"):
    sys.path.insert(0, str(Path(__file__).parent / directory))


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
