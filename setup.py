"""Packaging of megaback. `pip install -c constraints.txt -e .` gives the `megaback` command."""

import re
from pathlib import Path

from setuptools import find_packages, setup

PACKAGES = ("megaback", "data_pipeline", "launcher", "tools")
FOLDER = Path(__file__).parent
(VERSION,) = re.findall(
    r'^__version__ = "(.+)"$',
    (FOLDER / "megaback" / "__init__.py").read_text(encoding="utf-8"),
    re.MULTILINE,
)

setup(
    name="megaback",
    version=VERSION,
    description="Train and use GPTs that write backwards: the model predicts the previous token.",
    long_description=(FOLDER / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # With this, `pip install -e` puts this folder on the path. Without it, setuptools installs a
    # finder that any folder named megaback/ (a clone, say) in the working directory wins over.
    package_dir={"": "."},
    packages=find_packages(include=[f"{name}*" for name in PACKAGES]),
    package_data={
        **{name: ["py.typed"] for name in PACKAGES},
        "data_pipeline.sources.novels": ["*.bz2", "README.md"],
        "tools.serving": ["page/*"],
    },
    # A checkout uses its own folders; what pip installs otherwise finds them below the environment.
    data_files=[
        (f"share/megaback/{name}", sorted(str(path) for path in Path(name).glob("*.*")))
        for name in ("configs", "slurm")
    ],
    install_requires=[
        "annotated-types>=0.6",
        "click>=8.1",
        "datasets>=4.0",
        "deepspeed>=0.19,<0.20",
        "fsspec[http]>=2024.2",
        "kitoken>=0.11",
        "numpy>=1.26",
        "packaging>=23",
        "psutil>=5.9",
        "pyarrow>=15",
        "pydantic>=2.7",
        "pyyaml>=6.0",
        "rich>=13.7",
        "safetensors>=0.4.3",
        "sentencepiece>=0.2.1",
        "tenacity>=8.2",
        "tokenizers>=0.21",
        "torch>=2.9",
        "zstandard>=0.22",
    ],
    extras_require={
        # The CUDA kernels. They compile against the torch that is there:
        # pip install --no-build-isolation -e '.[flash]'
        "flash": ["flash-attn>=2.8"],
        "gguf": ["gguf>=0.17"],
        "transformers": ["transformers>=4.53"],
        # trafilatura asks for lxml_html_clean by a name that pip does not always find.
        "html": ["trafilatura>=2.0", "lxml_html_clean>=0.4"],
        "lora": ["peft>=0.15"],
        "plot": ["matplotlib>=3.8"],
        "serve": ["fastapi>=0.115", "prometheus-client>=0.20", "uvicorn>=0.32"],
        "wandb": ["wandb>=0.19"],
        "tensorboard": ["tensorboard>=2.15"],
        # What `make fuzz` is guided by, where it is installed.
        "fuzz": ["atheris>=3"],
        # The site; `make docs` installs it without megaback.
        "docs": ["mkdocs-material>=9.6"],
        # EleutherAI's lm-evaluation-harness, for `megaback lm-eval`.
        "eval": ["lm_eval>=0.4.13"],
        "infill-benchmark": ["sacrebleu>=2.4"],
        "dev": [
            "accelerate>=1.0",
            "datatrove>=0.10",
            "fastapi>=0.115",
            "gguf>=0.17",
            "httpx>=0.27",
            "hypothesis>=6.100",
            "lm_eval>=0.4.13",
            "megatron-core>=0.16",
            "matplotlib>=3.8",
            "mypy>=1.13",
            "openai>=1.50",
            "peft>=0.15",
            "playwright>=1.48",
            "prometheus-client>=0.20",
            "pytest>=8.2",
            "pytest-rerunfailures>=15.0",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "sacrebleu>=2.4",
            "schemathesis>=4.0",
            "tensorboard>=2.15",
            "lxml_html_clean>=0.4",
            "torchdata>=0.11",
            "trafilatura>=2.0",
            "transformers>=4.53",
            "trl>=1.0",
            "types-PyYAML",
            "types-psutil",
            "uvicorn>=0.32",
            "wandb>=0.19",
            "xllamacpp>=2026.9; platform_system == 'Linux'",
            "xxhash>=3.0",
        ],
    },
    entry_points={
        "console_scripts": ["megaback = megaback.__main__:main"],
        # Where lm_eval looks for models of other packages, in versions after 0.4.13.
        "lm_eval.models": ["megaback = tools.harness.lm_eval_model:MegabackLM"],
    },
)
