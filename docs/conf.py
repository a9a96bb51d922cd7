"Sphinx's settings. `docs/build.py` writes the pages and calls Sphinx."
import html
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path

from docutils import nodes

here = Path(__file__).parent
settings = ConfigParser(delimiters=["="])
settings.read(here.parent / "settings.ini", encoding="utf-8")

project = settings["DEFAULT"]["lib_name"]
release = settings["DEFAULT"]["version"]
author = settings["DEFAULT"]["author"]
extensions = ["myst_nb"]

nb_execution_mode = "off"  # the notebooks were run before
nb_merge_streams = True
nb_code_prompt_show = "The code"
nb_code_prompt_hide = "The code"
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 4
suppress_warnings = ["mystnb.unknown_mime_type", "myst.header"]


def katex_folder():
    "Panel's wheel ships KaTeX, which draws formulas without a network."
    found = sorted(Path(find_spec("panel").origin).parent.glob("dist/bundled/katex/katex@*/dist/katex.min.js"))
    if not found: raise FileNotFoundError("this version of panel ships no KaTeX: the site needs another source for it")
    return found[-1].parent


html_context = {"default_mode": "auto"}
html_theme = "pydata_sphinx_theme"
html_title = project
templates_path = [str(here)]
html_static_path = [str(here / "static"), str(katex_folder())]
html_css_files = ["custom.css"]
html_js_files = ["katex.min.js", "formulas.js"]
html_sidebars = {"**": ["chapters.html"]}
html_show_sourcelink = False
html_copy_source = False
html_use_index = False
html_show_search_summary = False  # a page opened from a file may not fetch another
html_theme_options = {
    "logo": {"text": project},
    "navbar_center": [],
    "navbar_persistent": ["search-button"],
    "navbar_end": ["theme-switcher"],
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": [],
    "footer_end": [],
    "back_to_top_button": False,
}


def formula(tag):
    "A writer of formulas for `formulas.js` to draw."
    def write(translator, node):
        translator.body.append(f'<{tag} class="formula">{html.escape(node.astext())}</{tag}>')
        raise nodes.SkipNode
    return write


html_math_renderer = "formulas"


def setup(app):
    app.add_html_math_renderer("formulas", (formula("span"), None), (formula("div"), None))
