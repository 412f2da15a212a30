from __future__ import annotations

import hashlib
import threading

from hypothesis import given
from hypothesis import strategies as st

from builder_image.hashing import Sha256


@given(st.lists(st.binary(max_size=200)), st.sampled_from([0, 1 << 30]))
def test_the_digest_does_not_depend_on_how_the_bytes_are_cut_or_where_they_are_hashed(
    pieces: list[bytes], size: int
) -> None:
    found = Sha256(size)
    for piece in pieces:
        found.update(piece)
    assert found.hexdigest() == found.hexdigest() == hashlib.sha256(b"".join(pieces)).hexdigest()


def test_a_hash_that_is_given_up_leaves_no_thread() -> None:
    before = threading.active_count()
    given_up = Sha256(1 << 30)
    given_up.update(bytes(1 << 20))
    assert threading.active_count() == before + 1
    given_up.close()
    assert threading.active_count() == before
