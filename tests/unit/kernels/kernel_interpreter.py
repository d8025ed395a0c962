"""Two mends of Triton 3.6's interpreter, so that the kernels run on the CPU as they are.

NumPy 2.5 no longer turns one-element arrays into integers, which loop bounds need; and the interpreter multiplies
bfloat16 matrices as the integers that hold their bits.
"""

import triton.language as tl
import triton.runtime.interpreter as interpreter


def _patched_index(original):
    def patch(tensor, scope) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch


def _patched_dot(original):
    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = interpreter._convert_float(handle.data, tl.bfloat16, tl.float32, None)
        return interpreter.TensorHandle(bits.view("float32"), tl.float32)

    def create_dot(self, a, b, *args):
        return original(self, widened(a), widened(b), *args)

    return create_dot


def patch_interpreter() -> None:
    """Mend the interpreter; a second call does nothing."""
    if hasattr(interpreter, "mended"):
        return
    interpreter.mended = True
    interpreter._patch_lang_tensor = _patched_index(interpreter._patch_lang_tensor)
    builder = interpreter.InterpreterBuilder
    builder.create_dot = _patched_dot(builder.create_dot)
