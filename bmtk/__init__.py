"""bmtk, the big model toolkit: importing it registers its model families with the transformers Auto classes."""

from bmtk.registration import register

__version__ = "0.1.0"

register()
