"""What the machine code of a kernel looks like on Hopper, without a GPU.

A test names its kernels as values, all of a file in one dict, and gets back what `ptxas` made of them:

    KERNELS = {
        "forward": OfflineKernel(
            "phase8.kernels.gpu.green_scan:forward_kernel",
            {"potential": "*fp32", "starts": None, "T": 4096, "stride": 32, "eps": 1e-6, "BLOCK": 64},
            num_warps=4,
        ),
    }

    @pytest.fixture(scope="module")
    def compiled():
        return compile_offline(KERNELS)

    def test_machine_code(compiled):
        compiled["forward"].check(max_registers=128, contains=("MUFU.RCP",), lacks=("HGMMA",))
        assert compiled["forward"].count("FFMA") == pytest.approx(120, rel=0.05)

The arguments are those of the launch, tensors replaced by their type ("*bf16"), and are specialised as a launch would: pointers and
integers that 16 divides are known to be so, 1 and None become constants.

Run as a program this file is the compiler: in its own process, since kernels decorated under TRITON_INTERPRET cannot be compiled. It stays for
the next file of tests, as its imports take longer than most kernels.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
HOPPER = 90
SPILLS = ("STL", "LDL")  # stores to and loads from the stack
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
LABEL = re.compile(r"^(\.L\w+):")
BRANCH = re.compile(r"\bBRA\w*(?:\.\w+)*\s.*`\((\.L\w+)\)")


@dataclass(frozen=True)
class OfflineKernel:
    """One kernel to compile.

    Args:
        function: `module:name` of the jitted function.
        arguments: Value of every parameter, for tensors their type ("*fp32", "*bf16", "*i1"); a constexpr dtype as "tl.bfloat16".
        num_warps: As in the launch.
        num_stages: As in the launch.
        options: Further launch options, such as `maxnreg`.
    """

    function: str
    arguments: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    options: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Compiled:
    """The machine code of one kernel.

    Args:
        registers: Of a thread.
        stack: Bytes of a thread on the stack: 0 unless something spills.
        shared: Bytes of shared memory of a program.
        opcodes: How often each instruction occurs, modifiers included ("MUFU.LG2").
        loops: The same of the body of each loop, in the order of the code.
    """

    registers: int
    stack: int
    shared: int
    opcodes: Mapping[str, int]
    loops: Sequence[Mapping[str, int]]

    def count(self, opcode: str) -> int:
        """Instructions of this name, whatever their further modifiers."""
        return count(self.opcodes, opcode)

    def check(self, *, max_registers: int = 255, contains: Sequence[str] = (), lacks: Sequence[str] = ()) -> None:
        """Asserts the bound on registers, no spill, and which instructions occur or do not."""
        spills = self.stack, [name for name in SPILLS if self.count(name)]
        assert spills == (0, []), f"spills: {self.stack} bytes of stack, {spills[1]}"
        assert self.registers <= max_registers, f"{self.registers} registers"
        missing, unwanted = [name for name in contains if not self.count(name)], [name for name in lacks if self.count(name)]
        assert (missing, unwanted) == ([], []), f"missing {missing}, unwanted {unwanted}"


def count(opcodes: Mapping[str, int], opcode: str) -> int:
    """Instructions of this name, whatever their further modifiers: HGMMA counts HGMMA.64x128x16.F32.BF16."""
    return sum(number for name, number in opcodes.items() if f"{name}.".startswith(f"{opcode}."))


def compile_offline(kernels: Mapping[str, OfflineKernel]) -> dict[str, Compiled]:
    """Compiles kernels for Hopper in another process; skips the test where that cannot be done."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", "PYTEST_CURRENT_TEST")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    answer = _compiler(frozenset(environment.items())).answer({name: asdict(kernel) for name, kernel in kernels.items()})
    if "unusable" in answer:
        pytest.skip(answer["unusable"])
    failed = {name: result["error"] for name, result in answer.items() if "error" in result}
    assert not failed, "\n".join(f"{name} does not compile:\n{error}" for name, error in failed.items())
    return {name: Compiled(**result) for name, result in answer.items()}


