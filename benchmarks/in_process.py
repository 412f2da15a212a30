"""The service as it was before uploads were examined in children: what an ordinary upload is compared with.

    python -m benchmarks.in_process

Everything else is the same code, so that the difference of two uploads is the child's. Settings are EKIBEN_ variables.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys

import uvicorn

from build_service.app import create_app
from build_service.recognition import InProcess
from build_service.settings import Settings


def main() -> int:
    settings = Settings()
    with socket.create_server((settings.host, settings.port), backlog=2048) as listening:
        application = create_app(
            settings, port=listening.getsockname()[1], environment=dict(os.environ), examine=InProcess
        )
        config = uvicorn.Config(application, log_config=None, access_log=False)
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(uvicorn.Server(config).serve(sockets=[listening]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
