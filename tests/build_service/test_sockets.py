"""The folder of serving processes' Unix sockets."""

from __future__ import annotations

import stat
from pathlib import Path

from build_service.routes import Upstream
from build_service.sockets import SocketFolder


def mode(path: Path | str) -> int:
    return stat.S_IMODE(Path(path).stat().st_mode)


def test_only_the_service_reaches_a_socket_however_long_the_state_folders_path_is(tmp_path: Path) -> None:
    short = Path("/tmp") / f"ekiben-test-{tmp_path.name}"
    for root in (short, tmp_path / ("x" * 100)):
        root.mkdir()
        folder = SocketFolder(root)
        bound, path = folder.bind()
        with bound:
            assert mode(root / "sockets") == 0o700
            assert mode(path) == 0o600
            again = SocketFolder(root)  # a service that was killed leaves its folder
            assert not Path(path).exists()
            assert (root / "sockets").is_symlink() == (root != short)
            other, path = again.bind()
            other.close()
            again.remove(Upstream(1, socket=path))
            again.remove(Upstream(1, socket=path))
            behind = (root / "sockets").resolve()
            assert list(behind.iterdir()) == []
            again.close()
            assert not behind.exists()
            assert list(root.iterdir()) == []
        root.rmdir()


def test_a_link_to_a_folder_of_others_is_not_followed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("precious")
    root = tmp_path / "root"
    root.mkdir()
    (root / "sockets").symlink_to(kept)
    SocketFolder(root).close()
    assert (kept / "file").read_text() == "precious"