class _Compiler:
    """The process of the compiler, which ends with this one: a request and its answer are a line each.

    Args:
        environment: Its variables.
    """

    def __init__(self, environment: Mapping[str, str]):
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment
        )

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            _compiler.cache_clear()  # the next test has another one
            self._errors.seek(0)
            raise AssertionError(f"the compiler ended with exit code {self._process.wait()}\n{self._errors.read()}")
        return json.loads(line)


@functools.cache
def _compiler(environment: frozenset[tuple[str, str]]) -> _Compiler:
    return _Compiler(dict(environment))


def _main() -> None:
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever else is printed is no answer
    from phase8.kernels.toolchain import prepare_toolchain

    toolchain = prepare_toolchain((HOPPER // 10, HOPPER % 10))
    for line in sys.stdin:
        request = {name: OfflineKernel(**kernel) for name, kernel in json.loads(line).items()}
        compiled = {name: _compile(kernel) for name, kernel in request.items()} if toolchain.usable else {"unusable": toolchain.reason}
        print(json.dumps(compiled), file=answers, flush=True)


def _compile(kernel: OfflineKernel) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    try:
        module, name = kernel.function.split(":")
        function = vars(importlib.import_module(module))[name]
        source = ASTSource(function, *_specialise(function, kernel.arguments))
        options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages, **(kernel.options or {})}
        compiled = triton.compile(source, target=GPUTarget("cuda", HOPPER, 32), options=options)
    except Exception:  # one kernel that does not compile is reported beside the others
        return {"error": traceback.format_exc()}
    return asdict(_read_cubin(compiled.asm["cubin"], shared=compiled.metadata.shared))


def _specialise(function: Any, arguments: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Signature, constants and attributes, as Triton derives them from the arguments of a launch."""
    names = [parameter.name for parameter in function.params]
    if set(names) != set(arguments):
        raise ValueError(f"missing {sorted(set(names) - set(arguments))}, unknown {sorted(set(arguments) - set(names))}")
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(function.params):
        value = arguments[parameter.name]
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if parameter.is_constexpr or value is None or (is_integer and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[parameter.name] = "constexpr", _constant(value)
        elif isinstance(value, str):
            signature[parameter.name] = value
        elif is_integer:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        else:
            signature[parameter.name] = "u1" if isinstance(value, bool) else "fp32"
        divisible = isinstance(value, str) or (is_integer and value % 16 == 0 and not parameter.do_not_specialize)
        if signature[parameter.name] != "constexpr" and divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _constant(value: Any) -> Any:
    """A constexpr, where "tl.bfloat16" names the dtype."""
    import triton.language as tl

    return vars(tl)[value.removeprefix("tl.")] if isinstance(value, str) and value.startswith("tl.") else value


def _read_cubin(cubin: bytes, *, shared: int) -> Compiled:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.check_output([knobs.nvidia.cuobjdump.path, "-res-usage", file.name], text=True)
        listing = subprocess.check_output([knobs.nvidia.nvdisasm.path, file.name], text=True)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    opcodes, loops = _read_listing(listing)
    return Compiled(registers, stack, shared, opcodes, loops)


def _read_listing(listing: str) -> tuple[dict[str, int], list[dict[str, int]]]:
    """Opcodes of the whole code, and of the body of each loop: from a label to a branch back to it."""
    code: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in listing.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif (instruction := INSTRUCTION.search(line)) and instruction[1] != "NOP":  # which only fills the last lines
            code.append(instruction[1])
            branch = BRANCH.search(line)
            if branch and branch[1] in labels and labels[branch[1]] < len(code) - 1:  # not the endless branch to itself behind the end
                loops.append(dict(Counter(code[labels[branch[1]] :])))
    return dict(Counter(code)), loops


if __name__ == "__main__":
    _main()
