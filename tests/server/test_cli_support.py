"""What commands share."""

import gc

import pytest

from server.cli_support import garbage_ignored


def test_garbage_is_collected_again_after_the_imports() -> None:
    with garbage_ignored():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_garbage_is_collected_again_after_an_import_that_fails() -> None:
    def import_what_is_missing() -> None:
        with garbage_ignored():
            raise ModuleNotFoundError

    with pytest.raises(ModuleNotFoundError):
        import_what_is_missing()
    assert gc.isenabled()
