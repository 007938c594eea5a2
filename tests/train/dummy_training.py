"""Trains on the dummy accelerator through the command line, and prints in JSON what was found: `python -m tests.train.dummy_training CONFIG`.

With a further word the blocks are compiled, each into one graph.
"""

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch

from launch import pretrain
from phase8 import accelerator
from phase8.config.load import load_config
from phase8.config.schema import PrecisionSection
from phase8.errors import ConfigError
from phase8.observe.metrics import read_metrics
from phase8.precision.policy import require_matrix_units
from phase8.train.device import select_device
from tests import dummy_accelerator

COMPILED = ("train.compile.enabled=true", "train.compile.fullgraph=true", "train.compile.backend=aot_eager")
SETTINGS = ("train.num_steps=4", "train.evaluate_every_n_steps=2", "checkpoint.every_n_steps=2")


def trained(config, device, *settings):
    """The exit code, and the losses of all steps of the run."""
    sys.argv = ["pretrain.py", "--config", config, "--device", device, "--set", f"run.name={device}", *SETTINGS, *settings]
    code = pretrain.main()
    path = Path(load_config(config, []).run.output_dir) / device / "metrics.jsonl"
    return code, [record["loss"] for record in read_metrics(path) if "loss" in record]


def refused(call):
    try:
        call()
    except ConfigError as error:
        return str(error)
    return None


def main(config, is_compiled=False):
    compiled = COMPILED if is_compiled else ()
    dummy_accelerator.register()
    torch.set_num_threads(1)
    device = torch.device(dummy_accelerator.NAME, 0)
    with redirect_stdout(sys.stderr):
        found = {
            "present": accelerator.present(),
            "cpu": trained(config, "cpu"),
            "stopped": trained(config, "dummy", "train.stop_at_step=2", *compiled),
            "resumed": trained(config, "dummy", *compiled),
            "collectives": refused(lambda: accelerator.collectives("dummy")),
            "memory": (accelerator.free_and_total_bytes(device), accelerator.peak_bytes(device)),
            "limit": refused(lambda: accelerator.limit_memory(device, 2**30)),
            "fp8": refused(lambda: require_matrix_units(PrecisionSection(linear="fp8"), device)),
            "missing": refused(lambda: select_device("xpu")),
            "auto": str(select_device("auto")),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], len(sys.argv) > 2)
