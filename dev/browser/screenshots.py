"""Take the screenshots of docs/screenshots in ComfyUI's front end; look at them before they are committed.

    python dev screenshots

Needs Chromium or Chrome.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from pathlib import Path

import environment
from host_server import HostServer
from PIL import Image

from browser.front_end import TO_LOOK_AT, FrontEnd, browser_page
from workflows import workflow_files

TARGET = environment.ROOT / "docs" / "screenshots"
WIDTH = 1200


def shoot(ui: FrontEnd, name: str) -> None:
    ui.page.wait_for_timeout(1500)  # images and boxes fade in
    with Image.open(io.BytesIO(ui.page.screenshot())) as image:
        height = round(image.height * WIDTH / image.width)
        target = TARGET / f"{name}.jpg"
        image.convert("RGB").resize((WIDTH, height), Image.Resampling.LANCZOS).save(target, quality=82)
    print(target)


def whole_workflow(ui: FrontEnd, title: str, name: str) -> None:
    ui.open(workflow_files.load(workflow_files.find(title)))
    ui.run()
    ui.fit()
    shoot(ui, name)


def read_out(ui: FrontEnd, name: str) -> None:
    ui.open(workflow_files.load(workflow_files.find("Attention maps - where each word looks")))
    ui.run()
    node = ui.node("AttnMapPreview")
    ui.centre(node)
    left, top, width, height = ui.image(node)
    ui.words_at(left + 0.3 * width, top + 0.4 * height)
    shoot(ui, name)
    ui.page.mouse.move(2, 2)


def wrong_word(ui: FrontEnd, name: str) -> None:
    node = ui.node("AttnMapPreview")
    ui.set_widget(node, "words", "dog")
    ui.run()
    ui.centre(node, 0.8)
    shoot(ui, name)  # without the error's details, which name folders of this machine


def main() -> None:
    TARGET.mkdir(parents=True, exist_ok=True)
    host = Path(os.environ["COMFYUI_PATH"])
    with (
        tempfile.TemporaryDirectory() as base,
        HostServer(host, Path(base), arguments=environment.front_end_arguments(host)) as server,
        browser_page() as page,
    ):
        server.request("/settings", TO_LOOK_AT)
        ui = FrontEnd(page or sys.exit("There is no Chromium."), server.url)
        whole_workflow(ui, "All together - faster, complete, in a style", "all-together-dark")
        read_out(ui, "read-out-dark")
        wrong_word(ui, "wrong-word")
        ui.clear()
        ui.choose_theme("light")
        whole_workflow(ui, "T-GATE - same image, faster", "t-gate-light")
        read_out(ui, "read-out-light")


if __name__ == "__main__":
    main()
