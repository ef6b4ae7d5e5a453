"""Tiny official folders of every kind, made once for all tests."""

import pytest


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Kind → (the networks, their official folder), made when first asked for."""
    import official_checkpoints as checkpoints

    made = {}

    def make(kind: str):
        if kind == "animate" and kind not in made:
            import test_animate

            folder = tmp_path_factory.mktemp(kind) / "Wan2.2-Animate-14B"
            made[kind] = test_animate.write_model(folder), folder
        if kind not in made:
            modules = checkpoints.networks(5, kind)
            folder = tmp_path_factory.mktemp(kind) / f"Wan2.1-tiny-{kind}"
            made[kind] = modules, checkpoints.write_official_folder(folder, modules, kind)
        return made[kind]

    return make
