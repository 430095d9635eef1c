"`python -m serving`: what `shopai serve` starts, and what a container runs."

import argparse
import sys

from serving.server import serve
from shopai.core.config import UsageError


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m serving", description="Serve the champion models over HTTP; settings come from SHOPAI_* variables.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="processes, one inference thread each (default: %(default)s)")
    try: serve(**vars(parser.parse_args()))
    except UsageError as error: sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
