"""Codecs: from data space to the space of a model and back, where the two differ.

A codec is never trained: its parameters are frozen and it stays in eval mode, whatever module it is part of. Gradients
pass through it to its input.
"""

from lightning_sgm.codecs.autoencoders import VQ_F4, Autoencoder
from lightning_sgm.codecs.base import Codec, Identity
from lightning_sgm.codecs.pixels import PixelUnshuffle
from lightning_sgm.codecs.whitening import Whitening

__all__ = ["VQ_F4", "Autoencoder", "Codec", "Identity", "PixelUnshuffle", "Whitening"]
