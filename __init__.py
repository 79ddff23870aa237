"""ComfyUI-Fovea: what a diffusion model pays attention to."""

from comfy_api.latest import ComfyExtension, io

WEB_DIRECTORY = "./web"


class FoveaExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        from .nodes import NODES

        return NODES


async def comfy_entrypoint() -> FoveaExtension:
    return FoveaExtension()
