"""Triton's interpreter without what it does again and again, or for nothing: most of what a test of kernels takes."""

import dataclasses
import functools


def hasten() -> None:
    """Once a process. What another version of triton does not have stays as it is."""
    from triton.runtime import interpreter

    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched: set[object] = set()

    def launched(self, *arguments, **options):
        patched.clear()
        return launch(self, *arguments, **options)

    def patched_once(function):
        """Each call of a device function patches the language anew, which lasts until the launch ends."""
        if function in patched:
            return interpreter._LangPatchScope()
        patched.add(function)
        return patch(function)

    if hasattr(interpreter, "_LangPatchScope"):
        interpreter.GridExecutor.__call__, interpreter._patch_lang = launched, patched_once
    # Sums are made in int64, too, for assertions that only the option ``debug`` would make.
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    # It makes a table of all types each time.
    made = interpreter._get_np_dtype
    kept = functools.cache(made)

    def np_dtype(dtype):
        return (kept if type(dtype) is interpreter.tl.dtype else made)(dtype)

    interpreter._get_np_dtype = np_dtype
