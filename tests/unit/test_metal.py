"""What a Mac's GPU may use, from recorded answers of ``sysctl``; and the footprint in recorded bytes."""

import os
import struct

import pytest

from opta_lmx.manager.footprint import footprint_bytes, phys_footprint, private_bytes
from opta_lmx.manager.metal import MetalFacts, read_metal

GIB = 1024**3

M3_ULTRA = {
    "hw.memsize": "549755813888",
    "hw.optional.arm64": "1",
    "iogpu.wired_limit_mb": "0",
    "machdep.cpu.brand_string": "Apple M3 Ultra",
}
MACBOOK = {
    "hw.memsize": "51539607552",
    "hw.optional.arm64": "1",
    "iogpu.wired_limit_mb": "0",
    "machdep.cpu.brand_string": "Apple M4 Pro",
}


@pytest.mark.parametrize(
    ("answers", "working_set_bytes"),
    [
        pytest.param(M3_ULTRA, 384 * GIB, id="512 GB, no limit set"),
        pytest.param(M3_ULTRA | {"iogpu.wired_limit_mb": "475136"}, 464 * GIB, id="512 GB, more allowed"),
        pytest.param(MACBOOK, 36 * GIB, id="48 GB, no limit set"),
        pytest.param(MACBOOK | {"iogpu.wired_limit_mb": "40960"}, 40 * GIB, id="48 GB, more allowed"),
        pytest.param(MACBOOK | {"iogpu.wired_limit_mb": "8192"}, 8 * GIB, id="48 GB, less allowed"),
        pytest.param(MACBOOK | {"iogpu.wired_limit_mb": "99999999"}, 48 * GIB, id="never more than there is"),
        pytest.param(MACBOOK | {"iogpu.wired_limit_mb": "many"}, 36 * GIB, id="a limit that is no number"),
        pytest.param({k: v for k, v in MACBOOK.items() if "iogpu" not in k}, 36 * GIB, id="a system without the limit"),
        pytest.param(MACBOOK | {"hw.memsize": str(16 * GIB)}, 16 * GIB * 2 // 3, id="a small machine"),
    ],
)
def test_the_working_set_is_the_limit_that_was_set_or_metals_own(
    answers: dict[str, str], working_set_bytes: int
) -> None:
    """A limit above 0 takes the place of the default; the default is two thirds or three quarters of the memory."""
    facts = read_metal("darwin", answers.get)
    assert facts is not None
    assert facts.working_set_bytes == working_set_bytes


def test_the_facts_are_told_apart() -> None:
    """A limit that is unset and a system that knows none are different facts with one working set."""
    assert read_metal("darwin", MACBOOK.get) == MetalFacts("Apple M4 Pro", 48 * GIB, 0)
    without = {name: value for name, value in MACBOOK.items() if name in ("hw.memsize", "hw.optional.arm64")}
    assert read_metal("darwin", without.get) == MetalFacts("unknown", 48 * GIB, None)


@pytest.mark.parametrize(
    ("platform", "answers"),
    [
        pytest.param("linux", M3_ULTRA, id="no Mac"),
        pytest.param("darwin", {"hw.memsize": "17179869184"}, id="an Intel Mac"),
        pytest.param("darwin", {}, id="a system that answers nothing"),
    ],
)
def test_without_metal_there_are_no_facts(platform: str, answers: dict[str, str]) -> None:
    """Where MLX has no GPU the working set bounds nothing."""
    assert read_metal(platform, answers.get) is None


def test_the_physical_footprint_is_the_eighth_number_after_the_uuid() -> None:
    """The layout of rusage_info_v0: user, system, two wake-ups, page-ins, wired, resident, footprint, two starts."""
    usage = bytes(16) + struct.pack("=10Q", 1, 2, 3, 4, 5, 6, 7, 8 * GIB, 9, 10)
    assert phys_footprint(usage) == 8 * GIB
    with pytest.raises(ValueError, match="10 bytes"):
        phys_footprint(bytes(10))


def test_private_pages_are_those_written_to() -> None:
    """Swapped-out ones too; neither the clean pages of program files nor what is shared."""
    rollup = (
        "55e0 ---p 00000000 00:00 0 [rollup]\nRss:  90000 kB\nShared_Clean:  12000 kB\nPrivate_Clean:  20000 kB\n"
        "Private_Dirty:     58000 kB\nAnonymous:  58000 kB\nSwap:  9 kB\nSwapPss:  7 kB\n"
    )
    assert private_bytes(rollup) == 58007 * 1024


def test_a_process_has_a_footprint_until_it_has_gone() -> None:
    """This process holds some megabytes; one that does not exist holds nothing."""
    assert footprint_bytes(os.getpid()) > 10 * 1024**2
    assert footprint_bytes(2**22 + 1) == 0
