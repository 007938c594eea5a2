"""The shape of the code, checked: what docs and ADRs promise about every file."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "phase8").rglob("*.py"))
SHARED_BY_BENCHMARKS = ROOT / "tools/bench/measure.py"  # no door: what the doors beside it have in common
PACKAGES_OF_DOORS = [ROOT / folder / "__init__.py" for folder in ("launch", "tools")]
DOORS = sorted({*(ROOT / "launch").glob("*.py"), *(ROOT / "tools").rglob("*.py")} - {SHARED_BY_BENCHMARKS, *PACKAGES_OF_DOORS})
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in [*LIBRARY, *PACKAGES_OF_DOORS, *DOORS, SHARED_BY_BENCHMARKS]}
NO_KERNELS = {"backends", "limits", "loss_chunks", "toolchain"}  # in kernels/, but no operations: they decide which implementation runs, and how
# In kernels/, but plain torch alone: what the operations share, what they make possible, and what the compiler fuses.
PLAIN = {
    "causal_convolution", "decay_and_gate", "fp32_product", "recurrence_step", "rotary", "running_sum", "state_map", "window_ring", "window_state",
}  # fmt: skip
TYPES = {"decoding_state"}  # in kernels/, but no operation: what an operation is given
DTYPE_RULE = "dtypes"  # in kernels/, but no operation: tested through every operation that obeys it
NO_OPERATIONS = {"__init__", *NO_KERNELS, *PLAIN, *TYPES, DTYPE_RULE}
KERNELS = {path.stem: path for path in LIBRARY if path.parent.name == "kernels" and path.stem not in NO_OPERATIONS}
REFERENCES = {path.stem: path for path in LIBRARY if path.parent.name == "reference" and path.stem != "__init__"}

MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 120
PICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
TORCH_PICKLERS = {"load", "save"}
# The tokenizers package raises nothing narrower, nothing that goes wrong in a periodic save may end training, and a damaged pickle raises anything.
MAY_CATCH_EXCEPTION = {"phase8/data/tokenizer.py", "phase8/train/saver.py", "phase8/checkpoint/deepspeed_source.py"}
MAY_TOLERATE = {  # any error, said in a sentence: at the end of work that is done, and of an extra of it
    "phase8/closing.py", "phase8/processes/rendezvous.py", "phase8/observe/loggers.py", "phase8/observe/metrics.py",
    "phase8/observe/progress.py",    "phase8/observe/stage_progress.py", "phase8/train/loop.py", "phase8/train/trainer.py",
}  # fmt: skip
# Into fresh names and directories of their own, into what a launcher or a user has named.
MAY_OPEN_TO_WRITE = {
    "phase8/durable.py", "phase8/terminal.py", "phase8/data/staging.py", "phase8/data/tokenizer_training.py", "phase8/processes/exit.py",
    "phase8/ablation/runs.py", "phase8/benchmark/parallel.py", "phase8/observe/step_profile.py",
}  # fmt: skip
# The key of an option and what it is called, and a mode of torch.compile without it; a language of texts, and where its headers lie.
NAMES_NO_RUNTIME = re.compile(r"cuda_graphs|CUDA graphs?\b|cudagraphs", re.IGNORECASE)
OF_TEXTS = ("tools/collect_text.py", "phase8/data/collect/roots.py")
VAGUE_NAMES = {"utils", "util", "helpers", "common", "misc", "manager"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def places(found: Iterator[tuple[Path, ast.AST]]) -> list[str]:
    return [f"{relative(path)}:{node.lineno}" for path, node in found]


def nodes(kind: type | tuple[type, ...], paths=TREES) -> Iterator[tuple[Path, ast.AST]]:
    """Every node of a kind, with its file."""
    return ((path, node) for path in paths for node in ast.walk(TREES[path]) if isinstance(node, kind))


def is_below(path: Path, *folders: str) -> bool:
    return any(path.is_relative_to(ROOT / folder) for folder in folders)


def called_name(call: ast.Call) -> str:
    return ast.unparse(call.func)


def imported_modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]


def public_functions(path: Path) -> dict[str, list[str]]:
    """Parameter names of every public function of a module."""
    functions = (node for node in TREES[path].body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"))
    return {f.name: [a.arg for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs)] for f in functions}


def test_import_contracts_hold(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0, capsys.readouterr().out


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_lives_in_its_five_places_with_the_signature_of_its_reference(name):
    others = [f"phase8/kernels/reference/{name}.py", f"phase8/kernels/gpu/{name}.py", f"tests/kernels/test_{name}.py", f"tools/bench/{name}.py"]
    assert [place for place in others if not (ROOT / place).exists()] == []
    ours, specification = public_functions(KERNELS[name]), public_functions(REFERENCES[name])
    assert ours and {f: specification.get(f) for f in ours} == ours


def test_what_decides_about_kernels_has_tests():
    assert [name for name in sorted(NO_KERNELS) if not (ROOT / f"tests/kernels/test_{name}.py").exists()] == []


def test_only_gpu_kernels_and_the_toolchain_import_triton():
    others = [path for path in TREES if not is_below(path, "phase8/kernels/gpu", "phase8/kernels/toolchain.py")]
    imports = nodes((ast.Import, ast.ImportFrom), others)
    assert places((path, node) for path, node in imports if any(m.split(".")[0] == "triton" for m in imported_modules(node))) == []


def lines_that_name_a_vendors_runtime(path: Path) -> list[str]:
    """Code, comments and help texts: whoever names it in words will name it in code."""
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    return [f"{relative(path)}:{number}" for number, line in lines if "cuda" in NAMES_NO_RUNTIME.sub("", line).lower()]


def test_one_file_besides_kernels_and_their_benchmarks_names_a_vendors_runtime():
    allowed = ("phase8/accelerator.py", "phase8/kernels/gpu", "phase8/kernels/toolchain.py", "tools/bench", *OF_TEXTS)
    assert [place for path in TREES if not is_below(path, *allowed) for place in lines_that_name_a_vendors_runtime(path)] == []
    assert lines_that_name_a_vendors_runtime(ROOT / "phase8/accelerator.py") != []


def test_long_scans_are_an_operator():
    """Inductor of torch 2.11 fails at those of several rows."""
    compiled = ("phase8/model", "phase8/context_parallel", "phase8/tensor_parallel", "phase8/kernels")
    apart = ("phase8/kernels/reference", "phase8/kernels/gpu", "phase8/kernels/running_sum.py")
    paths = [path for path in TREES if is_below(path, *compiled) and not is_below(path, *apart)]
    assert places((path, call) for path, call in nodes(ast.Call, paths) if called_name(call).rpartition(".")[2] in ("cumsum", "cumprod")) == []


def test_a_start_imports_nothing_that_only_some_runs_need():
    """Each costs a process of every test and of every rank half a second or more."""
    code = "import sys, phase8.train.build; print([name for name in ('triton', 'torch._dynamo', 'deepspeed', 'matplotlib') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout.strip() == "[]"


def test_gpu_kernels_are_imported_inside_functions_only():
    """A CPU installation of torch has no Triton, and a GPU run has chosen its assembler before the first kernel is there."""

    def names_gpu(node: ast.Import | ast.ImportFrom) -> bool:
        modules = [f"{module}." for module in imported_modules(node)]
        if isinstance(node, ast.ImportFrom):
            modules += [f"{node.module}.{alias.name}." for alias in node.names]
        return any(module.startswith("phase8.kernels.gpu.") for module in modules)

    at_the_top = (
        (path, node)
        for path, tree in TREES.items()
        if not is_below(path, "phase8/kernels/gpu")
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom)) and names_gpu(node)
    )
    assert places(at_the_top) == []


@pytest.mark.parametrize("name", sorted(REFERENCES.keys() | PLAIN))
def test_every_operation_in_plain_torch_has_a_test_that_calls_it(name):
    functions = public_functions(REFERENCES[name] if name in REFERENCES else ROOT / f"phase8/kernels/{name}.py")
    assert functions
    test = ROOT / f"tests/kernels/test_{name}.py"
    names = {node.id for node in ast.walk(ast.parse(test.read_text(encoding="utf-8"))) if isinstance(node, ast.Name)}
    called_by_kernel = {n.attr for _, n in nodes(ast.Attribute, [KERNELS[name]])} if name in KERNELS else set()
    assert functions.keys() <= names | called_by_kernel


def test_every_module_begins_with_a_docstring():
    assert [relative(path) for path, tree in TREES.items() if not ast.get_docstring(tree)] == []


def test_packages_hold_a_docstring_only():
    packages = {path.parent for path in LIBRARY}
    assert [relative(package) for package in packages if not (package / "__init__.py").exists()] == []
    assert [relative(path) for path in TREES if path.name == "__init__.py" and len(TREES[path].body) != 1] == []


def test_files_and_functions_are_small():
    long_files = [relative(path) for path in (*LIBRARY, *DOORS) if len(path.read_text(encoding="utf-8").splitlines()) > MAX_FILE_LINES]
    functions = nodes((ast.FunctionDef, ast.AsyncFunctionDef))
    allowed = {path: MAX_KERNEL_LINES if is_below(path, "phase8/kernels") else MAX_FUNCTION_LINES for path in TREES}
    long_functions = places((path, f) for path, f in functions if f.end_lineno - f.lineno >= allowed[path])
    assert (long_files, long_functions) == ([], [])


def test_names_say_what_a_file_does():
    assert [relative(path) for path in TREES if VAGUE_NAMES & {path.stem, path.parent.name}] == []


def test_the_mark_of_a_space_is_written_as_an_escape():
    """It looks like an underscore; `SPACE_MARK` of phase8/data/tokenizer_file.py is its name."""
    sources = (path for folder in ("phase8", "tools", "launch", "tests") for path in sorted((ROOT / folder).rglob("*.py")))
    assert [relative(path) for path in sources if "\u2581" in path.read_text(encoding="utf-8")] == []


def test_only_doors_and_observe_print():
    quiet = [path for path in LIBRARY if not is_below(path, "phase8/observe")]
    assert places((path, call) for path, call in nodes(ast.Call, quiet) if called_name(call) == "print") == []


def test_streams_that_outlive_their_reader_are_made_in_one_place():
    """A console of rich's own exits when a pipe breaks, and a door that handles its errors by itself knows some of them."""
    consoles = ((path, call) for path, call in nodes(ast.Call) if called_name(call).split(".")[-1] == "Console")
    assert [place for place in places(consoles) if not place.startswith("phase8/terminal.py:")] == []
    mains = [(path, f) for path, f in nodes(ast.FunctionDef, DOORS) if f.name == "main"]
    assert len(mains) == len(DOORS)
    assert places((path, f) for path, f in mains if not ast.unparse(f.body[-1]).startswith("return run_door(") or len(f.body) > 8) == []


