"""All tiny pipelines that draw from a prompt alone, by name: (make, height and width, --pipeline_kwargs)."""

from tiny_chat_families import FAMILIES as CHAT_FAMILIES
from tiny_image_families import FAMILIES as IMAGE_FAMILIES
from tiny_pipelines import PIPELINES
from tiny_video_families import FAMILIES as VIDEO_FAMILIES


FAMILIES = {name: (make, 32, {}) for name, make in PIPELINES.items()}
FAMILIES |= IMAGE_FAMILIES | CHAT_FAMILIES | VIDEO_FAMILIES
