"""The modules of the product, for tests that read its code."""

from tests.helpers.paths import ROOT

PACKAGES = ("data_pipeline", "megaback", "launcher", "tools")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
    if path.name != "__init__.py"
}