def test_only_the_launcher_the_device_the_toolchain_and_paths_touch_the_environment():
    started_by_torchrun = ("launch", "tools/evaluate.py")
    allowed = (*started_by_torchrun, "phase8/train/device.py", "phase8/kernels/toolchain.py", "phase8/paths.py")
    quiet = [path for path in TREES if not is_below(path, *allowed)]
    by_attribute = (pair for pair in nodes(ast.Attribute, quiet) if ast.unparse(pair[1]) in ("os.environ", "os.environb", "os.getenv", "os.putenv"))
    by_import = (pair for pair in nodes(ast.ImportFrom, quiet) if pair[1].module == "os" and {"environ", "getenv"} & {a.name for a in pair[1].names})
    assert places(by_attribute) + places(by_import) == []


def test_no_attribute_is_read_with_a_default():
    calls = nodes(ast.Call)
    assert places((path, call) for path, call in calls if called_name(call) == "getattr" and len(call.args) > 2) == []


def test_nothing_unpickles():
    imports = (pair for pair in nodes((ast.Import, ast.ImportFrom)) if any(m.split(".")[0] in PICKLERS for m in imported_modules(pair[1])))
    asked = "phase8/checkpoint/deepspeed_source.py"  # with --trust-pickle alone
    others = [path for path in TREES if not is_below(path, asked)]
    torch_calls = (pair for pair in nodes(ast.Call, others) if called_name(pair[1]) in {f"torch.{name}" for name in TORCH_PICKLERS})
    numpy_calls = (pair for pair in nodes(ast.keyword) if pair[1].arg == "allow_pickle" and ast.unparse(pair[1].value) != "False")
    assert places(imports) + places(torch_calls) + places(numpy_calls) == []


