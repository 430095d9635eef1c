"`python -m serving`: what `shopai serve` starts. Exit codes: 0 done, 1 failed, 2 wrong use."

import argparse
import sys

from serving.server import serve
from shopai.core.config import UsageError


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m serving", description="Serve the champion models over HTTP.")
    options.add_argument("--host", default="127.0.0.1", help="address to listen on")
    options.add_argument("--port", type=int, default=8000, help="port to listen on")
    options.add_argument("--workers", type=int, default=1, help="processes, one inference thread each")
    given = options.parse_args()
    try:
        serve(given.host, given.port, given.workers)
    except UsageError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":  # a worker process imports this module again, and must not serve on its own
    main()
