"""Classes of one's own: known once their module is named or their package installed; nothing else imports them."""

import sys

import pytest
from helpers import one_line

from lrsa_lit import plugins
from lrsa_lit.errors import UserError
from lrsa_lit.ops.sparse_attention import Compressor, MeanPool

SELECTOR = """
from dataclasses import dataclass
from lrsa_lit.ops.sparse_attention import Selector, MeanPool

@dataclass(frozen=True)
class {name}(Selector):
    scale: float = 1.0
    def score(self, partitions):
        return partitions.key.float().norm(dim=-1) * self.scale

class Incomplete(Selector): ...
class _Private({name}): ...
"""
DATA = """
from lrsa_lit.data import QADataModule

class {name}(QADataModule): ...
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write modules that can be imported during the test, and forget them afterwards."""
    monkeypatch.setattr(plugins, "_added", {kind: {} for kind in plugins.KINDS})
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(path, text, **names):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.format(**names) if names else text)

    yield write
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def refusal(call, *arguments, **options):
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    return one_line(caught.value)


def test_the_shipped_classes_are_registered():
    assert {"LagRelative", "RandomTokens", "MeanPool"} <= set(plugins.registered("compressors"))
    assert {"QAFiles", "HotpotQA", "Mixture"} <= set(plugins.registered("data"))
    assert not {"Compressor", "Selector", "SpreadSelector"} & set(plugins.registered("compressors"))
    assert "QADataModule" not in plugins.registered("data")
    assert {"AnswerLoss", "Distillation", "Sum"} <= set(plugins.registered("objectives"))
    assert not {"Objective", "Term", "Pass"} & set(plugins.registered("objectives"))


def test_a_module_adds_its_public_complete_classes(write):
    write("own_norm.py", SELECTOR, name="OwnNorm")
    shipped = set(plugins.registered("compressors"))
    plugins.load(["own_norm"])
    added = set(plugins.registered("compressors")) - shipped
    assert added == {"OwnNorm"}
    plugins.load(["own_norm"])
    assert set(plugins.registered("compressors")) - shipped == added


def test_a_package_adds_what_it_exports_of_every_kind(write):
    write("own_package/norm.py", SELECTOR, name="PackageNorm")
    write("own_package/sets.py", DATA, name="PackageSet")
    write("own_package/__init__.py", "from .norm import PackageNorm, MeanPool\nfrom .sets import PackageSet\n")
    plugins.load(["own_package"])
    assert plugins.registered("compressors")["PackageNorm"].__module__ == "own_package.norm"
    assert plugins.registered("compressors")["MeanPool"] is MeanPool
    assert plugins.registered("data")["PackageSet"].__module__ == "own_package.sets"


def install(write, points, module=SELECTOR, **names):
    write("installed_norm.py", module, **names)
    write("own_dist-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: own-dist\nVersion: 1.0\n")
    write("own_dist-1.0.dist-info/entry_points.txt", points)


def test_an_installed_package_registers_a_class(write):
    install(write, "[lrsa_lit.compressors]\nInstalled = installed_norm:Installed\n", name="Installed")
    assert "installed_norm" not in sys.modules
    found = plugins.find("compressors", "installed_norm.Installed", "x")
    assert found.__name__ == "Installed"
    assert plugins.registered("compressors")["Installed"] is found


@pytest.mark.parametrize("point", ["Other = installed_norm:Installed", "Installed = installed_norm:Nothing",
                                   "MeanPool = lrsa_lit.data:QAFiles"])  # fmt: skip
def test_an_entry_point_is_a_class_of_its_name_and_kind(write, point):
    install(write, f"[lrsa_lit.compressors]\n{point}\n", name="Installed")
    assert "own-dist" in refusal(plugins.load)


def test_a_broken_installed_package_is_named(write):
    install(write, "[lrsa_lit.data]\nInstalled = installed_norm:Installed\n", "import nothing_of_the_kind")
    message = refusal(plugins.load)
    assert "own-dist" in message
    assert "nothing_of_the_kind" in message
    plugins.load(kinds=["compressors"])


@pytest.mark.parametrize("text", ["raise SystemExit(3)", "1 / 0", "x = (", "import nothing_of_the_kind"])
def test_a_module_that_cannot_be_imported_says_why(write, text):
    write("own_broken.py", text)
    message = refusal(plugins.load, ["own_broken"])
    assert message.startswith("plugins: own_broken ")
    assert any(name in message for name in ("SystemExit", "ZeroDivisionError", "SyntaxError", "nothing_of_the_kind"))


@pytest.mark.parametrize("name", ["MeanPool", "Twice"])
def test_a_name_stands_for_one_class(write, name):
    write("own_first.py", SELECTOR.replace(", MeanPool", ""), name="Twice")
    write("own_second.py", SELECTOR.replace(", MeanPool", ""), name=name)
    plugins.load(["own_first"])
    before = plugins.registered("compressors")
    assert name in refusal(plugins.load, ["own_second"])
    assert plugins.registered("compressors") == before


@pytest.mark.parametrize("value", ["os", "subprocess.run", "a b", "", "../x", "class", 3, {"a": 1}, [["a"]], None])
def test_a_name_is_that_of_a_module_of_ones_own(value):
    assert refusal(plugins.names_of, value).startswith("plugins: ")


def test_a_class_that_nobody_has_imported_is_refused_with_what_would_make_it_known(write):
    write("own_unknown.py", SELECTOR, name="Unknown")
    values = {"class_path": "own_unknown.Unknown", "init_args": {"scale": 2.0}}
    message = refusal(Compressor.from_dict, values)
    assert "'own_unknown.Unknown'" in message
    assert "--plugins own_unknown " in message
    assert "plugins: [own_unknown]" in message
    assert "own_unknown" not in sys.modules
    plugins.load(["own_unknown"])
    assert Compressor.from_dict(values).to_dict() == values


@pytest.mark.parametrize("path", ["os.system", "antigravity.X", "Alone", "a b.X", "x\ny.X", None, 3])
def test_what_is_no_class_of_ones_own_is_refused_without_advice(path):
    assert "--plugins" not in refusal(plugins.find, "compressors", path, "x")


def test_a_shipped_class_is_found_under_every_path_that_it_ever_had():
    for path in ("lrsa_lit.ops.sparse_attention", "lrsa_lit.ops.sparse_attention.before.it.moved"):
        assert plugins.find("compressors", f"{path}.MeanPool", "x") is MeanPool
