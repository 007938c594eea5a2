"""A recorded step where there is no GPU: the operations of torch that a step runs are written down, and replayed without any Python of the step.

As on a GPU, a recording computes nothing, numbers of Python are those of the recording, tensors are found by their memory, and the host reads none.
An operator of this library is replayed whole, with the Python of its reference.
"""

from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from phase8 import accelerator

READ_BY_THE_HOST = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class Tape:
    """What stands for a graph: operations with the memory of their operands and results."""

    def __init__(self):
        self.calls = []

    @torch.no_grad()
    def replay(self):
        resized = {}
        for operation, arguments, options, results in self.calls:
            for kept in (each for each in _leaves((arguments, options, results)) if isinstance(each, _Kept)):
                kept.make_room(resized)
            found = operation(*tree_map_only(_Kept, _tensor_of, arguments), **tree_map_only(_Kept, _tensor_of, options))
            for kept, new in zip(_leaves(results), _awaited(operation, found), strict=True):
                if isinstance(kept, _Kept) and not _share_memory(kept.tensor, new):
                    kept.tensor.copy_(new)
        for storage, num_bytes in resized.items():
            storage.resize_(num_bytes)

    def reset(self):
        self.calls.clear()


class _Kept:
    """A tensor by its memory: what happens to the Python object afterwards does not matter."""

    def __init__(self, tensor):
        self.tensor, self.num_bytes = tensor.detach(), tensor.untyped_storage().nbytes()

    def make_room(self, resized):
        """FSDP frees what it gathers by giving its memory no bytes."""
        storage = self.tensor.untyped_storage()
        if storage.nbytes() < self.num_bytes:
            resized.setdefault(storage, storage.nbytes())
            storage.resize_(self.num_bytes)


class _Recorder(TorchDispatchMode):
    def __init__(self, tape):
        super().__init__()
        self._tape, self._before, self._made = tape, {}, {}

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        if any(kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ for kind in types):
            return NotImplemented  # a DTensor calls the operations of its parts
        if operation in READ_BY_THE_HOST:
            raise RuntimeError(f"{operation} is read by the host")
        operands = tree_map_only(Tensor, _Kept, (arguments, options or {}))
        self._keep_what_is_written(operation, operands)
        found = operation(*arguments, **(options or {}))
        _awaited(operation, found)
        results = tree_map_only(Tensor, _Kept, found)
        known = {each.tensor.untyped_storage()._cdata for each in _leaves(operands) if isinstance(each, _Kept)}
        for each in _leaves(results):
            if isinstance(each, _Kept) and each.tensor.untyped_storage()._cdata not in known:
                self._made[each.tensor.untyped_storage()._cdata] = each.tensor
        self._tape.calls.append((operation, *operands, results))
        return found

    def _keep_what_is_written(self, operation, operands):
        written = {each.name for each in operation._schema.arguments if each.alias_info is not None and each.alias_info.is_write}
        named = dict(zip((each.name for each in operation._schema.arguments), operands[0], strict=False)) | operands[1]
        for name in written & named.keys():
            for kept in _leaves(named[name]):
                if isinstance(kept, _Kept) and (key := kept.tensor.untyped_storage()._cdata) not in self._made:
                    self._before.setdefault(key, (kept.tensor.untyped_storage(), kept.tensor.untyped_storage().clone()))

    def undo(self):
        """Nothing was computed: what there was has its values, and what was made has none."""
        for storage, values in self._before.values():
            if storage.nbytes():
                storage.copy_(values)
        for made in self._made.values():
            if made.is_floating_point() and made.untyped_storage().nbytes():
                torch.empty(0, dtype=made.dtype).set_(made.untyped_storage()).fill_(torch.nan)


@contextmanager
def _recording(tape):
    recorder = _Recorder(tape)
    # The recorder waits, since what gloo does at the end of a collective is a part of it, no operations of its own.
    with mock.patch.object(dist.Work, "wait", lambda work, *_: True), recorder:
        yield
    recorder.undo()


@contextmanager
def recorded_on_a_cpu():
    """A context in which what would be recorded on a GPU is recorded on a CPU."""
    with (
        mock.patch.object(accelerator, "Graph", Tape),
        mock.patch.object(accelerator, "recording", _recording),
        mock.patch("phase8.train.engine.fsdp.records_steps", lambda device_type: True),
        mock.patch("torch.nn.functional.one_hot", _one_hot),
    ):
        yield


def _one_hot(classes, num_classes):
    """As torch's, whose check of the range is read by the host on a CPU alone."""
    return (classes[..., None] == torch.arange(num_classes)).long()


def _leaves(tree):
    return tree_flatten(tree, is_leaf=lambda each: isinstance(each, _Kept))[0]


def _tensor_of(kept):
    return kept.tensor


def _share_memory(one, other):
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def _awaited(operation, found):
    """The results of an operation, those of other ranks included, which a stream would wait for."""
    results = tree_flatten(found)[0]
    for each in results:
        if operation.namespace == "_c10d_functional":
            torch.ops._c10d_functional.wait_tensor(each)
        elif hasattr(each, "wait"):
            each.wait()
    return results
