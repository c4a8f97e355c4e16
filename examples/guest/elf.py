"""What ELF files need: shared libraries of programs, insertion order of kernel modules."""

import glob
import io
import lzma
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from elftools.elf.dynamic import DynamicSection, DynamicTag
from elftools.elf.elffile import ELFFile
from elftools.elf.segments import InterpSegment

from guest.program import Failure

LOADER_DIRECTORIES = ("/lib64", "/usr/lib64", "/lib", "/usr/lib")


class Unloadable(Failure):
    """A program or module needs something that is nowhere to be found."""


@dataclass(frozen=True)
class Needs:
    """The dynamic section of one file, as far as loading goes."""

    interpreter: str | None
    libraries: tuple[str, ...]
    directories: tuple[str, ...]  # DT_RPATH and DT_RUNPATH, $ORIGIN replaced
    machine: str


def needs(path: Path) -> Needs:
    """Read which interpreter and libraries *path* asks for; a static program asks for none."""
    with path.open("rb") as file:
        elf = ELFFile(file)
        interpreters = [s.get_interp_name() for s in elf.iter_segments() if isinstance(s, InterpSegment)]
        tags = [tag for s in elf.iter_sections() if isinstance(s, DynamicSection) for tag in s.iter_tags()]
        return Needs(
            interpreter=interpreters[0] if interpreters else None,
            libraries=tuple(_texts(tags, "needed")),
            directories=tuple(_directories(tags, path.resolve().parent)),
            machine=elf.get_machine_arch(),
        )


def _texts(tags: Iterable[DynamicTag], kind: str) -> Iterator[str]:
    """Yield the strings of the tags that pyelftools decorated with the attribute *kind*."""
    return (getattr(tag, kind) for tag in tags if hasattr(tag, kind))


def _directories(tags: Sequence[DynamicTag], origin: Path) -> Iterator[str]:
    for joined in (*_texts(tags, "rpath"), *_texts(tags, "runpath")):
        for directory in joined.split(":"):
            yield directory.replace("$ORIGIN", str(origin)).replace("${ORIGIN}", str(origin))


def loaded_with(programs: Iterable[Path]) -> dict[str, Path]:
    """Map the name each library is asked for by to the file on this host, for *programs* and all they load.

    An interpreter is listed under its absolute path, everything else under its bare name.
    """
    defaults = tuple(_configured_directories(Path("/etc/ld.so.conf"))) + LOADER_DIRECTORIES
    found: dict[str, Path] = {}
    waiting = list(programs)
    while waiting:
        path = waiting.pop()
        wanted = needs(path)
        if wanted.interpreter is not None:
            found.setdefault(wanted.interpreter, Path(wanted.interpreter))
        for name in wanted.libraries:
            if name not in found:
                found[name] = _locate(name, wanted, defaults, path)
                waiting.append(found[name])
    return found


def _locate(name: str, wanted: Needs, defaults: Iterable[str], user: Path) -> Path:
    for directory in (*wanted.directories, *defaults):
        candidate = Path(directory, name)
        if candidate.is_file() and needs(candidate).machine == wanted.machine:
            return candidate
    raise Unloadable(f"{user} needs {name}, which is not installed")


def _configured_directories(config: Path) -> Iterator[str]:
    """Yield the directories of an ld.so.conf, following its include lines."""
    if not config.is_file():
        return
    for line in config.read_text().splitlines():
        words = line.partition("#")[0].split()
        if words[:1] == ["include"]:
            for name in sorted(glob.glob(str(config.parent / words[1]))):
                yield from _configured_directories(Path(name))
        elif words:
            yield words[0]


def insertion_order(modules: Path, wanted: Iterable[str]) -> list[Path]:
    """List the module files below *modules* to insert for *wanted*, each after those it depends on.

    Modules built into the kernel need no insertion and are left out.
    """
    files = {_module_name(path.name): path for path in modules.glob("kernel/**/*.ko*")}
    builtin = {_module_name(Path(line).name) for line in (modules / "modules.builtin").read_text().splitlines()}
    ordered: dict[str, Path] = {}

    def insert(name: str) -> None:
        if name in ordered or name in builtin:
            return
        if name not in files:
            raise Unloadable(f"{modules} has no module {name}")
        for dependency in module_dependencies(files[name]):
            insert(dependency)
        ordered[name] = files[name]

    for name in wanted:
        insert(_module_name(name))
    return list(ordered.values())


def module_content(path: Path) -> bytes:
    """Return the module's ELF image, decompressed."""
    return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()


def module_dependencies(path: Path) -> list[str]:
    """Read the `depends=` record that the kernel's build left in the module."""
    section = ELFFile(io.BytesIO(module_content(path))).get_section_by_name(".modinfo")
    if section is None:
        raise Unloadable(f"{path} is not a kernel module: it has no .modinfo")
    records = section.data().decode().split("\0")
    listed = next(record for record in records if record.startswith("depends=")).removeprefix("depends=")
    return [_module_name(name) for name in listed.split(",") if name]


def _module_name(name: str) -> str:
    return name.partition(".")[0].replace("-", "_")
