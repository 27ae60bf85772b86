"""Compiles the kernel for GPUs that need not be there. Run by test_triton.py: `python -m tests.nn.compile_triton`."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nanoworks.nn.triton_attention import _attend, _merge

INTEGERS = ("tiles", "starts", "tables", "places", "positions", "limits", "known", "tokens", "ids")
SHARED_MEMORY = 99 * 1024  # bytes a program may take on the smaller GPUs of a generation


def compile_for(architecture: int, kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> int:
    """Return the bytes of shared memory of a program. Pointers in `types`, everything else is a number or constant."""
    names = kernel.arg_names
    numbers = {"scale": "fp32", "softcap": "fp32", "window": "i32", "first": "i32", "width": "i32"}
    numbers |= {"q_row": "i32", "q_head": "i32"}
    signature = {name: "constexpr" if name in constants else (types | numbers)[name] for name in names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]] for name in types if signature.get(name) in types.values()
        },
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_stages": 2})
    return compiled.metadata.shared


def main() -> None:
    plain = {"SCATTERED": False, "TREE": False, "WINDOWED": False, "NUM_IDS": 0, "SOFTCAP": False, "SINKS": False}
    everything = {"SCATTERED": True, "TREE": True, "WINDOWED": True, "NUM_IDS": 2, "SOFTCAP": True, "SINKS": True}
    absent = dict.fromkeys(("places", "tree", "known", "tokens", "ids", "sinks"))
    for architecture in (80, 90):
        for dtype, D, rows, splits, options in [
            ("*bf16", 128, 16, 8, {**plain, **absent}),
            ("*bf16", 128, 64, 1, everything),
            ("*fp32", 256, 64, 1, {**plain, **absent}),
        ]:
            results = ("*fp32",) * 3 if splits > 1 else (dtype,) * 3
            types = {
                **dict(zip(("out", "maxima", "sums"), results, strict=True)),
                **dict.fromkeys(("q", "keys", "values", "sinks"), dtype),
                **dict.fromkeys(INTEGERS, "*i32"),
                "tree": "*i64",
            }
            sizes = {"GROUP": 4, "NUM_KEY_HEADS": 8, "D": D, "BLOCK_SIZE": 16, "ROWS": rows, "HEADS": 4}
            keys = {"KEYS": 64 if dtype == "*bf16" else 32, "PADDED_D": D, "SPLITS": splits}
            shared = compile_for(architecture, _attend, types, {**sizes, **keys, **options})
            print(architecture, dtype, shared, "ok" if dtype == "*fp32" or shared <= SHARED_MEMORY else "too much")
        types = {**dict.fromkeys(("out", "parts", "maxima", "sums"), "*fp32"), "tiles": "*i32"}
        shared = compile_for(architecture, _merge, types, {"NUM_HEADS": 32, "D": 128, "PADDED_D": 128, "SPLITS": 32})
        print(architecture, "merge", shared, "ok")


if __name__ == "__main__":
    main()
