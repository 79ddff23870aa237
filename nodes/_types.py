"""Socket types of the pack."""

from comfy_api.latest import io

# An ``attention.maps.AttnMaps``; sampling fills it, so its consumers run after the sampler.
AttnMapsSocket = io.Custom("ATTN_MAPS")
