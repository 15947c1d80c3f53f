"""The package as users get it: the wheel, its contents, and what an import of it loads."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from apart import printed

ROOT = Path(__file__).resolve().parents[1]
HEAVY = "accelerate transformers timm peft datasets mamba_ssm causal_conv1d matplotlib sklearn".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A source distribution and a wheel, built from a copy of the tree."""
    folder = tmp_path_factory.mktemp("build")
    skip = shutil.ignore_patterns(".git", ".venv*", "*.egg-info", "build", "runs", "__pycache__", ".*_cache")
    source = shutil.copytree(ROOT, folder / "source", ignore=skip)
    code = "from setuptools import build_meta; build_meta.build_sdist('..'); build_meta.build_wheel('..')"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, check=True)
    (wheel,), (archive,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, archive


def test_the_wheel_works_from_outside_the_repository(built, tmp_path):
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(tmp_path / "target")
    code = (
        "import residual_steer, residual_steer.backbones as families\n"
        "from residual_steer.backbones import decoders, recurrent, vision\n"
        "print(residual_steer.__file__, families.__file__, decoders.__file__, residual_steer.list_backbones())"
    )
    found, _ = printed(code, tmp_path, [tmp_path / "target"])
    assert found.count(str(tmp_path / "target")) == 3
    assert "'mamba'" in found


def test_the_wheel_holds_what_it_should_and_no_bare_backbones(built):
    names = zipfile.ZipFile(built[0]).namelist()
    assert {name.split("/")[0] for name in names} == {"residual_steer", names[-1].split("/")[0]}
    assert {"residual_steer/py.typed", "residual_steer/backbones/recurrent.py"} <= set(names)
    assert any(name.endswith("LICENSE") for name in names)
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "residual_steer").rglob("*.py")}
    modules |= {f"residual_steer/{path.relative_to(ROOT)}" for path in (ROOT / "backbones").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules


def test_the_source_distribution_holds_the_families(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"backbones/recurrent.py", "residual_steer/training/loop.py", "LICENSE", "README.md"} <= names


def test_one_version_stands_everywhere():
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == version
    assert re.search(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version


def test_links_of_the_readme_work_on_pypi():
    dist = runpy.run_path(str(ROOT / ".ci" / "dist.py"))
    made = dist["absolute"]((ROOT / "README.md").read_text("utf-8"), "https://forge.example/me/it", "9.9")
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)]+)\)", made)
    assert all(link.startswith("https://") for _, link in links)
    assert {link.split("/")[5] for picture, link in links if picture} == {"raw"}
    assert "https://forge.example/me/it/blob/v9.9/CLAIMS.md" in {link for _, link in links}


def test_an_import_loads_nothing_heavy_and_the_rest_when_it_is_asked_for(tmp_path):
    program = f"""
import sys
for name in [name for name in sys.modules if name.partition(".")[0] in {HEAVY!r}]:
    del sys.modules[name]
import residual_steer as rs
later = ("baselines", "continual", "data", "diagnostics")
early = [name for name in {HEAVY!r} if name in sys.modules]
assert not early, early
assert not any(f"residual_steer.{{name}}" in sys.modules for name in later)
assert set(later) <= set(dir(rs)) and set(later) <= set(rs.__all__)
rs.data
early = [name for name in ("sklearn", "datasets", "transformers", "timm") if name in sys.modules]
assert not early, early
for name in later:
    assert getattr(rs, name) is sys.modules[f"residual_steer.{{name}}"]
try:
    rs.nothing
except AttributeError as error:
    assert "no attribute 'nothing'" in str(error)
else:
    raise SystemExit("there is nothing of that name")
"""
    printed(program, tmp_path)
