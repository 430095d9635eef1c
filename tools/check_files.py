"""Refuse a file that is too large for the repository or holds a merge conflict. Usage: python tools/check_files.py FILE…"""

import re
import sys
from pathlib import Path

LARGEST = 1_000_000  # bytes
# Git leaves bare marker lines. nbdev's merge driver keeps the notebook valid instead: the markers are Markdown cells of their own, in backticks.
CONFLICT = re.compile(rb'^\s*"?`?(?:<{7}|>{7})[ \t]', re.MULTILINE)


def complaint(path: Path) -> str | None:
    "What is wrong with the file, or None."
    if path.stat().st_size > LARGEST: return f"{path}: {path.stat().st_size:,} bytes, more than {LARGEST:,}"
    content = path.read_bytes()
    if (found := CONFLICT.search(content)) is None: return None
    line = content.count(b"\n", 0, found.start()) + 1
    return f"{path}:{line}: a merge conflict is left"


if __name__ == "__main__":
    complaints = [text for name in sys.argv[1:] if (text := complaint(Path(name)))]
    sys.exit("\n".join(complaints) or 0)