def test_no_file_of_a_known_name_is_opened_to_be_written():
    """Another user of a shared directory may have put a link there: `durable` replaces, appends and locks without following it."""

    def is_writing(call: ast.Call) -> bool:
        name, texts = called_name(call).rpartition(".")[2], {argument.value for argument in call.args if isinstance(argument, ast.Constant)}
        return name in ("write_text", "write_bytes", "touch") or (name == "open" and bool(texts & {"w", "wb", "a", "ab"}))

    calls = nodes(ast.Call, LIBRARY)
    assert places((path, call) for path, call in calls if is_writing(call) and relative(path) not in MAY_OPEN_TO_WRITE) == []


def test_no_error_is_swallowed_by_a_broad_except():
    def is_broad(handler: ast.ExceptHandler) -> bool:
        caught = [] if handler.type is None else [ast.unparse(node) for node in ast.walk(handler.type) if isinstance(node, ast.expr)]
        return handler.type is None or bool({"Exception", "BaseException"} & set(caught))

    broad = [(path, handler) for path, handler in nodes(ast.ExceptHandler) if is_broad(handler)]
    assert places(pair for pair in broad if relative(pair[0]) not in MAY_CATCH_EXCEPTION) == []
    assert all(handler.type is not None and isinstance(handler.body[-1], ast.Raise) for _, handler in broad)


