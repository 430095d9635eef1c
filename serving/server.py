"Runs the app under uvicorn with the options it was measured with."

import ipaddress
import os
import socket

from serving.logs import UVICORN, configure, event
from shopai.core.config import UsageError, get_settings

APP = "serving.app:create_app"
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def _is_loopback(host: str) -> bool:
    try: return ipaddress.ip_address(host).is_loopback
    except ValueError: return host == "localhost"


def _check_free(host: str, port: int) -> None:
    "Raise `UsageError` if nothing can listen there: uvicorn would say so only after the model is loaded."
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except (OSError, OverflowError) as error: raise UsageError(f"host and port: can't listen on {host}:{port}: {error}") from None


def serve(host: str = "127.0.0.1", port: int = 8000, workers: int = 1) -> None:
    """Serve until SIGTERM or Ctrl-C; requests in progress are finished.

    Settings come from the environment, which the workers inherit; a wrong one raises `UsageError`.
    """
    if workers < 1: raise UsageError(f"workers must be at least 1, got {workers}")
    for name in ONE_THREAD: os.environ.setdefault(name, "1")  # a second thread for a millisecond's work lengthens the tail; scale by workers
    import uvicorn

    from serving.config import get_serve_settings
    from shopai.core.artifacts import ModelStore
    from shopai.events.bus import open_bus
    from shopai.features.online import open_reader

    configure(get_serve_settings().log_level)
    _check_free(host, port)
    ModelStore.from_settings()  # a wrong address is the caller's mistake: said here in one line, not by each worker in a traceback
    open_bus(get_settings().bus_location).close()
    open_reader(get_settings().online_location, get_settings().feature_project).close()  # nothing is connected: a store may be away, or come later
    if not _is_loopback(host):
        event("warning", "the API has no access control yet and listens beyond this machine; put a gateway in front of it", host=host)
    uvicorn.run(APP, factory=True, host=host, port=port, workers=workers, access_log=False, log_config=UVICORN, log_level="warning",
                server_header=False, proxy_headers=False, timeout_graceful_shutdown=10)  # whom to believe about X-Forwarded-For is for our own setting to say
