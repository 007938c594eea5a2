"""Triton and its assembler, checked before the first kernel compiles.

On Hopper, ptxas before 13.1 may overwrite the registers of a matrix instruction (WGMMA) before they have been read: results are wrong
without any error. The Triton wheels that still use such a ptxas for Hopper often bring a newer one for Blackwell, which also
assembles for Hopper. The version that Triton would run is checked, because Triton silently ignores a path that is not a ptxas.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

HOPPER_MAJOR = 9
GOOD_ON_HOPPER = (13, 1)
HOPPER_ARCHITECTURE, BLACKWELL_ARCHITECTURE = 90, 100
ARCHITECTURES_VARIABLE = "TORCH_CUDA_ARCH_LIST"
HOPPER_VARIABLE, BLACKWELL_VARIABLE = "TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH"


@dataclass(frozen=True)
class Assembler:
    """A ptxas program.

    Args:
        path: The program.
        version: Version that it reports, for example "13.1".
    """

    path: str
    version: str

    @property
    def is_good(self) -> bool:
        """Whether it assembles Hopper's matrix instructions correctly."""
        return tuple(int(part) for part in self.version.split(".")) >= GOOD_ON_HOPPER


@dataclass(frozen=True)
class Toolchain:
    """Whether Triton kernels may be compiled in this process.

    Args:
        usable: Whether they may be compiled.
        assembler: The assembler; None: not checked, or not found.
        reason: Reason for the banner.
    """

    usable: bool
    assembler: Assembler | None
    reason: str


def missing_cpp_compiler() -> str | None:
    """Why torch.compile can make no code for the CPU; None: it can."""
    # Imported here: torch's compiler takes seconds to load.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "torch.compile needs a C++ compiler on a CPU, and there is none"
    return None


@contextmanager
def without_architectures() -> Iterator[None]:
    """Puts aside the GPUs that the environment names for compilations of torch's extensions, while one without code for GPUs is compiled.

    DeepSpeed reads them all the same, and knows none like 9.0a, which images for Hopper name.
    """
    architectures = os.environ.pop(ARCHITECTURES_VARIABLE, None)
    try:
        yield
    finally:
        if architectures is not None:
            os.environ[ARCHITECTURES_VARIABLE] = architectures


def prepare_toolchain(capability: tuple[int, int]) -> Toolchain:
    """Makes Triton use an assembler that is good for the GPU, if the installation has one.

    It sets TRITON_PTXAS_PATH rather than Triton's own setting, because torch.compile's worker processes inherit it. It must be
    called before the first kernel compiles: Triton keeps the version it has seen as part of its cache keys.

    Args:
        capability: Compute capability of the GPU.
    """
    try:
        import triton
    except ImportError as error:
        return Toolchain(usable=False, assembler=None, reason=f"triton cannot be imported ({error})")
    installed = f"triton {triton.__version__}"
    if capability[0] != HOPPER_MAJOR:
        return Toolchain(usable=True, assembler=None, reason=installed)
    try:
        chosen = _prepare_for_hopper()
    except (RuntimeError, OSError) as error:  # Triton's error without a ptxas, and the system's when ptxas may not be executed
        return Toolchain(usable=False, assembler=None, reason=f"{installed} has no ptxas that runs ({error})")
    return Toolchain(usable=chosen.usable, assembler=chosen.assembler, reason=f"{installed}, {chosen.reason}")


def choose_assembler(used: Assembler, newer: Assembler, *, variable: str, given_path: str | None) -> Toolchain:
    """Chooses the assembler for Hopper.

    Args:
        used: The one that Triton would run for Hopper.
        newer: The one that Triton would run for Blackwell.
        variable: The environment variable that determines `used`.
        given_path: Value of the variable, set by the user and never overridden; None: unset.
    """
    bad = f"ptxas {used.version}, which miscompiles Hopper's matrix instructions"
    if used.is_good:
        return Toolchain(usable=True, assembler=used, reason=f"ptxas {used.version}")
    if given_path is not None:
        ignored = "" if given_path == used.path else ", which Triton cannot run and ignores"
        reason = f"{bad}, with {variable} set to {given_path}{ignored}; name a ptxas 13.1 or newer there, or unset it"
        return Toolchain(usable=False, assembler=used, reason=reason)
    if newer.is_good:
        return Toolchain(usable=True, assembler=newer, reason=f"ptxas {newer.version} selected in place of {bad}")
    reason = f"{bad}; install triton 3.7.1 or newer, or set {variable} to a ptxas 13.1 or newer"
    return Toolchain(usable=False, assembler=used, reason=reason)


def _prepare_for_hopper() -> Toolchain:
    used, newer = _assembler(HOPPER_ARCHITECTURE), _assembler(BLACKWELL_ARCHITECTURE)
    # Since 3.9, Triton uses the ptxas of Blackwell for Hopper and ignores the other variable.
    variable = BLACKWELL_VARIABLE if used == newer else HOPPER_VARIABLE
    chosen = choose_assembler(used, newer, variable=variable, given_path=os.environ.get(variable))
    if not chosen.usable or chosen.assembler == used:
        return chosen
    os.environ[HOPPER_VARIABLE] = newer.path
    taken = _assembler(HOPPER_ARCHITECTURE)
    if taken.is_good:
        return chosen
    del os.environ[HOPPER_VARIABLE]
    reason = f"ptxas {taken.version}, which miscompiles Hopper's matrix instructions and stays although {HOPPER_VARIABLE} named {newer.path}"
    return Toolchain(usable=False, assembler=taken, reason=reason)


def _assembler(architecture: int) -> Assembler:
    """The assembler of Triton for a GPU architecture, as Triton itself reports it, because the deciding setting differs between versions."""
    from triton.backends.nvidia.compiler import get_ptxas

    tool = get_ptxas(architecture)
    return Assembler(tool.path, tool.version)
