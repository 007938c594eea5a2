"""A training step on a machine without Triton: by itself, as one compiled graph, and exported. `python -m tests.train.step_without_triton BACKEND`.

The model is the whole one of configs/quickstart.yaml, from its embedding to its loss, with shorter sequences. What was found is printed as JSON.
"""

import copy
import json
import sys


class NoTriton:
    """Lets every import of Triton fail, as where it is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, NoTriton())

import torch  # noqa: E402  below what it must not find

from phase8.config.auto import without_auto  # noqa: E402
from phase8.config.load import load_config  # noqa: E402
from phase8.model.model import build_model  # noqa: E402
from phase8.model.parameters import decayed_parameter_names, initialise  # noqa: E402
from phase8.optim.adamw import build_optimizer  # noqa: E402

CONFIG, SHORT = "configs/quickstart.yaml", ("model.sequence_length=64", "model.local_window_size=[32,32,32,64]")


class LossSum(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, targets):
        return self.model.loss_sum(tokens, targets, None)


def step(root, batch, config, compiled=None):
    """Forward, loss, backward and optimizer; the loss."""
    optimizer = build_optimizer(dict(root.named_parameters()), config.optim, decayed_names=decayed_parameter_names(root.model))
    loss = (root if compiled is None else compiled)(*batch) / batch[1].numel()
    loss.backward()
    optimizer.step()
    return loss.item()


def difference(found, expected):
    return max(((found[name] - x).abs().max() / x.abs().max()).item() for name, x in expected.items())


def exported(root, batch):
    """What two exported graphs compute: the loss of that of the forward pass; loss and gradients of that of forward and backward."""
    from torch.export.experimental import _export_forward_backward  # torch has no public name for it

    program = torch.export.export(root, batch)
    joint = _export_forward_backward(program)
    results = joint.graph_module(*dict(root.named_parameters()).values(), *batch)
    outputs = {output.kind.name: {} for output in joint.graph_signature.output_specs}
    for output, result in zip(joint.graph_signature.output_specs, results, strict=True):
        outputs[output.kind.name][output.target] = result
    (loss,) = outputs["LOSS_OUTPUT"].values()
    return program.module()(*batch), loss, outputs["GRADIENT_TO_PARAMETER"]


def main(backend):
    torch.set_num_threads(1)
    config = without_auto(load_config(CONFIG, SHORT))
    model = build_model(config.model, dtype=torch.float64, device=torch.device("cpu")).double()  # so that AdamW divides no rounding errors
    initialise(model, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # what begins at zero has gradients, too
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.02)
    batch = tuple(torch.randint(config.model.vocab_size, (2, config.model.sequence_length), generator=generator) for _ in range(2))
    root = LossSum(model)
    found = {"num_blocks": len(model.blocks)}
    eager, compiled = copy.deepcopy(root), copy.deepcopy(root)
    found["loss"] = step(eager, batch, config)
    found["compiled_loss"] = step(compiled, batch, config, torch.compile(compiled, fullgraph=True, backend=backend))
    after, before = dict(eager.named_parameters()), dict(root.named_parameters())
    found["gradients"] = difference({name: x.grad for name, x in compiled.named_parameters()}, {name: x.grad for name, x in after.items()})
    found["weights"] = difference(dict(compiled.named_parameters()), after)
    found["unmoved"] = [name for name, x in after.items() if torch.equal(x, before[name])]
    loss, joint_loss, gradients = exported(root, batch)
    found["exported_losses"] = [each.item() / batch[1].numel() for each in (loss, joint_loss)]
    found["exported_gradients"] = difference(gradients, {name: x.grad * batch[1].numel() for name, x in after.items()})
    found["triton"] = "triton" in sys.modules
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
