"""A model by the name that its users give it: `hf:`, `torchvision:`, `timm:` or `py:`.

Owns which code builds a module and which inputs it runs on. Reading weights is `wspace.io`'s.
Nothing here touches the network. Only `py:` runs code that does not come from an installed library.
"""

from wspace.reference.model import Model
from wspace.reference.python import load_function
from wspace.reference.schemes import resolve

__all__ = ["Model", "load_function", "resolve"]
