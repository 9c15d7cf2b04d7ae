"""A Hub on loopback: what the real huggingface_hub and hf_xet clients need to publish and to read, with faults on demand.

Modelled on the answers of the Hugging Face Hub (https://huggingface.co/docs/hub/api) as huggingface_hub 2.4 expects them: its
errors, its preconditions and its storage. Standard library only, 127.0.0.1 only, every object under a folder of the test's own.
"""

from tests.hub.faults import Fault
from tests.hub.server import Hub

__all__ = ["Fault", "Hub"]
