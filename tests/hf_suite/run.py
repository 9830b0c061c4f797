"""Run transformers' own model test suite against our model: `python tests/hf_suite/run.py`.

The wheel has no tests, the source distribution has the common ones. They are fetched once into the cache (the
only step that needs the network), completed with stubs for the modules that the distribution leaves out, and
run with pytest on the models of `suite.py`. Not part of the default run of the tests.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import transformers

HERE = Path(__file__).resolve().parent
PACKAGE = "transformers_tests"
# What `test_modeling_common` and `test_configuration_common` import and the distribution does not have.
STUBS = {
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
    # never called: the tests that would are skipped without several accelerators
    "distributed_testing_utils.py": "def run_distributed(*args, **kwargs):\n    raise NotImplementedError\n",
}


def fetch(cache: Path) -> Path:
    """The source distribution of the installed transformers, downloaded if the cache lacks it."""
    name = f"transformers-{transformers.__version__}"
    archive = cache / f"{name}.tar.gz"
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        subprocess.run([*download, "--dest", str(cache), name.replace("-", "==")], check=True)
    return archive


def unpack(archive: Path, target: Path) -> None:
    """The archive's `tests/*.py` as the package `transformers_tests`, with the stubs."""
    package = target / PACKAGE
    package.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            path = Path(member.name)
            file = tar.extractfile(member) if path.parent.name == "tests" and path.suffix == ".py" else None
            if file is not None:
                (package / path.name).write_bytes(file.read())
    (package / "__init__.py").touch()
    for name, text in STUBS.items():
        stub = package / name
        if not stub.exists():
            stub.parent.mkdir(exist_ok=True)
            stub.write_text(text)


def provide(module: str, target: Path) -> None:
    """Install a module that the suite imports beside it, if it is nowhere yet."""
    if importlib.util.find_spec(module) is None and not (target / module).exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target)]
        subprocess.run([*install, module], check=True)


def main() -> int:
    """Fetch, unpack, run; the exit status is pytest's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=HERE.parents[1] / "build" / "hf_suite", help="where to keep it")
    parser.add_argument("--sdist", type=Path, help="a source distribution that is already there")
    arguments, for_pytest = parser.parse_known_args()
    unpack(arguments.sdist or fetch(arguments.cache), arguments.cache)
    provide("parameterized", arguments.cache)
    environment = os.environ | {"PYTHONPATH": str(arguments.cache.resolve()), "HF_HUB_OFFLINE": "1"}
    # the repository's own pytest options and conftest are for its own tests
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", f"--confcutdir={HERE}", "-W", "ignore"]
    command = [sys.executable, "-m", "pytest", *options, str(HERE / "suite.py"), *for_pytest]
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
