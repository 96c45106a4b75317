"""Models and training states in files: safetensors that hold the nonzeros only, written whole or not at all.

The format is docs/format.md. No pickle is ever read or written.
"""

from rarefy.files.atomic import DiskFull, atomic_write, remove_leftovers
from rarefy.files.checkpoint import Checkpoint, read
from rarefy.files.model import load, load_into, save

__all__ = ["Checkpoint", "DiskFull", "atomic_write", "load", "load_into", "read", "remove_leftovers", "save"]
