"""A faster Triton interpreter, with the same results."""

from __future__ import annotations

import dataclasses
from typing import Any


def speed_up() -> None:
    """Removes work that Triton 3.7's interpreter repeats for every operation.

    The results are the same. An interpreter with other internals is left as it is.
    """
    try:
        from triton.runtime import interpreter

        _patch_once_per_launch(interpreter)
        _skip_ignored_overflow_checks(interpreter)
        _cache_types(interpreter)
    except (ImportError, AttributeError, TypeError):
        return


def _patch_once_per_launch(interpreter: Any) -> None:
    """Patches triton.language once per launch instead of at every call inside a kernel.

    The patch of the launch stays in place until the launch ends.
    """
    patch, scope_type = interpreter._patch_lang, interpreter._LangPatchScope
    core = interpreter.tl.core
    done: set[bool] = set()
    kinds: dict[Any, bool] = {}

    def patch_lang(fn: Any) -> Any:
        # Functions of Triton call operations of triton.language.core; kernels of other modules do
        # not.
        if fn not in kinds:
            kinds[fn] = any(value is core for value in fn.__globals__.values())
        kind = kinds[fn]
        if kind in done:
            return scope_type()
        outermost = not done
        done.add(kind)
        scope = patch(fn)
        if outermost:
            restore = scope.restore

            def restore_all() -> None:
                done.clear()
                restore()

            scope.restore = restore_all
        return scope

    interpreter._patch_lang = patch_lang


def _skip_ignored_overflow_checks(interpreter: Any) -> None:
    """Skips the overflow checks of 32-bit integers.

    The interpreter computes them and then ignores the result unless its option `debug` is on.
    """
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _cache_types(interpreter: Any) -> None:
    """Builds each block type, its shape and its NumPy dtype once."""
    core = interpreter.tl.core
    numpy_dtype, with_element_ty = interpreter._get_np_dtype, core.block_type.with_element_ty
    dtypes: dict[str, Any] = {}
    blocks: dict[tuple[str, str], Any] = {}
    shapes: dict[str, Any] = {}

    def cached_numpy_dtype(kind: Any) -> Any:
        name = kind.name
        if name not in dtypes:
            dtypes[name] = numpy_dtype(kind)
        return dtypes[name]

    def cached_with_element_ty(self: Any, scalar: Any) -> Any:
        key = scalar.name, self.name
        if key not in blocks:
            blocks[key] = with_element_ty(self, scalar)
        return blocks[key]

    original = core.tensor.__init__

    def init(self: Any, handle: Any, type: Any) -> None:
        name = type.name
        if name not in shapes:
            original(self, handle, type)
            shapes[name] = self.shape, self.numel
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shapes[name]

    interpreter._get_np_dtype = cached_numpy_dtype
    core.block_type.with_element_ty = cached_with_element_ty
    core.tensor.__init__ = init
