"""Text files for the tests of the data modules."""

from __future__ import annotations

import torch

from datamodules import TextDataModule


def blocks(data, split):
    return torch.cat([batch["x"] for batch in data.eval_loader(split)])


def ready(**arguments):
    data = TextDataModule(**arguments)
    data.setup()
    return data


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def numbered(count):
    """Text in which every place is recognisable: lines of 8 characters."""
    return "".join(f"{number:07d}\n" for number in range(count))
