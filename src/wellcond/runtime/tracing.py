"""The state of torch around a pass: compiled, traced, under a function transform, or repeated by a backward pass.

This module is the only one that asks torch's private parts for it.
"""

from __future__ import annotations

import torch

NO_BACKWARD = -1


def is_transformed() -> bool:
    """Whether a `torch.func` transform is active: its tensors are wrapped and must not outlive it.

    >>> torch.func.grad(lambda x: x * is_transformed())(torch.tensor(2.0)), is_transformed()
    (tensor(1.), False)
    """
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_recorded() -> bool:
    """Whether a compiler or a function transform records what is done, so that values must not be looked at."""
    return torch.compiler.is_compiling() or is_transformed()


def is_script_traced() -> bool:
    """Whether `torch.jit.trace` records this pass."""
    return torch._C._get_tracing_state() is not None


def is_traced() -> bool:
    """Whether this pass trains nothing: under `torch.func`, `torch.jit.trace`, `make_fx` or fake tensors."""
    if is_transformed() or is_script_traced():
        return True
    keys = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(key) is not None for key in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL))


def backward_number() -> int:
    """Return the number of the backward pass that this thread is in, or `NO_BACKWARD`."""
    return int(torch._C._current_graph_task_id())


def is_repeated() -> bool:
    """Whether this forward pass runs inside a backward pass: activation checkpointing repeats an earlier one."""
    return not torch.compiler.is_compiling() and backward_number() != NO_BACKWARD


def may_be_repeated() -> bool:
    """Whether activation checkpointing may run this forward pass again.

    Reentrant checkpointing runs it first without gradients; the other kind under hooks on what autograd saves.
    """
    return not torch.is_grad_enabled() or has_saved_tensor_hooks()


def has_saved_tensor_hooks() -> bool:
    """Whether hooks on what autograd saves are active, as inside non-reentrant activation checkpointing."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
