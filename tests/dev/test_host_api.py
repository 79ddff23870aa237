"""ComfyUI has what the pack uses, and the list of it is read from the sources."""

from __future__ import annotations

import pytest
from compatibility import api as host_api


def test_this_host_has_everything_the_pack_uses(pack):
    needed = [use for use in host_api.missing(host_api.uses()) if not use.optional]
    assert not needed


def test_the_newest_host_lacks_nothing(pack, host_version):
    if tuple(map(int, host_version.split(".")[:2])) < (0, 30):
        pytest.skip(f"ComfyUI {host_version} is older than some networks that the pack knows")
    absent = {use.name for use in host_api.missing(host_api.uses())}
    assert absent == (host_api.LATER if host_version == "0.30.0" else set())


def test_transformer_options_have_the_keys_the_pack_reads(host_path):
    assert not host_api.missing_keys(host_path)


def test_names_are_found_in_the_sources():
    names = {use.name for use in host_api.uses()}
    assert {
        "comfy.patcher_extension.WrappersMP.OUTER_SAMPLE",  # an attribute of something imported by name
        "comfy.model_management.get_free_memory",  # of a module
        "comfy.ldm.pixart.pixartms.PixArtMSBlock",  # in a string
        "folder_paths.get_filename_list",
    } <= names


def test_a_name_that_is_gone_is_reported():
    gone = host_api.Use("comfy.samplers.CFGGuider.no_such_method", "attention/host.py:1", optional=False)
    kept = host_api.Use("comfy.samplers.CFGGuider.predict_noise", "attention/host.py:1", optional=False)
    assert host_api.missing([gone, kept]) == [gone]
    assert host_api.missing([host_api.Use("comfy.no_such_module.thing", "x:1", optional=False)])
