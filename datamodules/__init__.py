"""LightningDataModules by kind of data. They know files, splits and transforms, and nothing of lightning_sgm."""

from datamodules.arrays import ArrayDataModule
from datamodules.base import DataModule
from datamodules.graphs import GraphDataModule
from datamodules.images import ImageDataModule
from datamodules.markov import MarkovDataModule
from datamodules.molecules import MoleculeDataModule
from datamodules.series import SeriesDataModule
from datamodules.super_resolution import SuperResolutionDataModule
from datamodules.text import TextDataModule

__all__ = [
    "ArrayDataModule",
    "DataModule",
    "GraphDataModule",
    "ImageDataModule",
    "MarkovDataModule",
    "MoleculeDataModule",
    "SeriesDataModule",
    "SuperResolutionDataModule",
    "TextDataModule",
]
