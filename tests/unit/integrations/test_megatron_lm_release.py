"""The patch layer says which Megatron it was tested with, and sees when another one lacks what it touches."""

import importlib.metadata

import pytest

from lorafusion_megatron.errors import UserError
from lorafusion_megatron.integrations.megatron_lm import add_arguments, release
from lorafusion_megatron.integrations.megatron_lm.patches import Patch, Patches


def test_the_installed_release_is_the_tested_one_and_passes():
    assert importlib.metadata.version("megatron-core") == release.TESTED_RELEASE
    assert release.check_release() is None


def test_another_release_that_has_everything_is_told_of(monkeypatch):
    monkeypatch.setattr(release, "version", lambda name: "0.20.0")
    assert "0.20.0" in release.check_release()
    assert release.check_release().endswith("were tested with 0.19.2")


def test_a_missing_symbol_names_itself_and_the_tested_release(monkeypatch):
    monkeypatch.setitem(release.SYMBOLS, "megatron.training.training", ("train_step", "train_all_steps"))
    with pytest.raises(UserError, match=r"training has no train_all_steps; .*tested with 0\.19\.2; .*\[training\]==0"):
        release.check_release()


def test_a_missing_parameter_names_its_function(monkeypatch):
    monkeypatch.setitem(release.PARAMETERS, "train_step", ("model", "world"))
    with pytest.raises(UserError, match=r"train_step takes no world; .*tested with 0\.19\.2"):
        release.check_release()


def test_megatron_without_its_training_code_says_what_to_install(monkeypatch):
    monkeypatch.setitem(release.SYMBOLS, "megatron.training.absent", ())
    with pytest.raises(UserError, match=r"megatron.training.absent does not import .*pip install"):
        release.check_release()


def test_an_argument_of_the_same_name_as_one_of_ours_is_not_shadowed():
    import argparse

    parser = add_arguments(argparse.ArgumentParser())
    assert vars(parser.parse_args([])) == {"lorafusion_config": None, "lorafusion_set": []}


def test_removed_patches_leave_own_and_inherited_attributes_as_they_were():
    class Base:
        def inherited(self):
            return "base"

    class Owner(Base):
        @staticmethod
        def own():
            return "own"

    before = dict(vars(Owner))
    patches = Patches()
    patches.install(
        [
            Patch(owner=Owner, attribute="own", value=lambda: "first"),
            Patch(owner=Owner, attribute="own", value=lambda: "second"),
            Patch(owner=Owner, attribute="inherited", value=lambda self: "patched"),
        ]
    )
    assert (Owner.own(), Owner().inherited()) == ("second", "patched")
    patches.remove()
    assert dict(vars(Owner)) == before
    assert (Owner.own(), Owner().inherited()) == ("own", "base")
    patches.remove()
