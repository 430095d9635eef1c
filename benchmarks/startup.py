"""How long a user waits before anything happens: `import shopai`, `shopai --help`, and `import torch` beside them.

    python benchmarks/startup.py

Each command runs in a fresh process, the three in turn; the figure is the median.
"""

import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from shopai.core.files import write_json

RESULT = Path(__file__).parent / "results" / "startup.json"
HELP = "import sys; sys.argv = ['shopai', '--help']; from shopai.cli import main; main()"
COMMANDS = {"import shopai": ["-c", "import shopai"], "shopai --help": ["-c", HELP], "import torch": ["-c", "import torch"]}


def seconds(arguments: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    for arguments in COMMANDS.values(): seconds(arguments)  # once for the file cache
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(9):
        for name, arguments in COMMANDS.items(): times[name].append(seconds(arguments))
    medians = {name: round(statistics.median(values), 3) for name, values in times.items()}
    write_json(RESULT, {"command": "python benchmarks/startup.py", "measured": datetime.now(UTC).isoformat(timespec="seconds"),
                        "machine": f"{os.cpu_count()} cores, Python {platform.python_version()}", "median_seconds": medians})
    for name, value in medians.items(): print(f"{name:16} {value:.3f} s")


if __name__ == "__main__":
    main()
