"""Tiny official folders of every kind, made once for all tests."""

import pytest


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Kind → (the networks, their official folder), made when first asked for."""
    import official_checkpoints as checkpoints

    made = {}

    def make(kind: str):
        if kind not in made:
            modules = checkpoints.networks(5, kind)
            folder = tmp_path_factory.mktemp(kind) / f"Wan2.1-tiny-{kind}"
            made[kind] = modules, checkpoints.write_official_folder(folder, modules, kind)
        return made[kind]

    return make
