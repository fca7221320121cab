"""The tables in docs/ are what the code says, and so are the lists in docstrings.

`PRONGHORN_WRITE_DOCS=1 pytest tests/unit/test_docs.py` writes them anew.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import ModuleType

import msgspec
import pytest
import typer
from msgspec import inspect

from pronghorn import errors
from pronghorn.cli import commands
from pronghorn.engines import openvino, scripted
from pronghorn.engines.scripted import ALL_KINDS, ScriptedOptions
from pronghorn.engines.scripted.faults import VARIANTS
from pronghorn.errors import PronghornError, RequestError
from pronghorn.settings import LlamaCppSettings, OpenVinoSettings, Settings, UpstreamSettings

ROOT = Path(__file__).resolve().parents[2]
TABLES = {
    "docs/SETTINGS.md": (Settings, UpstreamSettings, LlamaCppSettings, OpenVinoSettings),
    "docs/SCRIPTED.md": (ScriptedOptions,),
}


def settings_table(struct: type[msgspec.Struct]) -> str:
    """Return a struct's fields as a Markdown table."""
    rows = ["| name | type | default | what it is |", "|---|---|---|---|"]
    for field, info in zip(msgspec.structs.fields(struct), inspect.type_info(struct).fields, strict=True):
        default = _default(field.default)
        rows.append(f"| `{field.name}` | {_type(info.type)} | {default} | {_description(info.type)} |")
    return "\n".join(rows)


def _description(type_: inspect.Type) -> str:
    return str((type_.extra_json_schema or {})["description"]) if isinstance(type_, inspect.Metadata) else ""


def _default(value: object) -> str:
    if value is msgspec.NODEFAULT:
        return "required"
    if value is None:
        return ""
    if isinstance(value, msgspec.Struct):
        return "as below"
    return f"`{json.dumps(value)}`"


def _type(type_: inspect.Type) -> str:
    match type_:
        case inspect.Metadata(type=inner):
            return _type(inner)
        case inspect.UnionType(types=types):
            return " or ".join(_type(inner) for inner in types if not isinstance(inner, inspect.NoneType))
        case inspect.IntType():
            return "integer" + _bounds(type_)
        case inspect.FloatType():
            return "number" + _bounds(type_)
        case inspect.StrType():
            return "text"
        case inspect.BoolType():
            return "true or false"
        case inspect.LiteralType(values=values):
            return " or ".join(f"`{value}`" for value in values)
        case inspect.EnumType(cls=cls):
            return re.sub(r"(?<!^)(?=[A-Z])", " ", cls.__name__).lower()
        case inspect.VarTupleType(item_type=item):
            return f"list of {_type(item)}s"
        case inspect.StructType():
            return "table"
        case inspect.CustomType(cls=cls) if cls is Path:
            return "path"
    raise NotImplementedError(f"how to name {type_}")


def _bounds(type_: inspect.IntType | inspect.FloatType) -> str:
    match type_.gt, type_.ge, type_.le:
        case None, None, None:
            return ""
        case int() | float() as above, _, None:
            return f" above {above:g}"
        case None, low, None:
            return f" of at least {low:g}"
        case None, low, high:
            return f" from {low:g} to {high:g}"
    raise NotImplementedError(f"how to name the bounds of {type_}")


@pytest.mark.parametrize("path", TABLES)
def test_the_documented_settings_are_those_of_the_code(path: str) -> None:
    page = ROOT / path
    text = expected = page.read_text()
    for struct in TABLES[path]:
        start, end = f"<!-- table {struct.__name__} -->\n", "<!-- end of table -->\n"
        before, found, rest = expected.partition(start)
        _, closed, after = rest.partition(end)
        assert found, f"{path} has no place for the table of {struct.__name__}"
        assert closed, f"the place for the table of {struct.__name__} in {path} has no end"
        expected = before + start + settings_table(struct) + "\n" + end + after
    if os.environ.get("PRONGHORN_WRITE_DOCS"):
        page.write_text(expected)
        return
    assert text == expected, f"write {path} anew: PRONGHORN_WRITE_DOCS=1 pytest {Path(__file__).relative_to(ROOT)}"


def test_every_setting_says_what_it_is() -> None:
    for structs in TABLES.values():
        for struct in structs:
            for field in inspect.type_info(struct).fields:
                assert _description(field.type), f"{struct.__name__}.{field.name} has no description"


def test_the_help_of_flags_tells_the_defaults_of_their_settings() -> None:
    told = {
        parameter.name: re.findall(r"\[default: (.*)\]", str(getattr(parameter, "help", "")))
        for parameter in typer.main.get_group(commands.app).commands["serve"].params
    }
    for field in msgspec.structs.fields(Settings):
        if field.name in told and field.default:
            assert told[field.name] == [str(field.default)]


def test_every_fault_and_variant_of_the_scripted_engine_is_documented() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", (ROOT / "docs/SCRIPTED.md").read_text(), re.MULTILINE)
    documented = dict(rows)
    for kind in ALL_KINDS:
        assert kind in documented
        for variant in VARIANTS.get(kind, ()):
            assert f"`{variant}`" in documented[kind], f"{kind} has a variant {variant}"


def test_links_between_pages_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
    for page in pages:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def _is_error(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, PronghornError)


@pytest.mark.parametrize("error", [each for each in vars(errors).values() if _is_error(each)])
def test_every_error_has_its_place_in_the_drawn_tree(error: type[PronghornError]) -> None:
    branches = 4 * error.mro().index(PronghornError)
    status = f" +{error.status}" if issubclass(error, RequestError) and error is not RequestError else r"\b.*"
    assert re.search(rf"^[│├└─ ]{{{branches}}}{error.__name__}{status}$", errors.__doc__ or "", re.MULTILINE)


@pytest.mark.parametrize("package", [openvino, scripted])
def test_a_package_that_lists_its_modules_lists_all_of_them(package: ModuleType) -> None:
    listed = re.findall(r"^- `(\w+)` ", package.__doc__ or "", re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in Path(package.__file__ or "").parent.glob("[!_]*.py"))
