"""Refuse distributions that hold more than the library, or less."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
BESIDE = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "pyproject.toml"}
MADE = {"PKG-INFO", ".gitignore"}  # hatchling adds them


def files_of_the_library() -> set[str]:
    """What git knows of the library."""
    listed = subprocess.run(
        ["git", "ls-files", "jaxprune"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return set(listed.stdout.split())


def differences(found: set[str], wanted: set[str]) -> list[str]:
    return [f"+ {name}" for name in sorted(found - wanted)] + [
        f"- {name}" for name in sorted(wanted - found)
    ]


def main(folder: Path) -> int:
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    library = files_of_the_library()
    names = zipfile.ZipFile(wheel).namelist()
    info = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    with tarfile.open(source) as archive:
        inside = {member.name.partition("/")[2] for member in archive if member.isfile()}
    wrong = {
        wheel: differences(set(names) - info, library),
        source: differences(inside - MADE, library | BESIDE),
    }
    for path, lines in wrong.items():
        print(f"{path.name}: {path.stat().st_size:,} bytes", *lines, sep="\n  ")
    print(f"{len(library)} files of the library; {', '.join(sorted(info))}")
    return any(wrong.values())


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
