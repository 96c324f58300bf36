"""How the site is built: `make docs` runs every page's code and stops at the first warning."""

import os
import sys
from pathlib import Path

import jax
from docutils import nodes
from latex2mathml.converter import convert
from sphinx.errors import ConfigError

import jaxprune

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import pages

ROOT = HERE.parent

project = "jaxprune"
author = "The jaxprune developers"
copyright = "2026, the jaxprune developers"
release = version = jaxprune.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_codeautolink",
    "sphinx_copybutton",
    "sphinx_design",
]

# Pages.
exclude_patterns = ["_build", "conf.py", "**/.ipynb_checkpoints"]
suppress_warnings = ["codeautolink.parse_block"]  # a row of a table is no program
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# Code: each page runs from top to bottom in a folder of its own, with the repository on the path.
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True
nb_output_stderr = "remove"  # progress bars
os.environ |= {
    "PYTHONPATH": str(ROOT),
    # Small programs are compiled in a third of the time, and once for all pages.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    "JAX_COMPILATION_CACHE_DIR": str(HERE / "_build" / "jax"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
if jax.__version_info__ < (0, 11):  # XLA ends the process at a flag that it does not know
    fast = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = fast

# Each kernel warns that it talks over TCP, which says nothing about a page.
profile = HERE / "_build" / "ipython" / "profile_default"
profile.mkdir(parents=True, exist_ok=True)
(profile / "ipython_kernel_config.py").write_text("c.IPKernelApp.log_level = 40\n")
os.environ["IPYTHONDIR"] = str(profile.parent)

# The reference.
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say shapes, which types cannot
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # attributes stand in the docstring of their class
add_module_names = False
autosummary_generate = False
codeautolink_concat_default = True

# Other projects' references are on the net; a build without one leaves these links out.
intersphinx_mapping = (
    {
        "python": ("https://docs.python.org/3", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "optax": ("https://optax.readthedocs.io/en/latest", None),
    }
    if os.environ.get("DOCS_ONLINE")
    else {}
)

# Looks.
html_math_renderer = "mathml"
html_theme = "sphinx_book_theme"
html_title = "jaxprune"
html_theme_options = {
    "navbar_persistent": [],  # one search is enough
    "navigation_with_keys": False,
    "show_toc_level": 2,
}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False


# A page that cannot be built here is left out, and said; where nobody reads along that is an error.
left_out = pages.left_out(HERE, here={path.name for path in ROOT.iterdir()})
if left_out:
    if os.environ.get("CI"):
        raise ConfigError(pages.told(left_out))
    print(pages.told(left_out), file=sys.stderr)
    exclude_patterns += left_out
    suppress_warnings += ["toc.excluded", "toc.not_readable", "myst.xref_missing"]


def skip(app, what, name, obj, *_):
    """Leave out fields of named tuples, of which the docstring of the class tells."""
    return True if (getattr(obj, "__doc__", "") or "").startswith("Alias for field") else None


def signature(app, what, name, obj, options, arguments, returned):  # noqa: PLR0917
    """Leave out what says nothing, as of protocols, which nobody calls."""
    return ("", returned) if arguments == "(*args, **kwargs)" else None


def link(app, tree, page):
    """Link what is written as ``jp.prune`` or ``find_masks`` to its place in the reference."""
    known = app.env.get_domain("py").objects
    for literal in list(tree.findall(nodes.literal)):
        name = literal.astext().partition("(")[0]
        entry = known.get(f"jaxprune.{name.removeprefix('jp.')}")
        sure = name.startswith("jp.") or "_" in name  # `sparsity` may be an argument
        if entry and sure and not isinstance(literal.parent, nodes.reference):
            uri = app.builder.get_relative_uri(page, entry.docname) + f"#{entry.node_id}"
            literal.replace_self(nodes.reference("", "", literal.deepcopy(), refuri=uri))


def inline_math(self, node):
    """Give mathematics as MathML, which browsers draw by themselves, also without a net."""
    self.body.append(convert(node.astext()))
    raise nodes.SkipNode


def block_math(self, node):
    """Give a formula of its own likewise."""
    self.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def setup(app):
    """Plug the functions above into Sphinx."""
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-signature", signature)
    app.connect("doctree-resolved", link)
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
