# SPDX-License-Identifier: Apache-2.0
"""The built wheel: what is in it, and that it works in a new environment, outside the checkout, with nothing but its
dependencies."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from cupy_router.simt import device

for package in ("build", "hatchling", "pip"):
    try:  # without importing them: pip would swap the module distutils of the other tests
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        pytest.skip(f"the package `{package}` is not installed", allow_module_level=True)

import hatch_build  # noqa: E402

pytestmark = pytest.mark.slow("process")
ROOT = Path(__file__).parents[1]
SUBSET = "layout or padding or lengths or out_is_filled or method"


def run(*command: str | Path, cwd: Path) -> str:
    env = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "CUPY_ROUTER_KERNELS"}}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, so that this one is known to be complete as well."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a new environment with NumPy, ml_dtypes, the wheel, and no other package.

    The two dependencies are linked from where the tests run, so that no network is needed; pip still checks them.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=os.name != "nt")
    link_packages(folder, "numpy", "ml_dtypes")
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-index", wheel, cwd=folder)
    run(sys.executable, "-m", "pip", "--python", python, "check", cwd=folder)
    return folder


def link_packages(environment: Path, *names: str) -> None:
    """Make packages of this environment, and what they require, visible in another one."""
    base = {"base": str(environment), "platbase": str(environment)}
    site_packages = Path(sysconfig.get_path("purelib", vars=base))
    for name in names:
        package = metadata.distribution(name)
        for top in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
            if not (site_packages / top).exists():
                (site_packages / top).symlink_to(str(package.locate_file(top)))
        requirements = map(Requirement, package.requires or [])
        link_packages(environment, *(r.name for r in requirements if r.marker is None or r.marker.evaluate()))


def test_wheel_and_checkout_have_the_same_files(wheel: Path) -> None:
    in_wheel = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("cupy_router/")}
    package = [path for path in (ROOT / "cupy_router").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    kernels = {
        f"cupy_router/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*") if path.is_file()
    }
    assert in_wheel == {path.relative_to(ROOT).as_posix() for path in package} | kernels
    assert {"cupy_router/py.typed", "cupy_router/__init__.pyi", "cupy_router/data/minilm_router.npz"} <= in_wheel
    assert {"cupy_router/kernels/topk_select.cu", "cupy_router/kernels/device/types.cuh"} <= in_wheel


def test_wheel_has_the_package_and_nothing_beside_it(wheel: Path) -> None:
    """No tests, benchmarks or examples, which would be modules of everybody's environment."""
    version = metadata_of(wheel)["Version"]
    folders = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert folders == {"cupy_router", f"cupy_router-{version}.dist-info"}


