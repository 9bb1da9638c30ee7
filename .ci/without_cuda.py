"""Make PyTorch's file for CUDA importable without CUDA: for tests on the processor.

    python .ci/without_cuda.py .../site-packages/torch

The registry's files of PyTorch for Linux are linked to CUDA's libraries: gigabytes, for which a test
on the processor has no use. This writes empty ones (gcc) with the names and symbols that are asked
for; they say that there is no device. It needs pyelftools.
"""

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection

SYSTEM = re.compile(
    r"(libc|libm|libdl|librt|libpthread|libutil|libstdc\+\+|libgcc_s|ld-linux.*)\.so"
)
NO_DEVICE = 100  # cudaErrorNoDevice

Missing = dict[str, dict[str | None, list[str]]]


def missing(folder: Path) -> Missing:
    """Symbols by library and version that the libraries in `folder` need and nobody has."""
    files = [path for path in folder.rglob("*.so*") if path.is_file()]
    needed: set[str] = set()
    defined: set[str] = set()
    wanted: dict[str, tuple[str | None, str | None]] = {}
    for path in files:
        with path.open("rb") as file:
            elf = ELFFile(file)
            if dynamic := elf.get_section_by_name(".dynamic"):
                needed |= {t.needed for t in dynamic.iter_tags() if t.entry.d_tag == "DT_NEEDED"}
                ours, theirs = symbols(elf)
                defined |= ours
                wanted |= theirs
    absent = sorted(n for n in needed - {path.name for path in files} if not SYSTEM.match(n))
    found: Missing = {name: defaultdict(list) for name in absent}
    for symbol, (library, version) in wanted.items():
        if symbol in defined or symbol.startswith(("Py", "_Py")):
            continue
        if library is None:
            found[absent[0]][None].append(symbol)
        elif library in found:
            found[library][version].append(symbol)
    return found


def symbols(elf: ELFFile) -> tuple[set[str], dict[str, tuple[str | None, str | None]]]:
    """What a library defines, and what it needs: library and version by symbol."""
    versions = {
        aux["vna_other"]: (library.name, aux.name)
        for section in elf.iter_sections()
        if isinstance(section, GNUVerNeedSection)
        for library, auxiliaries in section.iter_versions()
        for aux in auxiliaries
    }
    numbers = elf.get_section_by_name(".gnu.version")
    defined, wanted = set(), {}
    for index, symbol in enumerate(elf.get_section_by_name(".dynsym").iter_symbols()):
        if symbol["st_shndx"] != "SHN_UNDEF":
            defined.add(symbol.name)
        elif symbol.name and symbol["st_info"]["bind"] != "STB_WEAK":
            number = numbers.get_symbol(index)["ndx"] if numbers else None
            wanted[symbol.name] = versions.get(number, (None, None))
    return defined, wanted


def write(library: Path, versions: dict[str | None, list[str]]) -> None:
    """A library whose functions fail, or do nothing where they register something."""
    code = [
        f"int {name}(void) {{ return {NO_DEVICE if re.match('cuda[A-Z]', name) else 0}; }}\n"
        for names in versions.values()
        for name in names
    ]
    script = [f"{v} {{ global: {'; '.join(names)}; }};\n" for v, names in versions.items() if v]
    with tempfile.TemporaryDirectory() as folder:
        source, exports = Path(folder, "empty.c"), Path(folder, "empty.map")
        source.write_text("".join(code) or "int empty;\n")
        exports.write_text("".join(script))
        options = [f"-Wl,--version-script={exports}"] if script else []
        command = ("gcc", "-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{library.name}")
        subprocess.run([*command, *options, "-o", library, source], check=True)


if __name__ == "__main__":
    torch = Path(sys.argv[1])
    for name, versions in missing(torch).items():
        write(torch / "lib" / name, versions)
