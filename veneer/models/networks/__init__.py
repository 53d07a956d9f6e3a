"""Small networks that some systems bring, for models that no package has: they restore and enlarge images.

Each takes ``pixel_values`` and ``labels`` and gives ``Restored``; `save` and `load` keep one in a folder.
"""

from veneer.models.networks.folder import load, save
from veneer.models.networks.naf import NAFNet
from veneer.models.networks.restored import Restored, psnr
from veneer.models.networks.span import SPAN

__all__ = ["SPAN", "NAFNet", "Restored", "load", "psnr", "save"]
