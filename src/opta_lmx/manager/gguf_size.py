"""What a GGUF's tensors will take once they are imported, told from its header: the need of a load before the import.

The import itself is ``inference/worker/gguf_tensors.py``; a test holds these sums to the files that it writes.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

# Bits of a value of the block types that are carried over as they are, in groups of 32; every other block type is
# quantised again, to ImportForm.bits in groups of 64 or, where a row is no multiple of that, of 32.
_CARRIED_BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8, "Q4_K": 4, "Q5_K": 5}
_CARRIED_GROUP = 32
_NEW_GROUP = 64

_FLOATS = frozenset({"F32", "F16", "BF16"})

# They become numbers of config.json, and no tensors.
_ROTARY_FACTORS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a header. ``shape`` counts values, and lists a row's length first."""

    name: str
    kind: str
    shape: tuple[int, ...]

    @property
    def values(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class ImportForm:
    """What an import makes of floats and of blocks that MLX cannot hold.

    ``bits`` (4, 5, 6 or 8) is for those blocks. ``full`` stores floats and scales as float32; otherwise they take the
    16-bit type of the file. MLX's CPU kernels run 16-bit floats about 30 times slower than float32 (SmolLM2-135M on
    two x86 cores: 0.34 against 12 tokens a second); Metal runs them faster, and they halve the KV cache.
    """

    bits: int = 8
    full: bool = sys.platform != "darwin"


def imported_bytes(tensors: Sequence[GgufTensor], form: ImportForm) -> int:
    """The exact bytes of the tensors that an import of these makes, scales and biases of groups included."""
    kept = [tensor for tensor in tensors if tensor.name not in _ROTARY_FACTORS]
    only_singles = all(tensor.kind == "F32" for tensor in kept if len(tensor.shape) > 1)
    float_bytes = 4 if form.full or only_singles else 2
    return sum(_imported(tensor, float_bytes, form.bits) for tensor in kept)


def _imported(tensor: GgufTensor, float_bytes: int, bits: int) -> int:
    if tensor.kind in _FLOATS:
        return tensor.values * float_bytes
    group = _CARRIED_GROUP if tensor.kind in _CARRIED_BITS or tensor.shape[0] % _NEW_GROUP else _NEW_GROUP
    packed = tensor.values * _CARRIED_BITS.get(tensor.kind, bits) // 8
    return packed + tensor.values // group * 2 * float_bytes
