"Runs the app under uvicorn with the options it was measured with."

import ipaddress
import os

from serving.logs import configure, event

APP = "serving.app:create_app"
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def _is_loopback(host: str) -> bool:
    try: return ipaddress.ip_address(host).is_loopback
    except ValueError: return host == "localhost"


def serve(host: str = "127.0.0.1", port: int = 8000, workers: int = 1) -> None:
    """Serve until SIGTERM or Ctrl-C; requests in progress are finished.

    Settings come from the environment, which the workers inherit; a wrong one raises `UsageError`.
    """
    for name in ONE_THREAD: os.environ.setdefault(name, "1")  # a second thread for a millisecond's work lengthens the tail; scale by workers
    import uvicorn

    from serving.config import get_serve_settings
    from shopai.core.artifacts import ModelStore

    configure(get_serve_settings().log_level)
    ModelStore.from_settings()  # a wrong address is the caller's mistake: said here in one line, not by each worker in a traceback
    if not _is_loopback(host):
        event("warning", "the API has no access control yet and listens beyond this machine; put a gateway in front of it", host=host)
    uvicorn.run(APP, factory=True, host=host, port=port, workers=workers, access_log=False, log_level="warning", server_header=False,
                timeout_graceful_shutdown=10)
