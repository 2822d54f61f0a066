"""Print what calls of the operator launch, call by call, as JSON: kernels compiled for a GPU that is not there.

A script of its own, because kernels are either compiled or interpreted in all of a process.
"""

import json
from unittest import mock

import torch
from host_time import driver, stand_in_driver
from torch.utils._python_dispatch import TorchDispatchMode

from lrsa_lit.ops.sparse_attention import KeyDiff, Rule, sparse_attention
from lrsa_lit.ops.sparse_attention.gluon import forward_pipeline, hopper, key_gradient_pipeline, query_gradient_pipeline
from lrsa_lit.ops.sparse_attention.triton import replay, tape

RULE = Rule(sink_size=4, lag_size=32, top_k=8)
CASES = {
    "128 channels": {},
    "64 channels": {"dim": 64, "heads": 9, "groups": 3},
    "Hopper": {"enough": 0},
    "packed": {"boundaries": [0, 1, 60, 60, 190, 300]},
    "too short to compress": {"length": 40},
    "other selector": {"rule": RULE.replace(compressor=KeyDiff())},
    "few queries": {"queries": 70},
    "two rows": {"batch": 2},
}


class Held(TorchDispatchMode):
    """Keeps all tensors, so that no two have the same address."""

    def __init__(self):
        super().__init__()
        self.tensors = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.tensors.append(function(*args, **(kwargs or {})))
        return self.tensors[-1]


def described(argument, names):
    """An argument of a launcher, with a name for each address, in the order in which they appear."""
    if isinstance(argument, torch.Tensor):
        argument = argument.data_ptr()
    if hasattr(argument, "base"):
        attributes = vars(argument) | {"base": described(argument.base, names), "dtype": argument.base.dtype}
        return sorted((name, str(value)) for name, value in attributes.items())
    if isinstance(argument, int) and argument > 1 << 40:
        return names.setdefault(argument, f"memory {len(names)}")
    return str(argument)


def calls(
    launches, batch=1, heads=8, groups=2, dim=128, length=300, queries=None, boundaries=None, rule=RULE, enough=1 << 62
):
    """What four calls launch, forward and backward; the first one is ordinary. And how many passes were played."""
    sizes = (heads, queries or length), (groups, length), (groups, length)
    memory = [torch.randn(batch, size, count, dim, dtype=torch.bfloat16) for count, size in sizes]
    cu_seqlens = None if boundaries is None else torch.tensor(boundaries, dtype=torch.int32)
    found = []
    with mock.patch.object(hopper, "ENOUGH", enough), mock.patch.object(tape._Tape, "play", counted(tape._Tape.play)):
        for enabled in (False, True, True, True):
            leaves = [each.transpose(1, 2).detach().requires_grad_() for each in memory]
            launches.clear()
            with Held(), mock.patch.multiple(replay, ENABLED=enabled, OF_PASSES=enabled):
                output = sparse_attention(*leaves, rule, cu_seqlens=cu_seqlens, impl="triton")
                grads = torch.autograd.grad(output, leaves, torch.empty_like(output))
            names = {each.data_ptr(): "query, key, value"[index] for index, each in enumerate(leaves)}
            names |= {each.data_ptr(): f"result {index}" for index, each in enumerate((output, *grads))}
            found.append([[name, *(described(each, names) for each in given)] for name, given in launches])
        return found, tape._Tape.play.count


def counted(function):
    """The function with a count of its calls."""

    def counting(*arguments):
        counting.count += 1
        return function(*arguments)

    counting.count = 0
    return counting


# Whether or not a GPU has run them with this version of Triton.
HOPPER = {
    "CHECKED": True,
    "_is_hopper": lambda device: True,
    "forward_pipeline": forward_pipeline,
    "key_gradient_pipeline": key_gradient_pipeline,
    "query_gradient_pipeline": query_gradient_pipeline,
}

if __name__ == "__main__":
    with stand_in_driver(), mock.patch.multiple(hopper, create=True, **HOPPER):
        launches = []
        driver.active.launcher_cls.__call__ = lambda self, *given: launches.append((self.name, given[:3] + given[9:]))
        print(json.dumps({name: calls(launches, **case) for name, case in CASES.items()}))
