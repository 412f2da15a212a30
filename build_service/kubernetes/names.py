"""Every name that this program and a cluster share: one table, used by manifests, selectors and Roles alike."""

from __future__ import annotations

MANAGER = "ekiben"  # field manager of every write

MANAGED_BY = "app.kubernetes.io/managed-by"
DEPLOYMENT = "ekiben.dev/deployment"
VARIANT = "ekiben.dev/variant"
MODEL = "ekiben.dev/model"
VERSION = "ekiben.dev/version"
REVISION = "ekiben.dev/revision"
BUILD = "ekiben.dev/build"
ATTEMPT = "ekiben.dev/attempt"
FORGOTTEN = "ekiben.dev/forgotten"  # a finished Job that its build does not ask about any more
REACHABLE = "ekiben.dev/reachable-by-builds"  # on pods of the registry and the store, when they run in the cluster

APPLIED = "ekiben.dev/applied"  # annotation: digest of what was applied
MAKING = "ekiben.dev/making"  # annotation of pods: which making of their image they are to pull
FENCE = "ekiben.dev/fence"  # annotation: fencing token of the lease that it was applied under

OURS = {MANAGED_BY: MANAGER}
SELECTOR = f"{MANAGED_BY}={MANAGER}"
MAIN = "main"  # the only variant today

CONTAINER = "model"
PORT = 3000
PORT_NAME = "http"
SERVICE_PORT = 80

STEPS = ("fetch", "inspect", "assemble")
WORK = "/build"
AUTH = "/etc/ekiben"
PULL_AUTH, PUSH_AUTH = f"{AUTH}/pull", f"{AUTH}/push"
CA_FOLDER = "/etc/ekiben/ca"
CA_FILE = f"{CA_FOLDER}/ca.crt"
TOKENS_CONFIGMAP = "ekiben-inference-tokens"
TOKENS_FOLDER = "/etc/ekiben/tokens"
KIND_FOLDER = "/srv/ekiben"
TOKENS_FILE = f"{TOKENS_FOLDER}/sha256"
# A dot is in the name of no deployment, nor in what `of` makes of one.
DEFAULT_ROUTE = "ekiben.default"
BUILDS_POLICY = "ekiben-builds"  # no object of a deployment is in the builds' namespace
SUFFIX = "-ekiben"

# Exit codes of a build's step (docs/design.md §7).
EXIT_USER, EXIT_INFRASTRUCTURE, EXIT_LIMIT = 2, 3, 4
# Exit codes of a model that refuses to start (docs/design.md §6).
REFUSED_TO_START = {
    10: "golden_sample_failed",
    11: "digest_mismatch",
    12: "model_load_failed",
    13: "service_import_failed",
}


def of(kind: str, deployment: str) -> str:
    """Return the name of a deployment's object of this kind. Only the Deployment has the name that the user chose:
    `kubectl rollout status deploy/NAME` is a promise. What else has that name is not the service's."""
    return deployment if kind == "Deployment" else f"{deployment}{SUFFIX}"


def job(build: str, attempt: int) -> str:
    return f"{build}-{attempt}"
