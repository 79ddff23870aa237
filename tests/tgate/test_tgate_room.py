"""The memory of T-GATE's cache is known before anything is stored, and announced to ComfyUI."""

from __future__ import annotations

import logging
import threading

import pytest
import torch
from families import FAMILIES, sample
from host_inprocess import pack_nodes

SEPARATE = ("sd15", "sdxl", "pixart", "wan_t2v", "hunyuan_dit")


@pytest.fixture(scope="module")
def published():
    """The node, which stores attention."""
    node = pack_nodes()["TGateCache"]
    names = {each.id for each in node.define_schema().inputs}
    schedule = {"schedule": "as published"} if "schedule" in names else {}
    return lambda model, **settings: node.execute(model, **schedule, **settings)[0]


@pytest.fixture
def line(caplog):
    caplog.set_level(logging.INFO, logger="fovea")
    return lambda: next(text for text in reversed(caplog.messages) if text.startswith("T-GATE"))


@pytest.fixture
def peaks(pack, monkeypatch):
    """What each run's cache held at most."""
    from fovea_attention.attention.tgate import TGateRun

    found = []
    release = TGateRun.release

    def noted(run):
        found.append(run.cache_peak_bytes)
        release(run)

    monkeypatch.setattr(TGateRun, "release", noted)
    return found


@pytest.mark.parametrize("name", SEPARATE)
@pytest.mark.parametrize("settings", [{}, {"sp_interval": 1}, {"fi_interval": 2}, {"cfg_after_gate": "keep"}])
def test_what_a_cache_will_hold_is_known(published, peaks, monkeypatch, name, settings):
    from fovea_attention.attention.tgate import room

    reckoned = []
    most = room.most_bytes

    def noted(*args, **kwargs):
        reckoned.append(most(*args, **kwargs))
        return reckoned[-1]

    monkeypatch.setattr(room, "most_bytes", noted)
    family = FAMILIES[name]
    sample(family, published(family.build(), warm_up=2, **settings), steps=6)
    assert peaks[-1] > 0
    assert {*reckoned} == {peaks[-1]}


@pytest.mark.parametrize(("share", "says"), [(0.5, "the cache needs"), (1.5, "self-attention is always computed")])
def test_a_cache_that_does_not_fit_is_lowered_or_refused(published, monkeypatch, line, share, says):
    """With the figure in the line; the image is then the plain one, or the one without intervals."""
    from fovea_attention.attention.tgate import room

    family = FAMILIES["sd15"]
    model = family.build()
    plain, without = sample(family, model, steps=6), sample(family, published(model, sp_interval=1), steps=6)
    sites = room.attention_sites(model.model.diffusion_model)
    cross = room.bytes_of_a_cond(model.model, sites, family.latent().shape)["cross"]
    monkeypatch.setattr(room.host, "free_system_memory", lambda: share * cross / room._OF_SYSTEM_MEMORY)
    result = sample(family, published(model, fi_interval=2), steps=6)
    assert says in line() and "MiB of" in line()
    assert torch.equal(result, without if share > 1 else plain)


@pytest.mark.parametrize("large", [False, True])
def test_comfyui_makes_room_for_the_cache(published, pack, monkeypatch, asked, large):
    """A large one goes to system memory instead: no weights leave the device for it."""
    from fovea_attention.attention.tgate import room

    if large:
        monkeypatch.setattr(room.host, "forward_memory", lambda *args: 0.0)
    family = FAMILIES["sd15"]
    model = family.build()
    before = dict(model.model.__dict__)
    sample(family, model)
    sample(family, published(model, sp_interval=1))
    more = {after - plain for plain, after in zip(*asked, strict=True)}
    sites = room.attention_sites(model.model.diffusion_model)
    expected = room.bytes_of_a_cond(model.model, sites, family.latent().shape)["cross"]
    assert more == {0.0} if large else all(each == pytest.approx(expected, abs=1) for each in more)
    assert model.model.__dict__.keys() == before.keys()


def test_halves_that_come_from_two_threads_meet(pack):
    """Two GPUs compute one prompt each, at the same time."""
    from fovea_attention.attention.tgate import AttentionCache

    for number in range(50):
        cache, start = AttentionCache(None), threading.Barrier(2)

        def store(value, cache=cache, start=start):
            start.wait()
            for site in map(str, range(20)):
                cache.store_mean(site, [0.5], torch.full((1, 2, 2), value))

        threads = [threading.Thread(target=store, args=(value,)) for value in (1.0, 3.0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not cache.halves and len(cache.means) == 20, number
        assert all(torch.equal(mean, torch.full((1, 2, 2), 2.0)) for mean in cache.means.values())
