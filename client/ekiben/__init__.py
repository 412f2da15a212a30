"""Client of Ekiben: hand it a trained model, get a running endpoint back.

    import ekiben
    deployment = ekiben.push(model, name="churn", sample=X_test[:100])
    deployment.predict(X_test)

Names are imported when they are first used, so that `import ekiben` and the command line start at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ekiben._client import Client as Client
    from ekiben._deployment import Deployment as Deployment
    from ekiben._errors import ApiError as ApiError
    from ekiben._errors import Conflict as Conflict
    from ekiben._errors import EkibenError as EkibenError
    from ekiben._errors import ExportError as ExportError
    from ekiben._errors import Invalid as Invalid
    from ekiben._errors import NotFound as NotFound
    from ekiben._errors import RolloutFailed as RolloutFailed
    from ekiben._errors import ServerFault as ServerFault
    from ekiben._errors import StartError as StartError
    from ekiben._errors import StillWorking as StillWorking
    from ekiben._errors import Unauthorized as Unauthorized
    from ekiben._errors import Unreachable as Unreachable
    from ekiben._errors import UsageError as UsageError
    from ekiben._errors import VersionFailed as VersionFailed
    from ekiben._push import push as push

__version__ = "0.1.0"

_HOMES = {
    "Client": "_client",
    "Deployment": "_deployment",
    "push": "_push",
    **dict.fromkeys(
        (
            "ApiError", "Conflict", "EkibenError", "ExportError", "Invalid", "NotFound", "RolloutFailed",
            "ServerFault", "StartError", "StillWorking", "Unauthorized", "Unreachable", "UsageError", "VersionFailed",
        ),
        "_errors",
    ),
}  # fmt: skip

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        value = getattr(importlib.import_module(f"ekiben.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'ekiben' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
