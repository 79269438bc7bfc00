"""Writing a page of docs/ that is made from the code, or checking that it is up to date."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["write_page"]


def write_page(page: Path, fresh: str, script: str, about: str | None, arguments: list[str] | None) -> int:
    """Run `script`, whose help is `about`: write `fresh` to the page, or with `--check` compare; the exit status."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the page is out of date")
    check = parser.parse_args(arguments).check
    if page.is_file() and page.read_text(encoding="utf-8") == fresh:
        return 0
    if check:
        print(f"{script}: {page.name} is out of date: run python scripts/{script}.py", file=sys.stderr)
        return 1
    page.write_text(fresh, encoding="utf-8", newline="\n")
    return 0
