"""Package metadata of phase8. Tool settings (ruff, pytest, import-linter, mypy) live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

# The command lines of the repository, in an installed package: phase8/doors holds the same files in the same places to each other.
DOORS = {f"phase8.doors.{folder}": folder for folder in ("launch", "tools", "configs")}
COMMANDS = {
    "pretrain": "launch.pretrain",
    "prepare": "tools.prepare_data",
    "collect": "tools.collect_text",
    "generate": "tools.generate",
    "evaluate": "tools.evaluate",
    "recall": "tools.recall",
    "plan": "tools.plan",
    "report": "tools.report",
    "inspect": "tools.inspect_checkpoint",
    "reshard": "tools.reshard_checkpoint",
    "quantize": "tools.quantize_checkpoint",
    "benchmark": "tools.benchmark",
    "ablation": "tools.ablation",
}

setup(
    name="phase8",
    version="0.1.0",
    description="Distributed pretraining of linear-time language models built from the Phase 8 block",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=[*find_packages(include=["phase8", "phase8.*"]), *DOORS],
    package_dir=DOORS,
    package_data={"phase8.observe": ["*.html"], "phase8.doors.configs": ["*.yaml"]},
    entry_points={"console_scripts": [f"phase8-{name} = phase8.doors.{door}:main" for name, door in COMMANDS.items()]},
    # launch/setup_environment.sh installs torch 2.13.0 together with this package, of the versions in the range.
    install_requires=[
        "torch>=2.11,<2.16",
        "numpy>=1.26",
        "pydantic>=2.11,<3",
        "PyYAML>=6.0",
        "sentencepiece>=0.2.0",
        "safetensors>=0.4.5",
        "rich>=13.7",
        "tensorboard>=2.17",
        "matplotlib>=3.8",
        "zlib-ng>=0.5",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "ruff>=0.6",
            "import-linter>=2.1",
            "mypy>=1.11",
            "types-PyYAML",
            "tokenizers>=0.20",
            "transformers>=5.24,<6",
            "accelerate>=1.1",  # the Trainer of transformers
            "pyarrow>=15",
            "zstandard>=0.22",
            "wandb>=0.27",
            "trackio>=0.40",
            "prometheus-client>=0.20",  # its parsers read what the OpenMetrics file says
            "deepspeed>=0.19.8,<0.20",  # no wheel for torch, no compiler: what it compiles it compiles when it needs it
            # The release that torch 2.13 brings on a GPU machine: tests look at the machine code it makes.
            "triton>=3.7.1,<3.8; sys_platform == 'linux'",
        ],
        "tokenizers": ["tokenizers>=0.20"],
        "data": ["pyarrow>=15", "zstandard>=0.22"],
        "deepspeed": ["deepspeed>=0.19.8,<0.20"],  # the engine knows names of these releases that are not public
        "wandb": ["wandb>=0.27"],
        "trackio": ["trackio>=0.40"],
        "mpi": ["mpi4py>=4.0"],
        "fla": ["fla-core>=0.5"],
        "liger": ["liger-kernel>=0.8"],
    },
)
