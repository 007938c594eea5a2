"""An accelerator that torch knows as `dummy`: tensors of a type of device of their own, in host memory, on which the CPU runs every operation.

torch keeps one type of device for backends from outside, PrivateUse1, whose parts may be written in Python. `register` holds for the whole process.
"""

import ctypes

import torch
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "dummy"
ON_HOST, OF_AN_EXTENSION = 1, 12  # types of devices in DLPack, a field of whose structure says where a tensor lies
_TYPE_OFFSET_BYTES = 8
_structure = ctypes.pythonapi.PyCapsule_GetPointer
_structure.restype, _structure.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
_COPIES = (torch.ops.aten._copy_from, torch.ops.aten.copy_)
_library = torch.library.Library("_", "IMPL")


def register():
    _setup_privateuseone_for_python_backend(NAME)
    _library.fallback(_on_host, "PrivateUse1")


def _declared(x, device_type):
    """The same memory as a tensor of another type of device."""
    capsule = torch._C._to_dlpack(x)
    ctypes.c_int32.from_address(_structure(capsule, b"dltensor") + _TYPE_OFFSET_BYTES).value = device_type
    return torch._C._from_dlpack(capsule)


def _on_host(operator, *args, **kwargs):
    pairs = {}

    def to_host(value):
        if isinstance(value, torch.device) and value.type == NAME:
            return torch.device("cpu")
        if not isinstance(value, torch.Tensor):
            return value
        if value.device.type != NAME:
            if value.ndim and operator.overloadpacket not in _COPIES:
                raise RuntimeError(f"{operator} is given a tensor on {value.device} beside those on {NAME}")
            return value
        host = _declared(value.detach(), ON_HOST) if value.numel() else torch.empty(value.shape, dtype=value.dtype)
        pairs[id(host)] = value, host
        return host

    def back(value):
        if not isinstance(value, torch.Tensor):
            return value
        return pairs[id(value)][0] if id(value) in pairs else _declared(value, OF_AN_EXTENSION)

    def as_declared(value, argument):
        """torch gives Python the number of a tensor that stands for one."""
        is_number = isinstance(value, (int, float)) and str(argument.type) == "Tensor"
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None) if is_number else value

    args = [as_declared(value, argument) for value, argument in zip(args, operator._schema.arguments, strict=False)]
    args, kwargs = tree_map(to_host, (args, kwargs))
    kwargs.pop("pin_memory", None)
    result = args[1].copy_(args[0]) if operator is torch.ops.aten._copy_from.default else operator(*args, **kwargs)
    for value, host in pairs.values():
        if value.shape != host.shape:  # an empty `out`, which the operator has given its size
            value.data = _declared(host, OF_AN_EXTENSION)
    return tree_map(back, result)
