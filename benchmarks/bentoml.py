"""The other half of the comparisons: `bentoml build`, `bentoml containerize --backend buildah`, `buildah push`.

The same service code, the same locked requirements, the same base image, the same registry, the same model. Everything
else is what BentoML does by itself.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.parts import Failed, buildah_environment, needs, run

_IMAGE = ", image=serving.image(__file__)"


@dataclass(frozen=True)
class Pod:
    """A place to build in: a Bento store and a buildah storage. A new one is what a fresh build pod has: nothing."""

    folder: Path
    host: str
    base: str
    kinds: Path

    def build(self, model: Path, ref: str) -> tuple[float, dict[str, float]]:
        """Build, containerize and push a LightGBM model; (seconds in all, seconds of each step)."""
        needs("buildah")
        project = self._project(model)
        env = buildah_environment(self.folder / "storage", self.host)
        env["BENTOML_HOME"] = str(self.folder / "bentoml")
        bentoml = Path(sys.executable).with_name("bentoml")
        told, building = run([bentoml, "build", project, "--output", "tag"], env=env)
        tag = told.strip().splitlines()[-1].removeprefix("__tag__:")
        argv = [str(bentoml), "containerize", tag, "--backend", "buildah", "-t", ref, *_trust()]
        _, containerizing = run(argv, env=env)
        # BentoML ends with success when buildah failed: the push tells
        _, pushing = run(["buildah", "push", "--quiet", ref], env=env)
        steps = {"bentoml build": building, "bentoml containerize": containerizing, "buildah push": pushing}
        return sum(steps.values()), steps

    def _project(self, model: Path) -> Path:
        """A BentoML project as its documentation has it: bentofile.yaml with requirements, package and base image."""
        project = self.folder / "project"
        shutil.rmtree(project, ignore_errors=True)
        project.mkdir(parents=True)
        kind = self.kinds / "lightgbm"
        code = (kind / "service.py").read_text()
        if code.count(_IMAGE) != 1:
            raise Failed("the LightGBM kind's service has no image of its own that could be taken out")
        (project / "service.py").write_text(code.replace(_IMAGE, ""))
        shutil.copyfile(kind / "requirements.txt", project / "requirements.txt")
        shutil.copytree(self.kinds / "serving", project / "bentos" / "serving")
        shutil.copyfile(self.kinds / "__init__.py", project / "bentos" / "__init__.py")
        shutil.copytree(model, project / "model")
        described = {
            "service": "service:LightGBM",
            "name": "churn",
            "include": ["service.py", "bentos/**", "model/**"],
            "python": {"requirements_txt": "requirements.txt"},
            "docker": {"base_image": self.base},
        }
        (project / "bentofile.yaml").write_text(json.dumps(described))  # JSON is YAML
        return project


def _trust() -> list[str]:
    """Where this machine trusts an authority of its own, the steps inside the image must know it too."""
    file = os.environ.get("SSL_CERT_FILE")
    if not file or not Path(file).is_file():
        return []
    inside = "/etc/ssl/certs/ca-certificates.crt"
    options = [f"volume={Path(file).resolve()}:{inside}:ro"]
    options += [f"env={name}={inside}" for name in ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE")]
    return [word for option in options for word in ("--opt", option)]