def test_the_citation_is_of_this_package(wheel: Path) -> None:
    entries = dict(re.findall(r"^([\w-]+): (.+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.M))
    about = metadata_of(wheel)
    assert (entries["version"], entries["license"]) == (about["Version"], about["License-Expression"])
    assert entries["abstract"].strip('"') == about["Summary"]
    listed = (ROOT / "CITATION.cff").read_text("utf-8").partition("keywords:\n")[2]
    assert sorted(re.findall(r"^  - (.+)$", listed, re.M)) == sorted(about["Keywords"].split(","))


def test_classified_pythons_were_tried(wheel: Path) -> None:
    pythons = re.findall(r"Python :: (3\.\d+)", "\n".join(metadata_of(wheel).get_all("Classifier", [])))
    assert pythons == json.loads((ROOT / "cupy_router/data/tried_versions.json").read_text())["python"]


def test_wheel_carries_licence_and_notice(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.rpartition("/")[2] for name in names if "/licenses/" in name} == {"LICENSE", "NOTICE"}


def metadata_of(wheel: Path) -> Message:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(archive.read(name).decode())


LINK = re.compile(r"\]\(([^)]*)\)")


def test_every_link_of_the_metadata_is_absolute(wheel: Path) -> None:
    """An index page shows the README without the files beside it."""
    about = metadata_of(wheel)
    links = LINK.findall(about.get_payload()) + [url.split(", ")[1] for url in about.get_all("Project-URL", [])]
    assert all(link.startswith("https://") for link in links)
    assert about.get_payload().startswith("# cupy_router\n")
    assert about["Description-Content-Type"] == "text/markdown"


def test_with_an_address_the_links_lead_to_the_files_of_the_release(tmp_path: Path) -> None:
    hook = hatch_build.Metadata(str(ROOT), {"repository": "https://host/owner/name"})
    about: dict[str, Any] = {"version": "1.2"}
    hook.update(about)
    files = "https://host/owner/name/blob/v1.2/"
    links = LINK.findall(about["readme"]["text"])
    assert links
    for link in [*links, about["urls"]["Changelog"]]:
        assert (ROOT / re.split("[#?]", link.removeprefix(files))[0]).exists(), link
    assert about["urls"]["Source"] == "https://host/owner/name"
    given = "![p](q.svg)\n\n[a](b.md#c), [d](https://e), [f](#g)"
    assert hatch_build.description(given, "") == "a, [d](https://e), [f](#g)"
    assert hatch_build.description(given, "https://h").startswith(
        "![p](https://h/q.svg?raw=true)\n\n[a](https://h/b.md#c)"
    )


def test_demo_and_info_run_from_the_wheel(environment: Path, tmp_path: Path) -> None:
    command = environment / "bin" / "cupy-router"
    assert "FAILED" not in run(command, "demo", cwd=tmp_path)
    printed = run(command, "info", cwd=tmp_path)
    assert f"kernels   {environment}" in printed
    assert "No module named 'cupy'" in printed


def test_doctor_runs_from_the_wheel(environment: Path, tmp_path: Path) -> None:
    code = "import sys; from cupy_router import cli; sys.exit(cli.main(['doctor', '--json']) != 1)"
    found = json.loads(run(environment / "bin" / "python", "-c", code, cwd=tmp_path))
    results = {check["name"]: check for check in found["checks"]}
    assert "tried" in results["numpy"]["found"]
    assert results["cupy"]["found"].startswith("not installed")
    assert (found["kernels_run"], results["torch"]["found"]) == (False, "not installed")
    assert not [check for check in found["checks"] if "check failed" in check["found"]]


NVRTC = [dist.metadata["Name"] for dist in metadata.distributions() if "cuda-nvrtc" in str(dist.metadata["Name"])]


@pytest.mark.skipif(device.why_not() is not None or not NVRTC, reason="there is no g++ or no wheel of NVRTC here")
def test_check_runs_from_the_wheel_without_a_gpu(environment: Path, tmp_path: Path) -> None:
    link_packages(environment, NVRTC[0])
    command = environment / "bin" / "cupy-router"
    printed = run(command, "check", "update_bias", cwd=tmp_path)
    assert "1 case executed on the CPU, equal to the reference\nAll is well." in printed
    run(command, "check", "--copy", tmp_path / "mine", cwd=tmp_path)
    path = tmp_path / "mine" / "update_bias.cu"
    path.write_text(path.read_text().replace("total > scaled ? rate", "total > scaled ? 1.0001f * rate", 1))
    code = f"import sys; from cupy_router import cli; sys.exit(cli.main(['check', {str(path)!r}]) != 1)"
    printed = run(environment / "bin" / "python", "-c", code, cwd=tmp_path)
    assert "FAULT update_bias, centred\n      result[" in printed
    assert f"\n      {path}:" in printed


def test_wheel_reads_its_own_kernels(environment: Path, tmp_path: Path) -> None:
    code = "from cupy_router import compiler as c; print(c.kernel_folders()[0]); print(c.expand('topk_select'))"
    folder, text = run(environment / "bin" / "python", "-c", code, cwd=tmp_path).split("\n", 1)
    assert Path(folder).is_relative_to(environment)
    assert 'extern "C" __global__' in text


def test_tests_of_the_ops_pass_from_the_wheel(environment: Path, tmp_path: Path) -> None:
    link_packages(environment, "pytest", "hypothesis")
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.copytree(ROOT / "docs", tmp_path / "docs")  # test_method.py reads the table of fields
    where = "import cupy_router; print(cupy_router.__file__)"
    assert Path(run(environment / "bin" / "python", "-c", where, cwd=tmp_path)).is_relative_to(environment)
    files = [f"tests/test_{stem}.py" for stem in ("activation_topk", "hash_router", "topk_select", "method")]
    printed = run(environment / "bin" / "python", "-m", "pytest", "-q", "-k", SUBSET, *files, cwd=tmp_path)
    passed = re.search(r"^(\d+) passed", printed, re.M)
    assert passed is not None
    assert int(passed[1]) >= 100