def test_errors_are_tolerated_at_ends_only():
    tolerating = {relative(path) for path, call in nodes(ast.Call) if called_name(call) == "Tolerated"}
    assert tolerating <= MAY_TOLERATE


def test_the_whole_config_is_named_only_where_everything_meets():
    """Below train, functions receive their own section, but for what the planner answers of a whole config and what a checkpoint records of a run."""
    names = ("candidates", "divided_batch", "dry_run", "layouts", "prediction", "run_communication", "settle", "suggest", "whole_config")
    answers = tuple(f"phase8/plan/{name}.py" for name in names)
    packages = ("phase8/config", "phase8/train", "phase8/benchmark", "phase8/ablation", "phase8/conversion", "launch", "tools")
    allowed = (*packages, *answers, "phase8/checkpoint/run_metadata.py")
    below = [path for path in TREES if not is_below(path, *allowed)]
    assert places((path, node) for path, node in nodes(ast.alias, below) if node.name == "RunConfig") == []


def test_doors_are_imported_by_nothing():
    doors = {"launch", "tools", *(path.stem for path in DOORS)}
    imports = nodes((ast.Import, ast.ImportFrom))

    def is_door(module: str) -> bool:
        return module.split(".")[0] in doors or module.startswith("phase8.doors")

    assert places((path, node) for path, node in imports if any(map(is_door, imported_modules(node)))) == []


@pytest.mark.parametrize("path", DOORS, ids=relative)
def test_doors_have_a_main_and_no_side_effects_when_imported(path, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(path.parent)  # as when it is run
    monkeypatch.setattr(sys, "argv", [str(path), "--no-such-option"])
    environment = dict(os.environ)
    specification = importlib.util.spec_from_file_location(f"door_{path.stem}", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert callable(module.main)
    assert capsys.readouterr() == ("", "") and not list(tmp_path.iterdir()) and dict(os.environ) == environment
