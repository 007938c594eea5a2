"""The metadata of a checkpoint of step 0, from which a run can begin."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from phase8.config.schema import RunConfig
from phase8.data.sampler import ORDER_VERSION
from phase8.train.resume import Position, checkpoint_metadata


def metadata_of_beginning(config: RunConfig) -> dict[str, Any]:
    """Metadata of a run at step 0, except its batch, which has not been chosen."""
    # The same in every call, so that the next call can continue the work of an interrupted one.
    random.seed(config.train.seed)
    np.random.seed(config.train.seed % 2**32)
    torch.manual_seed(config.train.seed)
    fingerprint = {"order_version": ORDER_VERSION, "sequence_length": config.model.sequence_length, "sources": []}
    return checkpoint_metadata(config, Position(), global_batch_size=None, fingerprint=fingerprint, device=torch.device("cpu"))
