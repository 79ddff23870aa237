"""The front end in a real browser, for the tests that use it like a person."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from browser.front_end import FrontEnd, browser_page
from host_server import HostServer


@pytest.fixture(scope="module")
def page_of_host(server: HostServer) -> Iterator[FrontEnd]:
    """The front end in a browser, for all tests here: to start them takes longer than most of these tests."""
    server.request("/settings", {"Comfy.TutorialCompleted": True})  # else a first visit opens the template browser
    with browser_page() as page:
        if page is None:
            pytest.skip("no Chromium: `apt install chromium`, install Google Chrome, or `python -m playwright install chromium`")
        yield FrontEnd(page, server.url)


@pytest.fixture
def ui(page_of_host: FrontEnd) -> Iterator[FrontEnd]:
    """The front end with nothing open above the canvas. Whatever a test does, our script must not complain."""
    page_of_host.clear()
    yield page_of_host
    assert page_of_host.complaints == []
