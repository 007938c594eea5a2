"""A training step on a machine without Triton: by itself, as one compiled graph, and exported. `python -m tests.train.step_without_triton BACKEND`.

The block is that of configs/quickstart.yaml, once, between its embedding and head. What was found is printed as JSON.
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

CONFIG, ONE_BLOCK = "configs/quickstart.yaml", ("model.num_layers=1", "model.local_window_size=32")


class LossSum(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, targets):
        return self.model.loss_sum(tokens, targets, None)


class Logits(LossSum):
    def forward(self, tokens):
        return self.model.logits(self.model(tokens)[0])


def step(root, batch, config, compiled=None):
    """Forward, loss, backward and optimizer; the loss."""
    optimizer = build_optimizer(dict(root.named_parameters()), config.optim, decayed_names=decayed_parameter_names(root.model))
    loss = (root if compiled is None else compiled)(*batch) / batch[1].numel()
    loss.backward()
    optimizer.step()
    return loss.item()


def difference(found, expected):
    return max(((found[name] - x).abs().max() / x.abs().max()).item() for name, x in expected.items())


def exported_gradients(root, batch):
    """Gradients that the exported joint graph of forward and backward gives."""
    from torch.export.experimental import _export_forward_backward

    program = _export_forward_backward(torch.export.export(root, batch))
    results = program.graph_module(*dict(root.named_parameters()).values(), *batch)
    of = {output.arg.name: target for output in program.graph_signature.output_specs if (target := output.target) is not None}
    names = [output.arg.name for output in program.graph_signature.output_specs]
    return {of[name]: result for name, result in zip(names, results, strict=True) if name in of}


def main(backend):
    torch.set_num_threads(1)
    config = without_auto(load_config(CONFIG, ONE_BLOCK))
    model = build_model(config.model, dtype=torch.float64, device=torch.device("cpu")).double()  # so that AdamW divides no rounding errors
    initialise(model, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # what begins at zero has gradients, too
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.02)
    batch = tuple(torch.randint(config.model.vocab_size, (2, config.model.sequence_length), generator=generator) for _ in range(2))
    root = LossSum(model)
    logits = Logits(model)(batch[0])
    program = torch.export.export(Logits(model), (batch[0],)).module()
    found = {"logits": difference({"": program(batch[0])}, {"": logits})}
    eager, compiled = copy.deepcopy(root), copy.deepcopy(root)
    found["loss"] = step(eager, batch, config)
    found["compiled_loss"] = step(compiled, batch, config, torch.compile(compiled, fullgraph=True, backend=backend))
    after, before = dict(eager.named_parameters()), dict(root.named_parameters())
    found["gradients"] = difference({name: x.grad for name, x in compiled.named_parameters()}, {name: x.grad for name, x in after.items()})
    found["weights"] = difference(dict(compiled.named_parameters()), after)
    found["unmoved"] = [name for name, x in after.items() if torch.equal(x, before[name])]
    if backend == "inductor":
        gradients = exported_gradients(root, batch)
        found["exported_gradients"] = difference(gradients, {name: x.grad * batch[1].numel() for name, x in after.items()})
    found["triton"] = "triton" in sys.modules
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
