"""Settings of the service: environment variables with the prefix EKIBEN_, one frozen object.

With nothing set, everything lives under one state folder and the service listens on loopback.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from build_service.headers import CREDENTIALS, Network
from build_service.kubernetes.settings import ClusterSettings

MIB = 1024 * 1024
GIB = 1024 * MIB

_PACKAGE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
_CLAIM = re.compile(r"[a-z0-9](?:[-a-z0-9.]{0,61}[a-z0-9])?")


def _installed_kinds() -> Path:
    """The `bentos` folder, found without importing it: kinds are data to this service."""
    spec = importlib.util.find_spec("bentos")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("the package 'bentos' is not installed: install the distribution ekiben-server whole")
    return Path(next(iter(spec.submodule_search_locations)))


def _content(file: Path | None) -> str | None:
    return None if file is None else file.read_text().strip()


DEFAULT_MAX_UPLOADS = 64
DEFAULT_MAX_CALLER_UPLOADS = 16
DEFAULT_MAX_FORM_PARTS = 1000
DEFAULT_MIN_UPLOAD_RATE = 1024  # bytes a second
DEFAULT_MAX_RECOGNITION_MEMORY = 384 * MIB
DEFAULT_MAX_RECOGNITION_SECONDS = 20.0


class Settings(ClusterSettings):
    model_config = SettingsConfigDict(env_prefix="EKIBEN_", frozen=True, extra="ignore", hide_input_in_errors=True)

    home: Path = Field(Path("~/.ekiben"), description="State folder: database, objects, environments, logs.")
    host: str = Field("127.0.0.1", description="Address to listen on. Other than loopback needs a token.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    public_url: str | None = Field(
        None, description="URL under which clients reach the service, for links; default http://localhost:PORT."
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Hosts that requests may name besides loopback's own and that of public_url; comma separated.",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Origins that may call /inference from a browser, such as https://shop.example; comma separated.",
    )
    pass_headers: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Credentials of callers that models get too, of authorization and cookie; comma separated. Without "
        "it a token ends at this service, or in a cluster at the model's pod.",
    )
    trusted_proxies: Annotated[tuple[str, ...] | None, NoDecode] = Field(
        None,
        description="Addresses or networks of proxies whose X-Forwarded-… models get, such as 127.0.0.1,10.0.0.0/8; "
        "comma separated. Default: none; on Kubernetes every caller, as its NetworkPolicy lets proxies alone call.",
    )
    database: str | None = Field(None, description="SQLAlchemy URL; default a SQLite file in the state folder.")
    platform: Literal["local", "kubernetes"] = Field("local", description="Where builds and deployments run.")
    kinds: Path = Field(default_factory=_installed_kinds, description="Folder of kinds.")
    run_code: bool | None = Field(
        None, description="Accept projects with code of their own; default: only when listening on loopback."
    )
    allowed_packages: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Packages that requirements of a model may name although code of users does not run, in any "
        "version and with what they need themselves, such as torch; names, comma separated.",
    )
    token: str | None = Field(None, description="A first administrator's token; further ones: `ekiben token create`.")

    s3_endpoint: str | None = Field(
        None, description="URL of an S3 service that keeps the objects, such as https://minio.example:9000; "
        "default: a folder below the state folder.",
    )  # fmt: skip
    s3_bucket: str = Field("ekiben", description="Bucket of this installation alone; made if it is not there.")
    s3_access_key: str | None = Field(
        None, description="Access key; default: AWS_*, MINIO_*, ~/.aws/credentials or the machine's role."
    )
    s3_secret_key: SecretStr | None = Field(None, description="Its secret key.")
    s3_access_key_file: Path | None = Field(None, description="File with the access key, instead of the key.")
    s3_secret_key_file: Path | None = Field(None, description="File with the secret key, instead of the key.")
    s3_region: str | None = Field(None, description="Region of the bucket; default: asked for.")
    s3_ca: Path | None = Field(
        None, description="PEM file of the authority that signed the S3 service's certificate; default: the machine's."
    )
    s3_presign_endpoint: str | None = Field(
        None, description="URL of the same S3 service as builds reach it, where it differs from S3_ENDPOINT."
    )
    s3_part_size: int = Field(
        16 * MIB, ge=5 * MIB, le=GIB, description="Bytes of an upload's first parts; later ones grow with the object."
    )
    stale_upload_seconds: float = Field(
        86400, gt=0, description="Time after which an unfinished upload that stands still is deleted, in seconds."
    )

    max_upload: int = Field(64 * GIB, gt=0, description="Bytes of one upload, after unpacking too.")
    max_files: int = Field(10_000, gt=0, description="Files of one version.")
    max_field: int = Field(MIB, gt=0, description="Bytes of one form field (sample, expected, requirements).")
    upload_idle_seconds: float = Field(
        60, gt=0, description="Time an upload may stand still before it is given up, in seconds."
    )
    min_upload_rate: int = Field(
        DEFAULT_MIN_UPLOAD_RATE, ge=0, description="Bytes a second that an upload must carry over that time; 0: none.",
    )  # fmt: skip
    max_uploads: int = Field(DEFAULT_MAX_UPLOADS, gt=0, description="Uploads under way at the same moment.")
    max_caller_uploads: int = Field(
        DEFAULT_MAX_CALLER_UPLOADS, gt=0, description="The same of one caller: a token, or an address where none is "
        "needed. More wait for EKIBEN_UPLOAD_IDLE_SECONDS, then get 429.",
    )  # fmt: skip
    max_form_parts: int = Field(
        DEFAULT_MAX_FORM_PARTS, gt=0, description="Parts of an upload's form; more files go into one archive.",
    )  # fmt: skip
    recognition_memory: int = Field(
        DEFAULT_MAX_RECOGNITION_MEMORY, ge=64 * MIB, description="Bytes of memory of the process that examines an "
        "upload: what it is, and what an archive holds.",
    )  # fmt: skip
    recognitions_at_once: int = Field(
        4, gt=0, description="Uploads that are examined side by side, half of them of one caller; others wait in turn."
    )
    recognition_seconds: float = Field(
        DEFAULT_MAX_RECOGNITION_SECONDS, gt=0, description="CPU time that it may take, in seconds; one second more for "
        "each 8 MiB of the upload.",
    )  # fmt: skip
    min_free_disk: int = Field(
        256 * MIB, ge=0, description="Bytes that must stay free on the state folder's disk; below, uploads answer 507."
    )

    builds_at_once: int = Field(2, gt=0, description="Builds that run side by side.")
    build_seconds: float = Field(1800, gt=0, description="Longest time of one attempt of a build, in seconds.")
    build_memory: int = Field(4 * GIB, gt=0, description="Resident bytes of a build's processes together.")
    build_environment: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Names of this service's environment variables that builds see too, besides those of proxies, "
        "certificates, uv and the like; comma separated.",
    )
    build_attempts: int = Field(3, gt=0, description="Attempts of a build that fails for want of infrastructure.")
    ready_seconds: float = Field(
        120, gt=0, description="Time a new revision has from its start to its golden sample, in seconds."
    )
    kind_folders: dict[str, str] = Field(
        default_factory=dict, description='Folder of the operator\'s that models of a kind may read, as JSON: '
        '{"cargo": "/srv/pictures"}; on Kubernetes the name of a PersistentVolumeClaim in the models\' namespace.'
    )  # fmt: skip
    drain_seconds: float = Field(30, gt=0, description="Time an old process has to finish its requests, in seconds.")
    leave_seconds: float = Field(
        0, ge=0, description="Time after the signal to end in which /readyz says no and calls are still taken, until "
        "proxies have heard, in seconds. A second signal ends it.",
    )  # fmt: skip
    isolation: Literal["auto", "required", "off"] = Field(
        "auto", description="Whether models' processes are kept from the state folder, from this service and from each "
        "other: as far as the system can; required: refuse to start where it cannot; off.",
    )  # fmt: skip
    readable_folders: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Folders that models' processes may read besides the system's and their own; comma separated.",
    )
    log_bytes: int = Field(
        16 * MIB, ge=64 * 1024, description="Bytes of each log that are kept: a process's, a build's, this service's."
    )
    keep_revisions: int = Field(
        10, gt=1, description="Revisions of a deployment that are kept, the live one included: a roll-back returns to "
        "these without a build.",
    )  # fmt: skip

    sweep_seconds: float = Field(
        600, gt=0, description="Time between two looks for what nobody needs any more, in seconds."
    )
    sweep_grace_seconds: float = Field(
        3600, ge=0, description="Time that what nobody needs any more stays nevertheless, in seconds."
    )
    keep_cache_seconds: float = Field(
        30 * 86400, ge=0, description="Time that environments, Bentos and image layers stay which no deployment needs "
        "but which make builds fast, in seconds after their last use.",
    )  # fmt: skip

    inference_body: int = Field(64 * MIB, gt=0, description="Bytes of one inference request's body.")
    inference_seconds: float = Field(60, gt=0, description="Longest time of one inference request, in seconds.")

    mlflow: bool = Field(True, description="Project versions into MLflow's registry.")
    mlflow_uri: str | None = Field(None, description="MLflow's store; default a SQLite file in the state folder.")

    @field_validator(
        "allowed_hosts", "allowed_packages", "cors_origins", "pass_headers", "trusted_proxies", "build_environment",
        "readable_folders", mode="before",
    )  # fmt: skip
    @classmethod
    def _separated(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("allowed_packages")
    @classmethod
    def _packages(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if _PACKAGE.fullmatch(name) is None:
                raise ValueError(f"allowed packages are names without versions, such as torch, not {name!r}")
        return value

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            parts = urlsplit(origin)
            if (
                parts.scheme not in ("http", "https")
                or not parts.netloc
                or origin != f"{parts.scheme}://{parts.netloc}"
            ):
                raise ValueError(f"{origin!r} is no origin: use for instance https://shop.example")
        return value

    @field_validator("pass_headers")
    @classmethod
    def _credentials(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        known = sorted(name.decode() for name in CREDENTIALS)
        for name in value:
            if name.lower() not in known:
                raise ValueError(f"{name!r} cannot be passed on: use {' and '.join(known)}; other headers always are")
        return tuple(sorted({name.lower() for name in value}))

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for network in value or ():
            try:
                ipaddress.ip_network(network)
            except ValueError:
                raise ValueError(f"{network!r} is no address or network: use for instance 10.0.0.0/8") from None
        return value

    @field_validator("readable_folders")
    @classmethod
    def _absolute(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for folder in value:
            if not Path(folder).is_absolute():
                raise ValueError(f"{folder!r} must be an absolute path, for instance /srv/models")
        return value

    @field_validator("public_url")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        if value is not None and (urlsplit(value).scheme not in ("http", "https") or not urlsplit(value).netloc):
            raise ValueError(f"{value!r} is no URL: use for instance https://ekiben.example")
        return value

    @field_validator("s3_endpoint", "s3_presign_endpoint")
    @classmethod
    def _endpoint(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
            raise ValueError("it is no URL such as https://minio.example:9000 (keys have settings of their own)")
        if parts.path.strip("/") or parts.query or parts.fragment:
            raise ValueError("it has a path: the bucket's name goes into EKIBEN_S3_BUCKET")
        return f"{parts.scheme}://{parts.netloc}"

    @field_validator("s3_bucket")
    @classmethod
    def _bucket(cls, value: str) -> str:
        if re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", value) is None or ".." in value:
            raise ValueError("a bucket's name is 3 to 63 of a-z, 0-9, '-' and '.', a letter or digit first and last")
        return value

    @field_validator("database")
    @classmethod
    def _database(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            url = make_url(value)
        except ArgumentError:
            raise ValueError("it is no SQLAlchemy URL, such as postgresql+psycopg://user@host/ekiben") from None
        # libpq would look the variable up for every connection, but the service forgets it after its start.
        if url.get_backend_name() == "postgresql" and not url.password and (password := os.environ.get("PGPASSWORD")):
            return url.set(password=password).render_as_string(hide_password=False)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if "max_field" in self.model_fields_set and self.max_field > self.max_upload:
            raise ValueError("EKIBEN_MAX_FIELD is larger than EKIBEN_MAX_UPLOAD, of which a field is a part")
        if self.mlflow_uri is not None and not self.mlflow:
            raise ValueError("EKIBEN_MLFLOW_URI is set although EKIBEN_MLFLOW=false: take one of them away")
        self._check_s3()
        self._check_folders()
        if self.platform == "kubernetes":
            faults = self.cluster_faults()
            if self.s3_endpoint is None:
                faults.append("EKIBEN_PLATFORM=kubernetes needs EKIBEN_S3_ENDPOINT: pods fetch models from an S3 store")
            if faults:
                raise ValueError("; ".join(faults))
        # In a cluster tokens are made by `ekiben-server token create`; until there is one, nobody comes in.
        if not self.loopback and not self.token and self.platform == "local":
            raise ValueError(
                f"EKIBEN_HOST={self.host} is reachable from other machines, so EKIBEN_TOKEN must be set "
                "(for instance to the output of `openssl rand -hex 32`)"
            )
        return self

    def _check_folders(self) -> None:
        for kind, named in self.kind_folders.items():
            if self.platform == "local" and not (Path(named).is_absolute() and Path(named).is_dir()):
                raise ValueError(f"EKIBEN_KIND_FOLDERS: {named!r}, for {kind}, is no absolute path of a folder")
            if self.platform == "kubernetes" and not _CLAIM.fullmatch(named):
                raise ValueError(f"EKIBEN_KIND_FOLDERS: {named!r}, for {kind}, is no name of a PersistentVolumeClaim")

    def _check_s3(self) -> None:
        if self.s3_endpoint is None:
            alone = sorted(name for name in self.model_fields_set if name.startswith("s3_") and name != "s3_endpoint")
            if alone:
                raise ValueError(f"EKIBEN_{alone[0].upper()} is set, but EKIBEN_S3_ENDPOINT, which uses it, is not")
            return
        for key in ("access_key", "secret_key"):
            if getattr(self, f"s3_{key}") is not None and getattr(self, f"s3_{key}_file") is not None:
                raise ValueError(
                    f"EKIBEN_S3_{key.upper()} and EKIBEN_S3_{key.upper()}_FILE are both set: take one away"
                )
        given = [getattr(self, f"s3_{key}") or getattr(self, f"s3_{key}_file") for key in ("access_key", "secret_key")]
        if (given[0] is None) != (given[1] is None):
            raise ValueError("only one of EKIBEN_S3_ACCESS_KEY and EKIBEN_S3_SECRET_KEY is set: they go together")
        for file in (self.s3_access_key_file, self.s3_secret_key_file, self.s3_ca):
            if file is not None and not file.is_file():
                raise ValueError(f"there is no file {file}, which an EKIBEN_S3_… setting names")
        urls = [url for url in (self.s3_endpoint, self.s3_presign_endpoint) if url is not None]
        if self.s3_ca is not None and not any(url.startswith("https:") for url in urls):
            raise ValueError("EKIBEN_S3_CA is set, but EKIBEN_S3_ENDPOINT is no https URL")

    @property
    def s3_keys(self) -> tuple[str, SecretStr] | None:
        """Access and secret key as they are now: a file that was replaced is read again."""
        access = self.s3_access_key or _content(self.s3_access_key_file)
        secret = self.s3_secret_key.get_secret_value() if self.s3_secret_key else _content(self.s3_secret_key_file)
        return (access, SecretStr(secret)) if access and secret else None

    @property
    def loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def needs_own_token(self) -> bool:
        """Whether the service makes a token of its own, as anybody on the machine may call it."""
        return self.loopback and self.token is None

    @property
    def trusted_networks(self) -> tuple[Network, ...]:
        named = self.trusted_proxies
        if named is None:
            named = ("0.0.0.0/0", "::/0") if self.platform == "kubernetes" else ()
        return tuple(ipaddress.ip_network(network) for network in named)

    @property
    def root(self) -> Path:
        return self.home.expanduser().absolute()

    @property
    def allow_code(self) -> bool:
        return self.loopback if self.run_code is None else self.run_code

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite:///{self.root / 'ekiben.db'}"

    @property
    def tracking_uri(self) -> str:
        return self.mlflow_uri or f"sqlite:///{self.root / 'mlflow.db'}"
