"""What is served: one folder a kind, and `bentos.serving`, which every kind shares.

A Bento carries the packages it needs under `src/bentos/…`, so several portions of this package may be on the path.
"""

from pkgutil import extend_path

__path__ = extend_path(__path__, __name__)
