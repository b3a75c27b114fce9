"""Checkpoints as flax and orbax keep them: name -> (save, restore)."""

import flax.serialization
import orbax.checkpoint as ocp


def flax_save(path, tree):
    part = path.with_suffix(".part")
    part.write_bytes(flax.serialization.to_bytes(tree))
    part.replace(path)


def flax_restore(path, target):
    return flax.serialization.from_bytes(target, path.read_bytes())


def orbax_save(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), tree)


def orbax_restore(path, target):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path.absolute(), target)


FORMATS = {"flax": (flax_save, flax_restore), "orbax": (orbax_save, orbax_restore)}
