"""Which processors multiply bf16."""

from tokenyard.moe.processor import lists_bf16


def test_flags_of_processors() -> None:
    assert lists_bf16("processor : 0\nflags : avx512f avx512_bf16\n")
    assert lists_bf16("flags : amx_tile amx_bf16") and lists_bf16("Features : fp asimd bf16")
    assert not lists_bf16("flags : fma avx512f avx512_vnni")
