"""Triton's interpreter without what it does again and again, or for nothing: most of what a test of kernels takes."""

import dataclasses
import functools


def hasten() -> None:
    """Once a process. What another version of triton does not have stays as it is."""
    from triton.runtime import interpreter

    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched: set[tuple[str, ...]] = set()

    def launched(self, *arguments, **options):
        patched.clear()
        return launch(self, *arguments, **options)

    @functools.cache
    def languages(function):
        """The names of the modules that are patched for a function."""
        seen = function.__globals__.values()
        return tuple(lang.__name__ for lang in (interpreter.tl, interpreter.tl.core) if any(it is lang for it in seen))

    def patched_once(function):
        """Each call of a device function patches the language anew, which lasts until the launch ends."""
        if languages(function) in patched:
            return interpreter._LangPatchScope()
        patched.add(languages(function))
        return patch(function)

    def patch_attribute(target, name, member, _, scope):
        """Each call made a copy of its keyword arguments."""

        def called(*arguments, **options):
            options["_semantic"] = interpreter.interpreter_semantic
            return member(*arguments, **options)

        scope.set_attr(target, name, called)

    if hasattr(interpreter, "_LangPatchScope"):
        interpreter.GridExecutor.__call__, interpreter._patch_lang = launched, patched_once
        interpreter._patch_attr = patch_attribute
        _intern_types(interpreter.tl.core)
        _skip_what_changes_nothing(type(interpreter.interpreter_semantic))
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


def _intern_types(core):
    """Each operation makes its types, their shapes and names anew: now there is one of each, known by identity."""
    block, tensor, unwrap = core.block_type, core.tensor, core._unwrap_if_constexpr
    make_block, make_tensor, equal = block.__init__, tensor.__init__, core.dtype.__eq__

    def plain(shape):
        return tuple([size.value if isinstance(size, core.constexpr) else size for size in shape])

    def new_block(cls, element_type, shape, *_, **__):
        known = element_type.__dict__.get("_blocks", {}) if cls is block else {}
        return known.get(plain(shape)) or object.__new__(cls)

    def init_block(self, element_type, shape):
        if "numel" not in self.__dict__:
            make_block(self, element_type, shape)
            if type(self) is block:
                element_type.__dict__.setdefault("_blocks", {})[plain(shape)] = self

    def init_tensor(self, handle, of):
        parts = of.__dict__.get("_of_tensors")
        if parts is None:
            make_tensor(self, handle, of)
            of.__dict__["_of_tensors"] = {name: part for name, part in self.__dict__.items() if name != "handle"}
        else:
            self.__dict__.update(parts)
            self.handle = handle

    block.__new__, block.__init__, tensor.__init__ = staticmethod(new_block), init_block, init_tensor
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)
    core._unwrap_if_constexpr = lambda value: value if type(value) in (int, str, core.dtype) else unwrap(value)


def _skip_what_changes_nothing(semantic):
    """Most operands have equal types: nothing is cast or broadcast, which took some comparisons of shapes to see."""
    cast, broadcast = semantic.cast, semantic.broadcast_impl_value

    def cast_other(self, value, to, *options, **named):
        return value if value.type.scalar is to.scalar else cast(self, value, to, *options, **named)

    def broadcast_other(self, left, right):
        return (left, right) if left.type is right.type else broadcast(self, left, right)

    semantic.cast, semantic.broadcast_impl_value = cast_other, broadcast_other
