"""Which private names of torch the library uses: before a new one, it is looked up in the oldest torch we support."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "wellcond"

# All of these are in the sources of torch 2.11, with the arguments that are passed here.
IMPORTED = {
    "torch._dynamo.eval_frame",
    "torch._subclasses.fake_tensor.FakeTensor",
    "torch.nn.modules.batchnorm._BatchNorm",
    "torch.nn.modules.batchnorm._LazyNormBase",
    "torch.nn.modules.batchnorm._NormBase",
    "torch.nn.modules.conv._ConvNd",
    "torch.nn.modules.dropout._DropoutNd",
    "torch.nn.modules.instancenorm._InstanceNorm",
    "torch.utils._python_dispatch._disable_current_modes",
    "torch.utils._python_dispatch._get_current_dispatch_mode_stack",
    "torch.utils._python_dispatch.is_traceable_wrapper_subclass",
    "torch.utils._pytree.tree_flatten",
    "torch.utils._pytree.tree_leaves",
    "torch.utils._pytree.tree_map",
    "torch.utils._pytree.tree_map_only",
}
TOUCHED = {
    *("_C", "_TorchDispatchModeKey", "_autograd", "_current_graph_task_id", "_functorch", "_get_dispatch_mode"),
    *("_get_tracing_state", "_top_saved_tensors_default_hooks"),
    *("_InstanceNorm", "_NormBase", "_WeightNorm"),
    *("_cdata", "_is_view", "_version"),
    *("_check_input_dim", "_conv_forward", "_output_padding"),
    *("_foreach_add", "_foreach_add_", "_foreach_mul_", "_foreach_norm", "_foreach_sub_", "_unsafe_view"),
    *("_forward_hooks", "_forward_pre_hooks", "_non_persistent_buffers_set", "_optimizer_step_pre_hooks"),
    *("_set_stance", "_stance", "_standard_gamma"),
}
# Of named tuples, argparse, sys, os and atexit.
OF_OTHERS = {
    "_ActionsContainer",
    "_ArgumentGroup",
    "_SubParsersAction",
    "_actions",
    "_asdict",
    "_exit",
    "_getframe",
    "_replace",
}
OF_OTHERS |= {"_run_exitfuncs"}


def nodes() -> Iterator[ast.AST]:
    for path in SOURCE.rglob("*.py"):
        yield from ast.walk(ast.parse(path.read_text()))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_private_imports_are_those_that_were_looked_up() -> None:
    found = set()
    for node in nodes():
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("wellcond"):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if not alias.name.startswith("wellcond")]
        found |= {name for name in names if any(map(is_private, name.split(".")))}
    assert found == IMPORTED, "look a new name up in torch 2.11, then list it here"


def test_private_attributes_are_those_that_were_looked_up() -> None:
    ours: set[str] = {path.stem for path in SOURCE.rglob("*.py")}
    touched: set[str] = set()
    for node in nodes():
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            ours.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            ours.add(node.id)
        elif isinstance(node, ast.Attribute):
            of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if of_self and isinstance(node.ctx, ast.Store):
                ours.add(node.attr)
            elif is_private(node.attr):
                touched.add(node.attr)
    assert touched - ours - OF_OTHERS == TOUCHED, "look a new name up in torch 2.11, then list it here"
