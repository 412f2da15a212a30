"""A user's own Bento project (format `bento-project`)."""

from __future__ import annotations

from builder_image import bento, model
from builder_image.installer import Tools
from builder_image.spec import BuildSpec
from registry.errors import UserError


def recipe(spec: BuildSpec, found: model.Model, tools: Tools) -> bento.Recipe:
    raise UserError("not_implemented", "projects cannot be built yet")
