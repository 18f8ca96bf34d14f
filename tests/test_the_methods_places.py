"""A method has its place in the code, the configs, the tests and the README: everywhere under one name."""

import re
from importlib import import_module
from inspect import isabstract, isclass
from pathlib import Path

from cab_attention import Method
from tests.all_methods import METHODS

ROOT = Path(__file__).resolve().parents[1]


def methods_by_file() -> dict[str, list[str]]:
    """The names of the methods that each file of `cab_attention/methods` defines."""
    found = {}
    for path in sorted((ROOT / "cab_attention" / "methods").glob("[!_]*.py")):
        module = import_module(f"cab_attention.methods.{path.stem}")
        classes = [x for x in vars(module).values() if isclass(x) and x.__module__ == module.__name__]
        found[path.stem] = [x.name for x in classes if issubclass(x, Method) and not isabstract(x)]
    return found


def test_a_methods_file_bears_its_name():
    found = methods_by_file()
    assert {file: names for file, names in found.items() if names} == {
        name: [name] for names in found.values() for name in names
    }


def test_every_method_has_a_config_a_line_in_the_tests_and_one_in_the_readme():
    names = sorted(name for names in methods_by_file().values() for name in names)
    assert len(names) >= 12
    assert sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")) == names
    plain = [key for key, make in METHODS.items() if make(9).name == key]
    variants = [key for key, make in METHODS.items() if key not in plain]
    assert sorted(plain) == names
    assert all(key.startswith(METHODS[key](9).name + "_") for key in variants)
    table = (ROOT / "README.md").read_text().split("\n| method | keeps |")[1].split("\n\n")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == names
